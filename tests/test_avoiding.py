"""The avoiding task: the arm and its controller, rewards, modes, bookkeeping, recordings and home-made data."""

from __future__ import annotations

import importlib.util
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

mujoco = pytest.importorskip("mujoco", reason='needs pip install -e ".[d3il]"')
if importlib.util.find_spec("robosuite") is None:
    pytest.skip('needs pip install -e ".[d3il]"', allow_module_level=True)

from diffusion_rl.config.compose import REPOSITORY, compose  # noqa: E402
from diffusion_rl.core.errors import UserError  # noqa: E402
from diffusion_rl.data.episodes import load_episodes  # noqa: E402
from diffusion_rl.data.sources import d3il  # noqa: E402
from diffusion_rl.data.validate import validate  # noqa: E402
from diffusion_rl.envs import panda  # noqa: E402
from diffusion_rl.envs.d3il_avoiding import PENALTY, AvoidingVectorEnv  # noqa: E402
from diffusion_rl.envs.interface import VectorEnv  # noqa: E402
from diffusion_rl.envs.make import make_vector_env  # noqa: E402
from diffusion_rl.generate import avoiding as demos  # noqa: E402
from diffusion_rl.tasks import avoiding  # noqa: E402

START = np.array([0.52493, -0.27974])


@pytest.fixture(scope="module")
def physics() -> panda.PandaPhysics:
    return panda.PandaPhysics()


@pytest.fixture(scope="module")
def through_gap_5() -> np.ndarray:
    """Actions [1, T, 2] of a path through the gaps 1, 2 and 5 over the goal."""
    demonstration = demos.make("m1", 1, seed=3)[0]
    return demonstration.actions[None]


def joint_angles(n: int) -> np.ndarray:
    return np.random.default_rng(0).uniform(panda.LOWEST, panda.HIGHEST, (n, 7))


# ------------------------------------------------------------------------------------------------- arm and controller


def test_kinematics_is_mujocos(physics: panda.PandaPhysics) -> None:
    q = joint_angles(20)
    position, turn, jacobian = panda.Kinematics(physics.model)(q)
    data, tool = mujoco.MjData(physics.model), physics.model.body("tool").id
    for i in range(len(q)):
        data.qpos[:] = q[i]
        mujoco.mj_kinematics(physics.model, data)
        mujoco.mj_comPos(physics.model, data)
        linear, angular = np.zeros((3, 7)), np.zeros((3, 7))
        mujoco.mj_jacBody(physics.model, data, linear, angular, tool)
        np.testing.assert_allclose(position[i], data.xpos[tool], atol=1e-12)
        np.testing.assert_allclose(turn[i], data.xmat[tool].reshape(3, 3), atol=1e-12)
        np.testing.assert_allclose(jacobian[i], np.concatenate([linear, angular]), atol=1e-12)


def test_rotation_error_is_the_quaternions(physics: panda.PandaPhysics) -> None:
    turn = panda.Kinematics(physics.model)(panda.START + 0.2 * (joint_angles(20) - panda.START))[1]
    down = np.array([0.0, 1, 0, 0])
    for matrix, error in zip(turn, panda._rotation_error(turn), strict=True):
        quaternion = np.zeros(4)
        mujoco.mju_mat2Quat(quaternion, matrix.ravel())
        quaternion *= np.sign(quaternion @ down)
        expected = quaternion[0] * down[1:] - down[0] * quaternion[1:] - np.cross(down[1:], quaternion[1:])
        np.testing.assert_allclose(error, expected, atol=1e-9)


def test_small_eigenvalues_are_clipped_where_there_are_any() -> None:
    rng = np.random.default_rng(1)
    turns = np.linalg.qr(rng.normal(size=(4, 6, 6)))[0]
    values = rng.uniform(0.05, 4, (4, 6))
    values[2, 3], values[3, :2] = 1e-5, 1e-12
    matrices = (turns * values[:, None]) @ turns.transpose(0, 2, 1)
    right = rng.normal(size=(4, 6))
    clipped = (turns * np.clip(values, 1e-2, 1e2)[:, None]) @ turns.transpose(0, 2, 1)
    expected = np.linalg.solve(clipped, right[..., None])[..., 0]
    np.testing.assert_allclose(panda._solve_clipped(matrices, right), expected, rtol=1e-8)


def test_the_arm_reaches_a_setpoint_that_holds(physics: panda.PandaPhysics) -> None:
    np.testing.assert_allclose(physics.start.tool, START, atol=1e-5)
    arms = panda.ArmStates.empty(1)
    arms[0] = physics.start
    after = physics.move(arms, np.tile([0.56, -0.2], (1, 40, 1)))
    target = after.target[:, -1]
    np.testing.assert_allclose(panda.Kinematics(physics.model)(target)[0], [[0.56, -0.2, 0.12]], atol=1e-3)
    # The joint controller has no integral part: D3IL's recorded arm rests 3.8 mm beside its first setpoint, too.
    np.testing.assert_allclose(after.tool[0, -1], [0.56, -0.2], atol=5e-3)
    np.testing.assert_array_equal(arms.position[0], panda.START)  # the argument is as it was


def test_rows_do_not_depend_on_each_other_nor_on_how_often_one_asks(physics: panda.PandaPhysics) -> None:
    setpoints = START + np.cumsum(np.random.default_rng(2).uniform(-0.004, 0.0125, (5, 6, 2)), axis=1)
    arms = panda.ArmStates.empty(5)
    arms[np.arange(5)] = physics.start
    together = physics.move(arms, setpoints)
    alone = physics.move(arms[[3]], setpoints[[3]])
    np.testing.assert_allclose(alone.position[0], together.position[3], rtol=0, atol=1e-12)
    first = physics.move(arms, setpoints[:, :2])
    second = physics.move(first[:, -1], setpoints[:, 2:])
    for name, array in second.arrays().items():
        np.testing.assert_array_equal(array, together.arrays()[name][:, 2:], err_msg=name)


def test_an_absurd_setpoint_breaks_nothing(physics: panda.PandaPhysics) -> None:
    arms = panda.ArmStates.empty(2)
    arms[np.arange(2)] = physics.start
    after = physics.move(arms, np.tile([[[3.0, -4.0]], [[0.0, 0.0]]], (1, 8, 1)))
    assert np.isfinite(after.position).all() and np.abs(after.position).max() < 4


# ------------------------------------------------------------------------------------------------------ rows and modes


@pytest.mark.parametrize(
    ("path", "modes"),
    [
        ([(0.6, -0.1), (0.36, 0.06), (0.3, 0.27)], (1, 2, 5)),
        ([(0.4, -0.12), (0.5, 0.1), (0.4, 0.26)], (0, 3, 6)),
        ([(0.4, -0.12), (0.6, 0.1), (0.64, 0.3)], (0, 4, 7)),
        ([(0.6, -0.08), (0.4, -0.1), (0.66, 0.1), (0.7, 0.25), (0.7, 0.4)], (1, 4, 8)),  # the first time counts
        ([(0.6, -0.2), (0.6, 0.0)], (-1, -1, -1)),
    ],
)
def test_modes(path: list, modes: tuple) -> None:
    assert avoiding.modes_of(np.array(path)) == modes


def test_clearance_by_hand() -> None:
    # 0.1 beside the first obstacle (radius 0.03) with a rod of radius 0.01: 0.06 are left.
    np.testing.assert_allclose(avoiding.clearance(np.array([[0.6, -0.1]])), [0.06])


# ------------------------------------------------------------------------------------------------------ the environment


def test_observation_and_reward_are_of_the_state_in_which_an_action_begins() -> None:
    env = AvoidingVectorEnv("avoiding-m5", 1, act_steps=1)
    first = env.reset()["state"][0, 0]
    np.testing.assert_array_equal(first[:2], first[2:])
    one = env.step(np.array([[[0.01, 0.0]]])).observations["state"][0, 0]
    np.testing.assert_array_equal(one, first)
    two = env.step(np.array([[[0.0, 0.01]]])).observations["state"][0, 0]
    np.testing.assert_allclose(two[:2], first[:2] + [0.01, 0], rtol=0, atol=1e-15)
    assert 0 < two[2] - first[2] < 0.01


def rewards_along(name: str, actions: np.ndarray, n_envs: int = 1) -> tuple[AvoidingVectorEnv, np.ndarray]:
    env = AvoidingVectorEnv(name, n_envs, act_steps=1, max_episode_steps=None)
    env.reset()
    return env, np.array([env.step(np.repeat(actions[:, [t]], n_envs, 0)).rewards for t in range(actions.shape[1])])


def test_rewards_of_passing_a_gap_and_of_the_goal(through_gap_5: np.ndarray) -> None:
    stay = np.zeros((1, 15, 2))
    actions = np.concatenate([through_gap_5, stay], axis=1)
    env, rewards = rewards_along("avoiding-m5", actions)
    assert not env.collided.any()
    assert rewards[0] == 0 and rewards[-1] == 2 and sorted(set(rewards[:, 0])) == [0, 1, 2]
    assert (np.diff(rewards[:, 0]) >= 0).all()
    _, other_gap = rewards_along("avoiding-m7", actions)
    assert other_gap[-1] == 1 and sorted(set(other_gap[:, 0])) == [0, 1]


def test_a_collision_and_the_outside_are_penalised() -> None:
    towards = np.tile([-0.002, 0.01], (1, 30, 1))  # straight at the first obstacle
    back = np.tile([0.0, -0.012], (1, 10, 1))
    env, rewards = rewards_along("avoiding-m5", np.concatenate([towards, back], axis=1))
    hit = int(np.argmax(rewards[:, 0] == PENALTY))
    assert env.collided.all() and 5 < hit < 30 and (rewards[hit:] == PENALTY).all()
    aside = np.concatenate([np.tile([-0.0125, 0.0], (1, 32, 1)), np.tile([0.0125, 0.0], (1, 20, 1))], axis=1)
    env, rewards = rewards_along("avoiding-m5", aside)
    assert not env.collided.any() and rewards.min() == PENALTY and rewards[-1] == 0  # outside, and back inside


def test_chunks_are_single_steps_and_episodes_repeat(through_gap_5: np.ndarray) -> None:
    n = through_gap_5.shape[1] // 4 * 4
    actions = np.repeat(through_gap_5[:, :n], 3, axis=0)
    chunked = AvoidingVectorEnv("avoiding-m5", 3, act_steps=4, full_observations=True)
    single = AvoidingVectorEnv("avoiding-m5", 3, act_steps=1)
    for _ in range(2):
        chunked.reset()
        single.reset()
        for t in range(0, n, 4):
            result = chunked.step(actions[:, t : t + 4])
            steps = [single.step(actions[:, [t + i]]) for i in range(4)]
            frames = np.stack([step.observations["state"][:, 0] for step in steps], axis=1)
            np.testing.assert_array_equal(result.infos["full_observations"]["state"], frames)
            np.testing.assert_array_equal(result.rewards, np.sum([step.rewards for step in steps], axis=0))


def test_time_limit_within_a_chunk_with_and_without_reset() -> None:
    actions = np.full((2, 4, 2), 0.01)
    for reset in (False, True):
        env = AvoidingVectorEnv("avoiding-m6", 2, act_steps=4, max_episode_steps=6, reset_within_step=reset)
        first = env.reset()["state"]
        assert not env.step(actions).truncated.any()
        result = env.step(actions)
        assert result.truncated.all() and not result.terminated.any()
        np.testing.assert_array_equal(result.infos["executed_steps"], [2, 2])
        if reset:
            np.testing.assert_array_equal(result.observations["state"], first)
            assert (result.infos["final_observations"]["state"] != first).all()
        else:
            np.testing.assert_allclose(env._setpoints[0], first[0, 0, :2] + 6 * 0.01, atol=1e-12)


def test_saved_and_restored_bit_for_bit(through_gap_5: np.ndarray) -> None:
    env = AvoidingVectorEnv("avoiding-m5", 2, act_steps=4)
    assert isinstance(env, VectorEnv) and env.restorable
    env.reset()
    actions = np.repeat(through_gap_5[:, :32], 2, axis=0)
    for t in range(0, 16, 4):
        env.step(actions[:, t : t + 4])
    saved = env.get_state()
    going_on = [env.step(actions[:, t : t + 4]) for t in range(16, 32, 4)]
    other = AvoidingVectorEnv("avoiding-m5", 2, act_steps=4)
    other.set_state(saved)
    for t, expected in zip(range(16, 32, 4), going_on, strict=True):
        found = other.step(actions[:, t : t + 4])
        np.testing.assert_array_equal(found.observations["state"], expected.observations["state"])
        np.testing.assert_array_equal(found.rewards, expected.rewards)
    with pytest.raises(UserError, match="go on with the env settings"):
        AvoidingVectorEnv("avoiding-m5", 3).set_state(saved)


def test_made_from_the_shipped_configuration() -> None:
    config = compose("d3il/finetune/avoid_m1/ft_ppo_diffusion_mlp", ["env.n_envs=2"])
    env = make_vector_env(config.env, obs_dim=4, action_dim=2, act_steps=4, seed=0)
    try:
        observed = env.reset()["state"]
        assert observed.shape == (2, 1, 4)
        assert (np.abs(observed) < 1.1).all()  # normalised: the demonstrations begin there
        assert env.step(np.zeros((2, 4, 2))).infos["full_observations"]["state"].shape == (2, 4, 4)
    finally:
        env.close()


@pytest.mark.parametrize(
    ("changes", "message"), [({"name": "avoiding-m4"}, "avoiding-m5"), ({"render": True}, "display")]
)
def test_mistakes_get_one_line(changes: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    config = {"name": "avoiding-m5", "n_envs": 1, **changes}
    with pytest.raises(UserError, match=message):
        make_vector_env(config, obs_dim=4, action_dim=2, act_steps=4, seed=0)


def test_without_robosuite_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"\[d3il\]"):
        panda.load_model()


def test_the_visible_model_has_the_same_physics(physics: panda.PandaPhysics) -> None:
    model = panda.load_model(visible=True)
    assert model.ngeom > physics.model.ngeom
    for name in ("body_mass", "body_inertia", "body_pos", "jnt_range", "actuator_ctrlrange"):
        np.testing.assert_array_equal(getattr(model, name), getattr(physics.model, name))


# ---------------------------------------------------------------------------------------------------------- recordings


def pickled(**changes: Any) -> dict[str, Any]:
    path = np.array([[0.52, -0.28], [0.6, -0.1], [0.36, 0.08], [0.3, 0.27], [0.3, 0.41]])
    arrays = {"des_c_pos": np.c_[path, np.full(5, 0.12)], "c_pos": np.c_[path - 0.001, np.full(5, 0.12)]}
    return {"robot": {**arrays, "sim_step": np.arange(5), **changes}}


@pytest.mark.parametrize("protocol", range(2, 6))
def test_reading_a_recording(tmp_path: Path, protocol: int) -> None:
    content = pickled(fortran=np.asfortranarray(np.ones((2, 3))), big=np.arange(3, dtype=">i4"))
    (tmp_path / "env_000_00.pkl").write_bytes(pickle.dumps(content, protocol))
    if protocol == 5:  # numpy pickles with other means there; refused rather than run
        with pytest.raises(UserError, match="refused"):
            d3il.read_folder(tmp_path)
        return
    if protocol == 2:  # bytes are made by calling a codec there
        with pytest.raises(UserError, match="_codecs"):
            d3il.read_folder(tmp_path)
        return
    (demonstration,) = d3il.read_folder(tmp_path)
    np.testing.assert_array_equal(demonstration.setpoints, content["robot"]["des_c_pos"][:, :2])
    np.testing.assert_allclose(demonstration.actions[0], [0.08, 0.18])
    assert demonstration.states.shape == (4, 4) and demonstration.modes == (1, 2, 5)
    assert d3il.select([demonstration], (5, 6)) and not d3il.select([demonstration], (6,))
    assert not d3il.select([demonstration], (5,), required=(0, 2))
    loaded = d3il._load(tmp_path / "env_000_00.pkl")["robot"]
    np.testing.assert_array_equal(loaded["fortran"], np.ones((2, 3)))
    np.testing.assert_array_equal(loaded["big"], np.arange(3))


class Touch:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"not a pickle",
        b"cos\nsystem\n(S'true'\ntR.",
        pickle.dumps(np.array([print], dtype=object), 4),
        pickle.dumps(np.float64(1), 4),
        pickle.dumps({"robot": {"des_c_pos": 1, "c_pos": 2}}),
        pickle.dumps([1, 2]),
        pickle.dumps(pickled(c_pos=np.zeros((4, 3))), 4),
        pickle.dumps(pickled(), 4)[:-40],
    ],
)
def test_what_is_no_recording_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "bad.pkl").write_bytes(content)
    with pytest.raises(UserError, match="bad.pkl"):
        d3il.read_folder(tmp_path)


def test_a_hostile_recording_executes_nothing(tmp_path: Path) -> None:
    for protocol in range(6):
        (tmp_path / "bad.pkl").write_bytes(pickle.dumps(pickled(extra=Touch(tmp_path / "made")), protocol))
        with pytest.raises(UserError, match="refused"):
            d3il.read_folder(tmp_path)
    assert not (tmp_path / "made").exists()
    with pytest.raises(UserError, match="no .pkl files"):
        d3il.read_folder(tmp_path / "empty")


def test_replaying_recordings(request: pytest.FixtureRequest) -> None:
    folder = request.config.getoption("--recordings")
    if not folder:
        pytest.skip("needs --recordings=<folder of D3IL's avoiding pickles>")
    recordings = d3il.read_folder(folder)
    assert len(recordings) == 96 and len({r.modes for r in recordings}) == 24
    sizes = {
        name: sum(len(r.actions) for r in d3il.select(recordings, d3il.MODE_SETS[name])) for name in d3il.MODE_SETS
    }
    assert sizes == {"m1": 571, "m2": 622, "m3": 685}
    rows = demos.replay(recordings)
    assert np.mean([row.mean_error_mm for row in rows]) < 0.6 and max(row.mean_error_mm for row in rows) < 2.05
    assert not any(row.contact for row in rows) and all(row.last_y > avoiding.GOAL_Y for row in rows)
    assert [row.modes for row in rows] == ["-".join(map(str, r.modes)) for r in recordings]


# -------------------------------------------------------------------------------------------------------- shipped data


@pytest.mark.parametrize("name", sorted(d3il.MODE_SETS))
def test_the_shipped_data(name: str) -> None:
    folder = REPOSITORY / "data" / "d3il" / f"avoid_{name}"
    assert all(file.stat().st_size < 3_000_000 for file in folder.iterdir())
    assert (folder / "train.npz").stat().st_size < 300_000
    assert "constant" not in "\n".join(validate(folder))
    episodes = load_episodes(folder / "train.npz")
    assert len(episodes.traj_lengths) == 8 and 550 < len(episodes.states) < 700
    bounds = np.load(folder / "normalization.npz")
    raw = (episodes.states + 1) / 2 * (bounds["obs_max"] - bounds["obs_min"] + 1e-6) + bounds["obs_min"]
    paths = [
        raw[start : start + length, 2:] for start, length in zip(episodes.starts, episodes.traj_lengths, strict=True)
    ]
    ways = [avoiding.modes_of(path) for path in paths]
    assert sorted(ways) == sorted((1, 2, mode) for mode in d3il.MODE_SETS[name] for _ in range(4))
    assert min(avoiding.clearance(path).min() for path in paths) > 0.003


def test_making_demonstrations_from_the_command_line(tmp_path: Path) -> None:
    script = REPOSITORY / "script" / "dataset" / "make_avoiding_demos.py"
    command = [sys.executable, str(script), "m2", "--per-mode", "4", "--out-dir", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for name in ("train.npz", "normalization.npz"):  # the shipped ones, if made on this kind of machine
        with np.load(tmp_path / name) as made, np.load(REPOSITORY / "data" / "d3il" / "avoid_m2" / name) as shipped:
            for key in made.files:
                np.testing.assert_allclose(made[key], shipped[key], atol=2e-5, err_msg=key)
