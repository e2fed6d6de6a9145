"""`env.engine=d4rl`: the simulators of 2021 beside the default engine. Most of it needs them (installation/d4rl.md)."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pytest

pytest.importorskip("mujoco", reason='needs pip install -e ".[gym]"')

from test_physics import BOUNDS  # noqa: E402

from diffusion_rl.core.errors import UserError  # noqa: E402
from diffusion_rl.envs import d4rl  # noqa: E402
from diffusion_rl.envs.interface import VectorEnv  # noqa: E402
from diffusion_rl.envs.make import make_vector_env  # noqa: E402
from diffusion_rl.envs.vector import ProcessVectorEnv  # noqa: E402

LACKING = d4rl.missing()
needs_the_original = pytest.mark.skipif(LACKING is not None, reason=f"{LACKING} (installation/d4rl.md)")
DIMS = {"hopper": (11, 3), "walker2d": (17, 6), "halfcheetah": (17, 6)}
DT = {"hopper": 0.008, "walker2d": 0.008, "halfcheetah": 0.05}
N_ENVS, ACT_STEPS = 2, 2


def make(engine: str, task: str, **changes: Any) -> VectorEnv:
    chunks = {"n_action_steps": ACT_STEPS, "max_episode_steps": 1000, "reset_within_step": True}
    config = {"name": f"{task}-medium-v2", "engine": engine, "wrappers": {"multi_step": chunks}, **changes}
    obs_dim, action_dim = DIMS[task]
    return make_vector_env(config, obs_dim=obs_dim, action_dim=action_dim, act_steps=ACT_STEPS, seed=3, n_envs=N_ENVS)


def actions(task: str, steps: int) -> np.ndarray:
    """Chunks [steps / Ta, E, Ta, A], some of the actions outside the range, so that clipping is compared too."""
    shape = (steps // ACT_STEPS, N_ENVS, ACT_STEPS, DIMS[task][1])
    return np.random.default_rng(5).uniform(-1.2, 1.2, shape)


@needs_the_original
@pytest.mark.parametrize("task", DIMS)
def test_same_seed_and_actions_give_the_trajectories_of_the_default_engine(task: str) -> None:
    bound, steps = BOUNDS[task]
    original, ours = make("d4rl", task), make("mujoco", task)
    try:
        np.testing.assert_allclose(original.reset()["state"], ours.reset()["state"], rtol=0, atol=1e-15)
        deviation = reward_deviation = 0.0
        episodes = 0
        for chunk in actions(task, steps):
            theirs, mine = original.step(chunk), ours.step(chunk)
            deviation = max(deviation, np.abs(theirs.observations["state"] - mine.observations["state"]).max())
            reward_deviation = max(reward_deviation, np.abs(theirs.rewards - mine.rewards).max())
            np.testing.assert_array_equal(theirs.terminated, mine.terminated)
            np.testing.assert_array_equal(theirs.truncated, mine.truncated)
            np.testing.assert_array_equal(theirs.infos["executed_steps"], mine.infos["executed_steps"])
            episodes += theirs.terminated.sum()
    finally:
        original.close()
        ours.close()
    reward_deviation *= DT[task]
    print(f"{task}: observations {deviation:.1e}, rewards x dt {reward_deviation:.1e}, {episodes} episodes ended")
    assert deviation <= bound
    assert reward_deviation <= bound  # the reward divides by dt, which scales rounding up
    assert episodes >= 2 or task == "halfcheetah"  # new episodes are drawn from the same stream


@needs_the_original
@pytest.mark.parametrize(("limit", "flags"), [(1000, (True, True)), (None, (False, True)), (20, (True, True))])
def test_time_limits(limit: int | None, flags: tuple[bool, bool]) -> None:
    """D4RL's limit terminates and truncates; without it the chunk wrapper's own limit truncates."""
    chunks = {"n_action_steps": ACT_STEPS, "max_episode_steps": 1000, "reset_within_step": False}
    venv = make("d4rl", "halfcheetah", d4rl_time_limit=limit, wrappers={"multi_step": chunks})
    try:
        venv.reset()
        steps, ended = 0, False
        while not ended:
            result = venv.step(np.zeros((N_ENVS, ACT_STEPS, 6)))
            steps += ACT_STEPS
            ended = result.terminated.any() or result.truncated.any()
    finally:
        venv.close()
    assert steps == (limit or 1000)
    assert [tuple(row) for row in zip(result.terminated, result.truncated, strict=True)] == [flags] * N_ENVS


@needs_the_original
def test_every_environment_is_a_process_and_none_of_the_old_packages_is_in_this_one() -> None:
    before = set(sys.modules)
    venv = make("d4rl", "hopper")
    assert isinstance(venv, ProcessVectorEnv) and not venv.restorable
    venv.close()
    assert not {"gym", "mujoco_py", "d4rl"} & (set(sys.modules) - before)


def test_without_the_original_one_line_names_the_cure_and_the_page(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MUJOCO_PY_MUJOCO_PATH", "/nowhere/mujoco210")
    wanted = r"^env.engine=d4rl: .*(not installed|/nowhere).*installation/d4rl.md"
    with pytest.raises(UserError, match=wanted) as raised:
        make("d4rl", "hopper")
    assert "\n" not in str(raised.value)


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setattr(d4rl, "PACKAGES", ("numpy", "no_such_package"))
    assert d4rl.missing() == "no_such_package is not installed"
    monkeypatch.setattr(d4rl, "PACKAGES", ("numpy",))
    monkeypatch.setenv("MUJOCO_PY_MUJOCO_PATH", str(tmp_path))
    assert str(tmp_path) in (d4rl.missing() or "")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "libmujoco210.so").touch()
    monkeypatch.setenv("LD_LIBRARY_PATH", "/usr/lib")
    assert d4rl.missing() == f"LD_LIBRARY_PATH does not name {tmp_path / 'bin'}"
    monkeypatch.setenv("LD_LIBRARY_PATH", f"/usr/lib:{tmp_path}/bin")
    assert d4rl.missing() is None


@pytest.mark.parametrize("name", ["hopper-medum-v2", "maze2d-umaze-v1"])
def test_only_the_locomotion_tasks(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(d4rl, "missing", lambda: None)
    with pytest.raises(UserError, match="is unknown"):
        make("d4rl", "hopper", name=name)
