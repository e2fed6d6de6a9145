"""The physics is MuJoCo 2.1.0's, and the batched engine is gymnasium's single environment bit for bit.

`pytest tests/test_physics.py --trajectories FILE` runs the first part on any file of the shipped one's format:
`<task>/seed<k>/{qpos, qvel, action, observation, reward, done}`, recorded on MuJoCo 2.1.0 without resets.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

gymnasium = pytest.importorskip("gymnasium")
pytest.importorskip("mujoco", reason='needs pip install -e ".[gym]"')

from diffusion_rl.envs.locomotion import (  # noqa: E402
    TASKS,
    LocomotionPhysics,
    LocomotionVectorEnv,
    known_names,
    load_model,
    single_locomotion,
    task_of,
)

SHIPPED = Path(__file__).parent / "data" / "mujoco210_trajectories.npz"
# Largest deviation allowed, and over how many steps: HalfCheetah is chaotic between any two engine versions.
# Measured with mujoco 3.4.0 and 4.0.0: see what `pytest -rP` prints.
BOUNDS = {"hopper": (1e-10, 200), "walker2d": (1e-9, 200), "halfcheetah": (1e-9, 10)}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "recorded" in metafunc.fixturenames:
        path = metafunc.config.getoption("--trajectories") or SHIPPED
        with np.load(path, allow_pickle=False) as archive:
            names = sorted({key.rsplit("/", 1)[0] for key in archive.files})
            cases = [(name, {key: archive[f"{name}/{key}"] for key in FIELDS}) for name in names]
        metafunc.parametrize("recorded", cases, ids=[name for name, _ in cases])


FIELDS = ("qpos", "qvel", "action", "observation", "reward", "done")


def test_follows_mujoco_210(recorded: tuple[str, dict[str, np.ndarray]]) -> None:
    name, trajectory = recorded
    task = name.split("/")[0]
    bound, steps = BOUNDS[task]
    physics = LocomotionPhysics(task, threads=1)
    state, warmstart = physics.state_from(trajectory["qpos"], trajectory["qvel"])
    ours = physics.step(state[None], warmstart[None], trajectory["action"][None, :steps])
    deviation = np.abs(ours.observations[0] - trajectory["observation"][:steps]).max()
    # The reward divides a difference of positions by dt = 0.008 s (Hopper, Walker2d), which scales rounding up by 125.
    reward_deviation = np.abs(ours.rewards[0] - trajectory["reward"][:steps]).max() * physics.dt
    print(f"{name}: observations {deviation:.1e}, rewards x dt {reward_deviation:.1e}, bound {bound:.0e}")
    assert deviation <= bound
    assert reward_deviation <= bound
    np.testing.assert_array_equal(ours.unhealthy[0], trajectory["done"][:steps])


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("task", TASKS)
def test_equals_the_single_environment_bit_for_bit(task: str, dtype: type) -> None:
    """Five environments, chunks of 4, resets at falls and at the time limit; gymnasium steps one at a time."""
    pytest.importorskip("imageio", reason="gymnasium's MuJoCo environments import it")
    n_envs, chunks, limit = 5, 45, 150
    name = f"{task}-medium-v2"
    venv = LocomotionVectorEnv(name, n_envs, act_steps=4, seeds=range(n_envs), d4rl_time_limit=limit, threads=2)
    actions = np.random.default_rng(1).uniform(-1.3, 1.3, (chunks, n_envs, 4, venv.action_dim)).astype(dtype)
    first = venv.reset()["state"]
    results = [venv.step(chunk) for chunk in actions]
    resets = 0
    for row in range(n_envs):
        env = single_locomotion(name, time_limit=limit)
        observation, _ = env.reset(seed=row)
        np.testing.assert_array_equal(first[row, 0], observation)
        for chunk, result in zip(actions[:, row], results, strict=True):
            rewards = []
            for action in chunk:
                observation, reward, terminated, _, info = env.step(action)
                rewards.append(reward)
                if terminated:
                    break
            assert result.rewards[row] == np.sum(rewards)
            assert result.terminated[row] == terminated
            assert result.truncated[row] == info.get("TimeLimit.truncated", False)
            np.testing.assert_array_equal(result.infos["final_observations"]["state"][row, -1], observation)
            if terminated:
                observation, _ = env.reset()
                resets += 1
            np.testing.assert_array_equal(result.observations["state"][row, -1], observation)
        env.close()
    venv.close()
    assert resets >= n_envs


def test_threads_do_not_change_the_numbers() -> None:
    results = []
    for threads in (1, 2):
        venv = LocomotionVectorEnv("walker2d-medium-v2", 7, act_steps=3, threads=threads)
        venv.reset()
        actions = np.random.default_rng(0).uniform(-1, 1, (30, 7, 3, 6))
        results.append([venv.step(chunk) for chunk in actions])
        venv.close()
    for one, two in zip(*results, strict=True):
        np.testing.assert_array_equal(one.observations["state"], two.observations["state"])
        np.testing.assert_array_equal(one.rewards, two.rewards)


def test_versions_without_the_rollout_class_give_the_same_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    actions = np.random.default_rng(0).uniform(-1, 1, (10, 3, 4, 3))
    one = LocomotionVectorEnv("hopper-medium-v2", 3, act_steps=4)
    monkeypatch.delattr("mujoco.rollout.Rollout", raising=False)
    two = LocomotionVectorEnv("hopper-medium-v2", 3, act_steps=4)
    np.testing.assert_array_equal(one.reset()["state"], two.reset()["state"])
    for chunk in actions:
        np.testing.assert_array_equal(one.step(chunk).observations["state"], two.step(chunk).observations["state"])


def test_a_subset_steps_as_in_the_whole() -> None:
    actions = np.random.default_rng(0).uniform(-1, 1, (20, 6, 4, 3))
    whole = LocomotionVectorEnv("hopper-medium-v2", 6, act_steps=4)
    halves = LocomotionVectorEnv("hopper-medium-v2", 6, act_steps=4)
    np.testing.assert_array_equal(whole.reset()["state"], halves.reset()["state"])
    for chunk in actions:
        expected = whole.step(chunk)
        for rows in (np.arange(3, 6), np.arange(3)):
            result = halves.step_subset(rows, chunk[rows])
            np.testing.assert_array_equal(result.observations["state"], expected.observations["state"][rows])
            np.testing.assert_array_equal(result.rewards, expected.rewards[rows])


def test_margins_are_halved_where_the_engine_adds_them(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for version in ("3.4.0", "3.5.0", "4.0.0"):
        monkeypatch.setattr("mujoco.__version__", version)
        model = load_model("hopper")
        found.append((model.geom_margin.max(), model.opt.tolerance))
    assert found == [(0.001, 1e-8), (0.0005, 1e-12), (0.0005, 1e-12)]


def test_names() -> None:
    assert len(known_names()) == 18
    assert task_of("halfcheetah-medium-expert-v2") == "halfcheetah"
    assert task_of("hopper-medium-v3") is None
    assert task_of("ant-medium-v2") is None
