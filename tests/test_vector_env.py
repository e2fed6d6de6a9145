"""The vector environments: chunks, histories, seeds, saving, dying workers, and what make_vector_env refuses."""

from __future__ import annotations

import io
import os
import re
import signal
import subprocess
import sys
from ctypes.util import find_library
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from omegaconf import OmegaConf

sys.path.insert(0, str(Path(__file__).parent))
pytest.importorskip("mujoco", reason='needs pip install -e ".[gym]"')

from tests.sync_env import SyncVectorEnv  # noqa: E402

from diffusion_rl.core.errors import UserError  # noqa: E402
from diffusion_rl.data.normalizers import MinMaxNormalizer  # noqa: E402
from diffusion_rl.envs.chunks import ChunkHistory, StepOutcomes  # noqa: E402
from diffusion_rl.envs.d3il_avoiding import AvoidingVectorEnv  # noqa: E402
from diffusion_rl.envs.interface import VectorEnv  # noqa: E402
from diffusion_rl.envs.locomotion import LocomotionVectorEnv  # noqa: E402
from diffusion_rl.envs.make import make_vector_env  # noqa: E402
from diffusion_rl.envs.mpe import SpreadVectorEnv  # noqa: E402
from diffusion_rl.envs.toy_agents import ToyAgentsVectorEnv  # noqa: E402
from diffusion_rl.envs.vector import ProcessVectorEnv  # noqa: E402
from diffusion_rl.envs.worker import EnvRecipe  # noqa: E402

COUNTER = "toy_envs:Counter-v0"
KINDS = [SyncVectorEnv, ProcessVectorEnv]


def counters(kind: type, n_envs: int = 3, act_steps: int = 4, length: int | None = None, **chunks: Any) -> Any:
    recipe = EnvRecipe(COUNTER, kwargs={"length": length}, chunks=chunks)
    return kind([recipe] * n_envs, act_steps, seeds=range(n_envs))


def shown(result: Any) -> list[float]:
    """The step numbers that the first environment's history shows."""
    return result.observations["state"][0, :, 0].tolist()


# ----------------------------------------------------------------------------------- chunks in generic environments


@pytest.mark.parametrize("kind", KINDS)
def test_history_is_padded_with_the_first_observation(kind: type) -> None:
    venv = counters(kind, n_obs_steps=4)
    assert venv.reset()["state"][0, :, 0].tolist() == [0, 0, 0, 0]
    result = venv.step(np.zeros((3, 2, 1)))
    assert shown(result) == [0, 0, 1, 2]
    assert shown(venv.step(np.zeros((3, 2, 1)))) == [1, 2, 3, 4]
    assert result.observations["state"].shape == (3, 4, 2)
    venv.close()


@pytest.mark.parametrize("kind", KINDS)
def test_a_chunk_stops_at_termination_and_resets_within_the_step(kind: type) -> None:
    venv = counters(kind, length=6, n_obs_steps=2, reset_within_step=True, full_observations=True)
    venv.reset()
    venv.step(np.zeros((3, 4, 1)))
    result = venv.step(np.zeros((3, 4, 1)))  # steps 5 and 6, then the end: two actions are left out
    np.testing.assert_array_equal(result.rewards, [2, 2, 2])
    np.testing.assert_array_equal(result.infos["executed_steps"], [2, 2, 2])
    assert result.terminated.all() and not result.truncated.any()
    assert shown(result) == [0, 0]
    assert "final_observations" not in result.infos  # nothing to bootstrap from after a termination
    assert result.infos["full_observations"]["state"][0, :, 0].tolist() == [5, 6, 6, 6]
    assert shown(venv.step(np.zeros((3, 4, 1)))) == [3, 4]
    venv.close()


@pytest.mark.parametrize("kind", KINDS)
def test_truncation_in_the_middle_of_a_chunk(kind: type) -> None:
    venv = counters(kind, n_obs_steps=2, max_episode_steps=6, reset_within_step=True)
    venv.reset()
    venv.step(np.zeros((3, 4, 1)))
    result = venv.step(np.zeros((3, 4, 1)))
    np.testing.assert_array_equal(result.rewards, [2, 2, 2])
    assert result.truncated.all() and not result.terminated.any()
    assert result.infos["final_observations"]["state"][0, :, 0].tolist() == [5, 6]
    assert shown(result) == [0, 0]
    venv.close()


def test_without_reset_within_step_the_finished_environment_goes_on() -> None:
    venv = counters(SyncVectorEnv, max_episode_steps=6, reset_within_step=False)
    venv.reset()
    venv.step(np.zeros((3, 4, 1)))
    result = venv.step(np.zeros((3, 4, 1)))
    assert result.truncated.all() and shown(result) == [6]
    after = venv.step(np.zeros((3, 4, 1)))  # past the limit every chunk ends after one action
    assert after.truncated.all() and shown(after) == [7]
    np.testing.assert_array_equal(after.rewards, [1, 1, 1])


@pytest.mark.parametrize("kind", KINDS)
def test_seeds_and_options_are_per_environment(kind: type) -> None:
    venv = counters(kind)
    first = venv.reset()["state"][:, 0, 1]
    again = venv.reset()["state"][:, 0, 1]
    assert len(set(first)) == 3 and not np.intersect1d(first, again).size
    venv.seed([0, 1, 2])
    np.testing.assert_array_equal(venv.reset()["state"][:, 0, 1], first)
    options = [{"seed": 1}, {"note": 5.0}, {}]
    mixed = venv.reset(options)["state"][:, 0, 1]
    assert mixed[0] == first[1] and mixed[1] == 5.0
    with pytest.raises(ValueError, match="2 seeds for 3"):
        venv.seed([0, 1])
    venv.close()


def test_both_kinds_are_vector_envs_that_cannot_be_restored() -> None:
    venv = counters(SyncVectorEnv)
    assert isinstance(venv, VectorEnv) and isinstance(LocomotionVectorEnv("hopper-medium-v2", 1), VectorEnv)
    assert not venv.restorable and venv.get_state() == {}
    venv.set_state({})
    with pytest.raises(UserError, match="cannot be restored"):
        venv.set_state({"physics": np.zeros(1)})


# --------------------------------------------------------------------------------------------------- workers that die


def test_a_failing_worker_is_reported_in_one_line_with_its_index() -> None:
    venv = counters(ProcessVectorEnv)
    venv.reset()
    actions = np.zeros((3, 4, 1))
    actions[1, 2] = 2
    with pytest.raises(UserError) as caught:
        venv.step(actions)
    line = rf"environment 1 failed: RuntimeError: the gripper fell off \[{COUNTER}, .*toy_envs\.py:\d+\]"
    assert re.fullmatch(line, str(caught.value))
    assert "Traceback" in str(caught.value.__cause__)


@pytest.mark.parametrize("how", ["exit", "kill"])
def test_a_dying_worker_is_reported(how: str) -> None:
    venv = counters(ProcessVectorEnv)
    venv.reset()
    actions = np.zeros((3, 4, 1))
    if how == "exit":
        actions[2] = 3
    else:
        os.kill(venv._lanes[2]._process.pid, signal.SIGKILL)
    with pytest.raises(UserError, match="environment 2 died.*" + ("exit code 7" if how == "exit" else "signal 9")):
        venv.step(actions)


def test_an_environment_that_cannot_be_built_is_reported() -> None:
    with pytest.raises(UserError, match="environment 0 failed: TypeError.*nonsense"):
        ProcessVectorEnv([EnvRecipe(COUNTER, kwargs={"nonsense": 1})], 1)


def test_workers_do_not_import_tensorflow() -> None:
    import multiprocessing

    venv = counters(ProcessVectorEnv, n_envs=1)
    assert venv.reset()
    venv.step(np.full((1, 1, 1), -2.0))  # raises if it has TensorFlow
    venv.close()
    assert not [child for child in multiprocessing.active_children() if child.name.startswith("ForkServer")]


# ---------------------------------------------------------------------------------------------- the locomotion engine


def hopper(n_envs: int = 6, **options: Any) -> LocomotionVectorEnv:
    settings: dict[str, Any] = {"act_steps": 4, "n_obs_steps": 2, **options}
    return LocomotionVectorEnv("hopper-medium-v2", n_envs, **settings)


def some_actions(n_chunks: int, venv: Any) -> np.ndarray:
    return np.random.default_rng(3).uniform(-1, 1, (n_chunks, venv.n_envs, venv.act_steps, venv.action_dim))


def assert_same_results(one: Any, two: Any) -> None:
    for name in ("rewards", "terminated", "truncated"):
        np.testing.assert_array_equal(getattr(one, name), getattr(two, name))
    np.testing.assert_array_equal(one.observations["state"], two.observations["state"])


@pytest.mark.parametrize("name", ["hopper-medium-v2", "walker2d-medium-v2", "halfcheetah-medium-v2"])
def test_saved_state_goes_on_bit_for_bit(name: str) -> None:
    """Through a file, into a fresh engine, over resets (which draw from the restored generators)."""
    options: dict[str, Any] = {"act_steps": 4, "n_obs_steps": 3, "max_episode_steps": 70}
    venv = LocomotionVectorEnv(name, 5, seeds=range(5), **options)
    actions = some_actions(60, venv)
    venv.reset()
    for chunk in actions[:25]:
        venv.step(chunk)
    file = io.BytesIO()
    np.savez(file, **venv.get_state())
    expected = [venv.step(chunk) for chunk in actions[25:]]
    file.seek(0)
    other = LocomotionVectorEnv(name, 5, seeds=range(100, 105), threads=1, **options)
    with np.load(file, allow_pickle=False) as state:
        other.set_state(dict(state))
    for chunk, result in zip(actions[25:], expected, strict=True):
        assert_same_results(other.step(chunk), result)
    assert any((result.terminated | result.truncated).any() for result in expected)
    for key, value in venv.get_state().items():
        np.testing.assert_array_equal(other.get_state()[key], value)


def test_a_state_of_other_settings_is_refused() -> None:
    with pytest.raises(UserError, match="physics should have shape"):
        hopper(4).set_state(hopper(5).get_state())
    with pytest.raises(UserError, match="found nothing"):
        hopper(4).set_state({})


def test_locomotion_seeds() -> None:
    venv = hopper(seeds=range(6))
    first, second = venv.reset()["state"], venv.reset()["state"]
    assert len(np.unique(first[:, 0], axis=0)) == 6
    assert not np.isclose(first, second).all()
    venv.seed(range(6))
    np.testing.assert_array_equal(venv.reset()["state"], first)
    np.testing.assert_array_equal(venv.reset([{"seed": 3}] + [{}] * 5)["state"][0], first[3])


def test_own_limit_truncates_within_a_chunk() -> None:
    venv = LocomotionVectorEnv("halfcheetah-medium-v2", 2, act_steps=4, n_obs_steps=2, max_episode_steps=6)
    venv.reset()
    actions = some_actions(3, venv)
    before = venv.step(actions[0])
    result = venv.step(actions[1])
    assert not before.truncated.any()
    assert result.truncated.all() and not result.terminated.any()
    np.testing.assert_array_equal(result.infos["executed_steps"], [2, 2])
    final, begun = result.infos["final_observations"]["state"], result.observations["state"]
    np.testing.assert_array_equal(begun[:, 0], begun[:, 1])
    assert (final[:, 1] != begun[:, 1]).any()
    whole = LocomotionVectorEnv("halfcheetah-medium-v2", 2, act_steps=4, n_obs_steps=2)
    whole.reset()
    whole.step(actions[0])
    unbroken = whole.step(actions[1][:, :2])
    np.testing.assert_array_equal(unbroken.observations["state"], final)
    np.testing.assert_array_equal(unbroken.rewards, result.rewards)


@pytest.mark.parametrize(("limit", "terminated"), [(1000, True), (None, False)])
def test_time_out_at_1000_steps_terminates_as_in_d4rl_unless_told_otherwise(
    limit: int | None, terminated: bool
) -> None:
    venv = LocomotionVectorEnv("halfcheetah-medium-v2", 1, act_steps=8, d4rl_time_limit=limit)
    venv.reset()
    results = [venv.step(np.zeros((1, 8, 6))) for _ in range(125)]
    assert not any(result.truncated[0] or result.terminated[0] for result in results[:-1])
    assert results[-1].truncated[0] and results[-1].terminated[0] == terminated


def test_locomotion_without_reset_within_step_goes_on_from_where_the_chunk_ended() -> None:
    """After a fall the finished simulation goes on action by action, as the generic wrapper does it."""
    options: dict[str, Any] = {"n_obs_steps": 2, "max_episode_steps": 40, "reset_within_step": False}
    pytest.importorskip("imageio", reason="gymnasium's MuJoCo environments import it")
    batched = hopper(3, seeds=range(3), **options)
    single = SyncVectorEnv([EnvRecipe("hopper-medium-v2", chunks=options, d4rl_time_limit=1000)] * 3, 4, range(3))
    np.testing.assert_array_equal(batched.reset()["state"], single.reset()["state"])
    results = []
    for chunk in some_actions(30, batched):
        results.append(batched.step(chunk))
        assert_same_results(results[-1], single.step(chunk))
    assert results[-1].terminated.any()


def test_actions_and_observations_are_normalised() -> None:
    low, high = np.linspace(-0.8, -0.2, 3), np.linspace(0.3, 0.9, 3)
    normalizer = MinMaxNormalizer(np.full(11, -2.0), np.full(11, 3.0), low, high)
    plain, normalised = hopper(seeds=range(6)), hopper(seeds=range(6), normalizer=normalizer)
    plain.reset(), normalised.reset()
    actions = some_actions(1, plain)[0]
    raw = plain.step((actions + 1) / 2 * (high - low) + low)
    result = normalised.step(actions)
    expected = 2 * ((raw.observations["state"] + 2.0) / (5.0 + 1e-6) - 0.5)
    np.testing.assert_array_equal(result.observations["state"], expected)
    np.testing.assert_array_equal(result.rewards, raw.rewards)


def test_actions_outside_the_range_are_clipped_as_d4rl_does() -> None:
    one, two = LocomotionVectorEnv("halfcheetah-medium-v2", 2), LocomotionVectorEnv("halfcheetah-medium-v2", 2)
    one.reset(), two.reset()
    assert_same_results(one.step(np.full((2, 1, 6), 1.7)), two.step(np.ones((2, 1, 6))))


def test_misuse_of_the_engine() -> None:
    venv = hopper()
    with pytest.raises(RuntimeError, match="before the first reset"):
        venv.step(np.zeros((6, 4, 3)))
    venv.reset()
    with pytest.raises(ValueError, match="actions have shape"):
        venv.step(np.zeros((6, 4, 2)))


# -------------------------------------------------------------------------------------------- what is not finite


def outcomes(n_envs: int = 2, chunk: int = 3, **changed: Any) -> StepOutcomes:
    flags = np.zeros((n_envs, chunk), bool)
    values = {"observations": np.zeros((n_envs, chunk, 2)), "rewards": np.zeros((n_envs, chunk)), "done": flags.copy()}
    return StepOutcomes(**{**values, **changed}, limit_known=flags, limit_hit=flags)


def test_what_is_not_finite_in_a_chunk_is_named_by_environment_and_step() -> None:
    rows, history = np.arange(2), ChunkHistory(2, 1, 2, None, "pendulums")
    history.start(rows, np.zeros((2, 2)))
    history.advance(rows, outcomes())
    bad, rewards = np.zeros((2, 3, 2)), np.zeros((2, 3))
    bad[1, 1, 1], rewards[1, 2] = np.inf, np.nan
    with pytest.raises(UserError, match=r"environment 1 \(pendulums\): its observation .* step 5 .*entry 1 is inf"):
        history.advance(rows, outcomes(observations=bad))
    with pytest.raises(
        UserError, match=r"environment 1 \(pendulums\): its reward .* step 6 of the episode \(it is nan"
    ):
        history.advance(rows, outcomes(rewards=rewards))
    with pytest.raises(UserError, match=r"environment 1 \(pendulums\): its observation is not finite after a reset"):
        history.start(rows, bad[:, 1])
    ends = np.zeros((2, 3), bool)
    ends[1, 0] = True  # what would have come after the end does not count
    assert history.advance(rows, outcomes(observations=bad, rewards=rewards, done=ends)).terminated.tolist() == [0, 1]


@pytest.mark.parametrize("made", ["hopper", "avoiding", "toy", "simple_spread"])
def test_batched_environments_name_what_is_not_finite(made: str) -> None:
    if made == "hopper":
        venv: Any = LocomotionVectorEnv("hopper-medium-v2", 2, act_steps=2)
        rewards = venv.physics, "_rewards"
    elif made == "avoiding":
        venv = AvoidingVectorEnv("avoiding-m5", 2, act_steps=2)
        rewards = venv, "_rewards"
    elif made == "toy":
        venv = ToyAgentsVectorEnv(2, act_steps=2)
        rewards = venv, "_rewards"
    else:
        pytest.importorskip("mpe2")
        venv = SpreadVectorEnv(2, act_steps=2, seeds=[0, 1])
        rewards = venv, "_flat"
    venv.reset()
    actions = np.zeros((2, 2, venv.action_dim))
    venv.step(actions)
    owner, name = rewards
    right = getattr(owner, name)
    setattr(owner, name, lambda *arguments: right(*arguments) * np.nan)
    with pytest.raises(
        UserError, match=rf"environment 0 \({made}[^)]*\): its .* is not finite in step 3 of the episode"
    ):
        venv.step(actions)


# ---------------------------------------------------------------------------------------------------- make_vector_env


@pytest.fixture
def config(tmp_path: Path) -> Any:
    bounds = {"obs_min": -np.ones(11), "obs_max": np.ones(11), "action_min": -np.ones(3), "action_max": np.ones(3)}
    np.savez(tmp_path / "normalization.npz", **bounds)
    text = f"""
    cond_steps: 2
    env:
      n_envs: 3
      name: hopper-medium-v2
      max_episode_steps: 1000
      save_video: false
      wrappers:
        mujoco_locomotion_lowdim: {{normalization_path: {tmp_path / "normalization.npz"}}}
        multi_step:
          n_obs_steps: ${{cond_steps}}
          n_action_steps: 4
          max_episode_steps: ${{env.max_episode_steps}}
          reset_within_step: true
    """
    return OmegaConf.create(text)


def make(config: Any, **changes: Any) -> Any:
    arguments = {"obs_dim": 11, "action_dim": 3, "act_steps": 4, "seed": 7}
    return make_vector_env(config.env, **{**arguments, **changes})


def test_make_locomotion(config: Any) -> None:
    venv = make(config)
    assert venv.restorable and venv.n_envs == 3 and venv.obs_spec == {"state": (11,)}
    first = venv.reset()["state"]
    assert first.shape == (3, 2, 11)
    np.testing.assert_array_equal(make(config, seed=8, n_envs=2).reset()["state"], first[1:])


def test_make_gymnasium_engine_equals_the_batched_one(config: Any) -> None:
    pytest.importorskip("imageio", reason="gymnasium's MuJoCo environments import it")
    batched = make(config)
    config.env.engine = "gymnasium"
    processes = make(config)
    assert isinstance(processes, ProcessVectorEnv)
    np.testing.assert_array_equal(processes.reset()["state"], batched.reset()["state"])
    for chunk in some_actions(15, batched).astype(np.float32):
        assert_same_results(processes.step(chunk), batched.step(chunk))
    processes.close()


def test_make_own_environment(config: Any) -> None:
    config.env.name = COUNTER
    config.env.specific = {"length": 5}
    del config.env.wrappers.mujoco_locomotion_lowdim
    venv = make(config, obs_dim=2, action_dim=1)
    venv.reset()
    assert venv.step(np.zeros((3, 4, 1))).rewards.tolist() == [4, 4, 4]
    assert venv.step(np.zeros((3, 4, 1))).terminated.all()
    venv.close()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"obs_dim": 12}, "obs_dim=12"),
        ({"action_dim": 2}, "action_dim=2"),
        ({"act_steps": 8}, "n_action_steps=4, act_steps=8"),
    ],
)
@pytest.mark.parametrize("normalised", [True, False])
def test_make_refuses_wrong_dimensions(config: Any, changes: dict, message: str, normalised: bool) -> None:
    if not normalised:
        del config.env.wrappers.mujoco_locomotion_lowdim
    with pytest.raises(UserError, match=message) as caught:
        make(config, **changes)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("hopper-medum-v2", "did you mean hopper-medium-v2"),
        ("Pendlum-v1", "did you mean Pendulum-v1"),
        ("no_such_package:Thing-v0", "cannot import no_such_package"),
        ("xyz", "unknown"),
    ],
)
def test_make_refuses_unknown_names(config: Any, name: str, message: str) -> None:
    config.env.name = name
    with pytest.raises(UserError, match=message) as caught:
        make(config)
    assert "\n" not in str(caught.value)


def test_make_refuses_an_unknown_engine(config: Any) -> None:
    config.env.engine = "isaac"
    with pytest.raises(UserError, match="env.engine='isaac' is unknown"):
        make(config)


def test_normalization_files(tmp_path: Path) -> None:
    bounds = {"obs_min": np.zeros(2), "obs_max": np.ones(2), "action_min": np.zeros(1), "action_max": np.ones(1)}
    path = tmp_path / "normalization.npz"
    with pytest.raises(UserError, match="no such file: .*normalization.npz; make it with"):
        MinMaxNormalizer.from_npz(path)
    np.savez(path, **bounds)
    assert MinMaxNormalizer.from_npz(path, 2, 1).as_lists()["obs_max"] == [1.0, 1.0]
    np.savez(path, **{**bounds, "obs_max": np.ones(3)})
    with pytest.raises(UserError, match="differ in length"):
        MinMaxNormalizer.from_npz(path)
    np.savez(path, obs_min=np.zeros(2))
    with pytest.raises(UserError, match="lacks obs_max, action_min, action_max"):
        MinMaxNormalizer.from_npz(path)
    np.savez(path, **{**bounds, "obs_min": np.array([{}])})
    with pytest.raises(UserError, match="cannot be read"):  # a pickle is not opened
        MinMaxNormalizer.from_npz(path)
    path.write_bytes(b"PK\x03\x04 half a file")
    with pytest.raises(UserError, match="cannot be read"):
        MinMaxNormalizer.from_npz(path)


# -------------------------------------------------------------------------------------------------------------- video


def test_video_of_a_generic_environment(tmp_path: Path) -> None:
    pytest.importorskip("imageio_ffmpeg")
    venv = ProcessVectorEnv([EnvRecipe(COUNTER, render=True)], 4)
    venv.reset([{"video_path": str(tmp_path / "render" / "one.mp4")}])
    venv.step(np.zeros((1, 4, 1)))
    venv.close()
    assert (tmp_path / "render" / "one.mp4").stat().st_size > 0


@pytest.mark.skipif(not any(map(find_library, ("EGL", "OSMesa"))), reason="no library that renders off-screen")
def test_video_of_locomotion(tmp_path: Path) -> None:
    """In a helper process: software rendering next to TensorFlow would crash."""
    pytest.importorskip("imageio_ffmpeg")
    venv = hopper(2)
    path = tmp_path / "hopper.mp4"
    venv.reset([{"video_path": str(path)}, {}])
    for chunk in some_actions(3, venv):
        venv.step(chunk)
    venv.close()
    assert path.stat().st_size > 1000


def test_video_without_a_renderer_is_one_clear_line(tmp_path: Path) -> None:
    """In a program of its own: the fork server of this one may have imported MuJoCo with another setting."""
    program = (
        "import os; from diffusion_rl.envs.locomotion import LocomotionVectorEnv\n"
        "os.environ['MUJOCO_GL'] = 'nonsense'\n"
        f"LocomotionVectorEnv('hopper-medium-v2', 1).reset([{{'video_path': {str(tmp_path / 'hopper.mp4')!r}}}])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 1
    assert "UserError: cannot render here with MUJOCO_GL=nonsense" in done.stderr.splitlines()[-1]
