"""The kitchen under its D4RL names, in the real simulation: observations, noise, commands, rewards, ends."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest

gymnasium_robotics = pytest.importorskip("gymnasium_robotics", reason='needs pip install -e ".[kitchen]"')

from diffusion_rl.config.compose import REPOSITORY, compose  # noqa: E402
from diffusion_rl.core.errors import UserError  # noqa: E402
from diffusion_rl.envs.kitchen import ELEMENTS, TASKS, Kitchen, goal_of  # noqa: E402
from diffusion_rl.envs.make import make_vector_env  # noqa: E402
from diffusion_rl.tasks.registry import steps_of  # noqa: E402

EPISODE_STEPS = steps_of("kitchen")

STILL = np.zeros(9)
SECONDS_OF_A_STEP = 0.08  # 40 steps of 2 ms
#: A tenth of the amplitudes in D4RL's franka_config.xml, joint by joint.
NOISE = 0.1 * np.array(
    [0.1] * 9 + [0.005] * 2 + [0.0005] * 6 + [0.005] * 3 + [0.1] * 3 + [0.005] * 3 + [0.1] * 3 + [0.005]
)


@pytest.fixture
def kitchen():
    env = Kitchen("kitchen-mixed-v0")
    yield env
    env.close()


def put_at_goal(env: Kitchen, element: str) -> None:
    where, target = ELEMENTS[element]
    env._env.data.qpos[where] = target


def test_goals_are_d4rls():
    light_slider = np.zeros(30)
    light_slider[17:20] = [-0.69, -0.05, 0.37]
    light_slider[22:] = [-0.75, -0.23, 0.75, 1.62, 0.99, 0, 0, -0.06]
    np.testing.assert_array_equal(goal_of("kitchen-complete-v0"), light_slider)
    np.testing.assert_array_equal(goal_of("kitchen-partial-v0"), light_slider)
    burner_light = light_slider.copy()
    burner_light[11:13] = [-0.88, -0.01]
    burner_light[19] = 0
    np.testing.assert_array_equal(goal_of("kitchen-mixed-v0"), burner_light)


def test_observation_is_positions_with_d4rls_noise_and_the_goal(kitchen):
    deviations = []
    for seed in range(200):
        observation, _ = kitchen.reset(seed=seed)
        assert observation.shape == kitchen.observation_space.shape == (60,)
        np.testing.assert_array_equal(observation[30:], goal_of("kitchen-mixed-v0"))
        deviations.append(observation[:30] - kitchen._env.data.qpos)
    largest = np.abs(deviations).max(axis=0)
    assert (largest <= NOISE + 1e-12).all() and (largest > 0.9 * NOISE).all()
    assert len(np.unique(deviations)) == 200 * 30


def test_every_episode_begins_at_the_same_place(kitchen):
    positions = []
    for seed in range(3):
        kitchen.reset(seed=seed)
        positions.append(kitchen._env.data.qpos.copy())
        kitchen.step(np.ones(9))
    np.testing.assert_array_equal(positions, [positions[0]] * 3)


def test_same_seed_same_trajectory(kitchen):
    actions = np.random.default_rng(0).uniform(-1, 1, (5, 9))
    trajectories = []
    for _ in range(2):
        kitchen.reset(seed=7)
        trajectories.append([kitchen.step(action)[0] for action in actions])
    np.testing.assert_array_equal(*trajectories)


def test_an_action_is_half_a_velocity_from_the_noisy_position(kitchen):
    observation, _ = kitchen.reset(seed=0)
    action = np.array([0.5, 0.2, 0.1, 1.0, -1.0, 3.0, 0.0, 0.0, 0.0])  # 3 counts as 1
    kitchen.step(action)
    expected = observation[:9] + 2 * np.clip(action, -1, 1) * SECONDS_OF_A_STEP
    np.testing.assert_allclose(kitchen._env.data.ctrl[:7], expected[:7], rtol=0, atol=1e-12)
    np.testing.assert_allclose(kitchen._env.data.ctrl[7:], np.clip(expected[7:], 0, 0.04), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", TASKS)
def test_each_subtask_is_rewarded_once_and_the_last_one_ends_the_episode(name):
    env = Kitchen(name)
    env.reset(seed=0)
    assert env.step(STILL)[1:3] == (0.0, False)
    rewards = []
    for k, element in enumerate(TASKS[name]):
        put_at_goal(env, element)
        _, reward, terminated, truncated, info = env.step(STILL)
        rewards.append(reward)
        assert (terminated, truncated, info) == (k == 3, False, {}), element
        if not terminated:
            assert env.step(STILL)[1] == 0.0
    assert rewards == [1.0] * 4
    env.reset(seed=1)
    put_at_goal(env, "microwave")
    assert env.step(STILL)[1] == 1.0  # counted anew
    env.close()


def test_other_elements_give_nothing():
    env = Kitchen("kitchen-complete-v0")
    env.reset(seed=0)
    put_at_goal(env, "bottom burner")
    assert env.step(STILL)[1] == 0.0
    env.close()


def test_the_configured_environments_run_an_episode(tmp_path: Path):
    low, high = -2 * np.ones(60), 2 * np.ones(60)
    np.savez(tmp_path / "normalization.npz", obs_min=low, obs_max=high, action_min=-np.ones(9), action_max=np.ones(9))
    config = compose(
        "gym/finetune/kitchen-partial-v0/ft_ppo_diffusion_mlp",
        [f"normalization_path={tmp_path}/normalization.npz", "env.n_envs=2"],
    )
    venv = make_vector_env(config.env, obs_dim=60, action_dim=9, act_steps=4, seed=3)
    first = venv.reset()["state"]
    assert first.shape == (2, 1, 60) and (first[0] != first[1]).any()
    np.testing.assert_allclose(first[0, 0, 30:], goal_of("kitchen-partial-v0") / 2, rtol=0, atol=1e-6)
    for chunk in range(EPISODE_STEPS // 4):
        result = venv.step(np.zeros((2, 4, 9)))
        over = chunk == EPISODE_STEPS // 4 - 1
        assert (result.terminated == over).all() and (result.truncated == over).all()  # as gym's TimeLimit in D4RL
    assert result.infos["final_observations"]["state"].shape == (2, 1, 60)
    venv.close()


def test_minaris_sets_get_d4rls_observations(tmp_path: Path):
    kitchen = gymnasium_robotics.envs.franka_kitchen.KitchenEnv(robot_noise_ratio=0.0, object_noise_ratio=0.0)
    observations = [kitchen.reset(seed=0)[0]["observation"]]
    positions = [kitchen.data.qpos.copy()]
    for _ in range(6):
        observations.append(kitchen.step(np.full(9, 0.3))[0]["observation"])
        positions.append(kitchen.data.qpos.copy())
    kitchen.close()
    with h5py.File(tmp_path / "main_data.hdf5", "w") as file:
        episode = file.create_group("episode_0")
        episode["observations/observation"] = np.array(observations)
        episode["observations/desired_goal/kettle"] = np.zeros((7, 7))
        episode["actions"] = np.full((6, 9), 0.3)
        episode["rewards"] = np.ones(6)
        episode["terminations"] = np.zeros(6, bool)
        episode["truncations"] = np.zeros(6, bool)
    command = ["script/dataset/convert.py", str(tmp_path), str(tmp_path / "out"), "--kitchen", "kitchen-mixed-v0"]
    subprocess.run([sys.executable, *command], cwd=REPOSITORY, check=True, capture_output=True)
    bounds = np.load(tmp_path / "out/normalization.npz")
    expected = np.concatenate([positions[:6], np.tile(goal_of("kitchen-mixed-v0"), (6, 1))], axis=1)
    np.testing.assert_allclose(bounds["obs_min"], expected.min(axis=0), rtol=1e-6)
    np.testing.assert_allclose(bounds["obs_max"], expected.max(axis=0), rtol=1e-6)


def test_errors_say_what_to_do(monkeypatch: pytest.MonkeyPatch):
    options = {"obs_dim": 60, "action_dim": 9, "act_steps": 1, "seed": 0}
    with pytest.raises(UserError, match="'kitchen-all-v0' is unknown: the kitchen tasks are kitchen-complete-v0"):
        make_vector_env({"name": "kitchen-all-v0", "n_envs": 1}, **options)
    monkeypatch.setitem(sys.modules, "gymnasium_robotics", None)
    with pytest.raises(UserError, match=r"pip install -e '\.\[kitchen\]' .see installation/kitchen\.md") as caught:
        make_vector_env({"name": "kitchen-mixed-v0", "n_envs": 1}, **options)
    assert "\n" not in str(caught.value) and (REPOSITORY / "installation/kitchen.md").is_file()
