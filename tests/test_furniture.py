"""Furniture-Bench without IsaacGym: the adapter against recordings of the reference's wrapper, and what is said when
something is missing. The simulator's process runs with a stand-in for `furniture_bench` that plays a recording back."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from diffusion_rl.config.compose import REPOSITORY, compose
from diffusion_rl.core.errors import UserError
from diffusion_rl.envs.furniture import INTERPRETER, PAGE, FurnitureVectorEnv
from diffusion_rl.envs.make import make_vector_env

RECORDINGS = sorted((REPOSITORY / "parity_tests/goldens_env/furniture").glob("*.npz"))

CONTROL_UTILS = """
import torch
def proprioceptive_quat_to_6d_rotation(state):
    return torch.cat([state[..., :3], state[..., 3:7], state[..., 3:5] ** 2, state[..., 7:]], dim=-1)
"""
SIMULATOR = """
import numpy as np, torch
class FurnitureRLSimEnv:
    device = "cpu"
    def __init__(self, num_envs, max_env_steps, **options):
        self.recording = np.load({recording!r})
        self.max_env_steps, self.num_envs = max_env_steps, num_envs
        self.steps, self.resets, self.received = 0, 0, []
    def observe(self, kind, k):
        keys = ("robot_state", "parts_poses")
        return {{key: torch.tensor(self.recording["in/" + kind + "." + key][k]) for key in keys}}
    def reset(self):
        self.env_steps = torch.zeros((self.num_envs, 1), dtype=torch.int64)
        self.resets += 1
        return self.observe("reset_obs", self.resets - 1)
    def step(self, action):
        self.received.append(action.numpy())
        np.save({received!r}, np.stack(self.received))
        self.env_steps += 1
        self.steps += 1
        reward = torch.tensor(self.recording["in/reward"][self.steps - 1])[:, None]
        return self.observe("obs", self.steps - 1), reward, None, {{}}
"""


def install_stand_in(folder: Path, recording: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An "interpreter" that finds the stand-in; returns the file in which it notes the actions that it received."""
    received = folder / "received.npy"
    sources = {
        "controllers/control_utils.py": CONTROL_UTILS,
        "envs/furniture_rl_sim_env.py": SIMULATOR.format(recording=str(recording), received=str(received)),
        "envs/observation.py": "DEFAULT_STATE_OBS = []",
    }
    for name, source in sources.items():
        path = folder / "furniture_bench" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)
    use_interpreter(folder, f"PYTHONPATH={folder} exec {sys.executable}", monkeypatch)
    return received


def use_interpreter(folder: Path, command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    script = folder / "python3.8"
    script.write_text(f'#!/bin/sh\n{command} "$@"\n')
    script.chmod(0o755)
    monkeypatch.setenv(INTERPRETER, str(script))


def statistics(folder: Path, values: dict[str, np.ndarray]) -> str:
    torch = pytest.importorskip("torch", reason='needs pip install -e ".[parity]"')
    path = folder / "normalization.pth"
    torch.save({key: torch.tensor(value) for key, value in values.items()}, path)
    return str(path)


@pytest.mark.parametrize("path", RECORDINGS, ids=lambda path: path.stem)
def test_recordings(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recording = np.load(path)
    meta = json.loads(str(recording["meta"]))
    names = [f"stats.{of}.{which}" for of in ("observations", "actions") for which in ("min", "max")]
    specific = {
        "furniture": "one_leg",
        "randomness": "low",
        "normalization_path": statistics(tmp_path, {n: recording[f"out/stats.{n}"][0] for n in names}),
        "sparse_reward": meta["kwargs"].get("sparse_reward", False),
    }
    received = install_stand_in(tmp_path, path, monkeypatch)
    chunk = meta["kwargs"]["n_action_steps"]
    venv = FurnitureVectorEnv(specific, meta["n_envs"], chunk, meta["max_env_steps"])
    assert venv.obs_spec == {"state": recording["out/reset.state"].shape[-1:]}
    resets = steps = 0
    for call, _ in meta["calls"]:
        if call in ("reset", "reset_arg"):
            np.testing.assert_array_equal(venv.reset()["state"], recording[f"out/{call}.state"][resets], strict=True)
            resets += 1
        elif call == "step":
            result = venv.step(recording["in/action"][steps])
            state = recording["out/step.obs.state"][steps]
            np.testing.assert_array_equal(result.observations["state"], state, strict=True)
            np.testing.assert_array_equal(result.rewards, recording["out/step.reward"][steps])
            np.testing.assert_array_equal(result.terminated, recording["out/step.terminated"][steps])
            np.testing.assert_array_equal(result.truncated, recording["out/step.truncated"][steps])
            steps += 1
    venv.close()
    assert steps == meta["n_calls"] and resets == 2
    np.testing.assert_array_equal(np.load(received), recording["out/env.actions"], strict=True)


def of_the_configuration(**changes: Any) -> Any:
    config = compose("furniture/finetune/one_leg_low/ft_ppo_diffusion_mlp")
    options = {"obs_dim": config.obs_dim, "action_dim": config.action_dim, "act_steps": config.act_steps, "seed": 0}
    env = {**config.env, "specific": {**config.env.specific, **changes}}
    return make_vector_env(env, **options)


def test_without_the_simulator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(INTERPRETER, raising=False)
    with pytest.raises(UserError, match=f"needs IsaacGym.*{INTERPRETER}.*{PAGE}") as caught:
        of_the_configuration()
    assert "\n" not in str(caught.value) and (REPOSITORY / PAGE).is_file()


def test_an_interpreter_that_does_not_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(INTERPRETER, "/no/such/python")
    with pytest.raises(UserError, match="/no/such/python is no executable"):
        of_the_configuration()


def test_without_statistics(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(INTERPRETER, sys.executable)
    with pytest.raises(UserError, match="one_leg_low/normalization.pth is not here .*: get it from https"):
        of_the_configuration()


def test_an_interpreter_without_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(INTERPRETER, sys.executable)
    path = statistics(tmp_path, {})
    cause = rf"ModuleNotFoundError: No module named 'furniture_bench' \[.*furniture_server.py:\d+\] \(see {PAGE}"
    with pytest.raises(UserError, match=cause) as caught:
        of_the_configuration(normalization_path=path)
    assert "\n" not in str(caught.value) and "Traceback" in str(caught.value.__cause__)


def test_what_is_not_finite_is_named_by_environment_and_step() -> None:
    state, rewards = np.zeros((2, 5), np.float32), np.array([0.0, np.nan], np.float32)
    answers = iter([{"state": state}, {"state": state, "rewards": rewards, "truncated": np.zeros(2, bool)}])
    venv = FurnitureVectorEnv.__new__(FurnitureVectorEnv)
    venv.name, venv.n_envs, venv.act_steps, venv.action_dim = "furniture lamp", 2, 8, 10
    venv._ask = lambda **message: next(answers)  # type: ignore[method-assign]
    venv.reset()
    with pytest.raises(UserError, match=r"environment 1 \(furniture lamp\): its reward is not finite in step 8 of"):
        venv.step(np.zeros((2, 8, 10)))


def test_a_simulator_that_dies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_interpreter(tmp_path, "exit 3;", monkeypatch)
    with pytest.raises(UserError, match="simulator ended, exit code 3"):
        of_the_configuration(normalization_path=statistics(tmp_path, {}))


def test_wrong_dimensions_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install_stand_in(tmp_path, RECORDINGS[0], monkeypatch)
    small = {f"stats.{of}.{which}": np.ones((1, 5)) for of in ("observations", "actions") for which in ("min", "max")}
    with pytest.raises(UserError, match="obs_dim=58 is wrong for one_leg_low_dim: its observations have 5 entries"):
        of_the_configuration(normalization_path=statistics(tmp_path, small))
