"""robomimic's tasks in the real simulation, against robosuite itself; and the subset of robomimic they run on."""

from __future__ import annotations

import concurrent.futures
import contextlib
import json
import multiprocessing
import os
import subprocess
import sys
from ctypes.util import find_library
from pathlib import Path

import numpy as np
import pytest

robosuite = pytest.importorskip("robosuite", reason='needs pip install -e ".[robomimic]"')

sys.path.insert(0, str(Path(__file__).parent))

from env_goldens import LOW_DIM_KEYS, Recording, Scripted  # noqa: E402

from diffusion_rl.config.compose import REPOSITORY  # noqa: E402
from diffusion_rl.core.errors import UserError  # noqa: E402
from diffusion_rl.data.normalizers import MinMaxNormalizer  # noqa: E402
from diffusion_rl.envs import robomimic as tasks  # noqa: E402
from diffusion_rl.envs.make import make_vector_env  # noqa: E402
from diffusion_rl.envs.multi_step import LowdimWrapper  # noqa: E402

TWO_ARMS = [*LOW_DIM_KEYS, *(key.replace("robot0", "robot1") for key in LOW_DIM_KEYS)]
KEYS = {name: TWO_ARMS if name == "transport" else LOW_DIM_KEYS for name in ("lift", "can", "square", "transport")}
DIMS = {"lift": (19, 7), "can": (23, 7), "square": (23, 7), "transport": (59, 14)}
CAMERAS = {
    "lift": ["robot0_eye_in_hand_image"],
    "can": ["robot0_eye_in_hand_image"],
    "square": ["agentview_image"],
    "transport": ["shouldercamera0_image", "shouldercamera1_image"],
}


def env_cfg(task: str, pictures: bool = False, **more) -> dict:
    keys = {"low_dim_keys": KEYS[task] if pictures else [*KEYS[task], "object"]}
    wrapper = {"robomimic_image": keys | {"image_keys": CAMERAS[task]}} if pictures else {"robomimic_lowdim": keys}
    chunks = {"n_obs_steps": 1, "n_action_steps": 2, "max_episode_steps": 400, "reset_within_step": True}
    return {
        "name": task,
        "n_envs": 1,
        "robomimic_env_cfg_path": f"cfg/robomimic/env_meta/{task}{'-img' if pictures else ''}.json",
        "wrappers": wrapper | {"multi_step": chunks},
    } | more


def recipe(task: str, seed: int = 3, pictures: bool = False, **more) -> tasks.RobomimicRecipe:
    return tasks.recipes(env_cfg(task, pictures, **more), [seed], None, {})[0]


def genuine(task: str, seed: int, **changes):
    """robosuite's own environment with the arguments of the env_meta file."""
    meta = tasks.read_env_meta(f"cfg/robomimic/env_meta/{task}.json")
    np.random.seed(seed)
    env = robosuite.make(meta["env_name"], **meta["env_kwargs"] | changes)
    env.hard_reset = False
    return env


def rendering(function, *args):
    """Call in a process of its own: software rendering next to TensorFlow crashes. Skips where no library can."""
    try:
        with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            return pool.submit(function, *args).result()
    except UserError as error:
        if "MUJOCO_GL" not in str(error) or any(map(find_library, ("EGL", "OSMesa"))):
            raise
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def lift():
    env = recipe("lift")()
    yield env
    env.close()


# Against robosuite


@pytest.mark.parametrize(
    "task, shaped",
    [
        ("can", True),
        *(pytest.param(task, False, marks=pytest.mark.slow) for task in ("lift", "square", "transport")),
    ],
)
def test_200_random_steps_equal_robosuites_bit_for_bit(task, shaped):
    """robosuite has no shaped reward for transport."""
    ours, theirs = recipe(task, reward_shaping=shaped)(), genuine(task, 3, reward_shaping=shaped)
    keys = [*KEYS[task], "object-state"]
    observed = ours.reset(seed=11)["state"][0]
    np.random.seed(11)
    raw = theirs.reset()
    assert observed.shape == (DIMS[task][0],)
    actions = np.random.default_rng(0).uniform(-1, 1, (200, DIMS[task][1]))
    for step, action in enumerate(actions):
        np.testing.assert_array_equal(observed, np.concatenate([raw[key] for key in keys]), f"step {step}", strict=True)
        observations, reward, terminated, truncated, _ = ours.step(action)
        observed = observations["state"][0]
        raw, expected, _, _ = theirs.step(action)
        assert reward == expected and not terminated and not truncated, step
        base = ours.env.env.base
        assert base.is_success() == {"task": theirs._check_success()}
    assert (reward > 0) == shaped
    ours.close()
    theirs.close()


# The quick step against robosuite's own, in one process


def simulators(task: str, **changes):
    """A quick simulator and one with robosuite's own step, drawn alike."""
    meta = tasks.read_env_meta(f"cfg/robomimic/env_meta/{task}.json")
    meta["env_kwargs"] = meta["env_kwargs"] | changes
    made = []
    for _ in range(2):
        np.random.seed(3)
        made.append(tasks.make_simulator(meta, low_dim_keys=["object"], image_keys=[], render=False, seed=3))
    made[1]._quick = contextlib.nullcontext()
    return made


def inside(env) -> dict[str, np.ndarray]:
    """What MuJoCo, the robots and the observables of robosuite's `env` hold."""
    data = env.sim.data._data
    names = "time qpos qvel qacc qacc_warmstart ctrl sensordata qM qfrc_bias site_xpos cam_xpos cfrc_int efc_force"
    held = {name: np.array(getattr(data, name)) for name in names.split()}
    for i, robot in enumerate(env.robots):
        held |= {f"{i} {name}": np.array(value) for name, value in vars(robot.controller).items() if numeric(value)}
        buffers = {name: buffer for name, buffer in vars(robot).items() if name.startswith("recent_")}
        held |= {f"{i} {name}": np.stack([b.last, b.current]) for name, b in buffers.items() if hasattr(b, "last")}
        held[f"{i} velocities"] = robot.recent_ee_vel_buffer.buf.copy()
        held |= {f"{i} torques": np.array(robot.torques), f"{i} fingers": np.array(robot.gripper.current_action)}
    for name, observable in env._observables.items():
        held[name] = np.array(observable._current_observed_value)
        held[f"{name}: clock"] = np.array([observable._time_since_last_sample, observable._sampled])
    return held


def numeric(value) -> bool:
    return isinstance(value, np.ndarray | float | int)


def compare(task: str, steps: int, **changes) -> set[str]:
    """The kinds of its arms. Steps are random, or long the same, so that arms reach their limits and touch things."""
    quick, own = envs = simulators(task, **changes)
    rng = np.random.default_rng(0)
    actions = np.repeat(rng.uniform(-1, 1, (steps, quick.action_dimension)), 2, axis=0)[:steps]
    actions[steps // 4 : steps // 2] = actions[0]
    for step, action in enumerate(actions):
        if step % 60 == 0:
            for env in envs:
                np.random.seed(step)
                env.reset()
        (seen, reward, *_), (expected, owns_reward, *_) = (env.step(action) for env in envs)
        assert reward == owns_reward and quick.is_success() == own.is_success()
        states = inside(own.env)
        for name, value in inside(quick.env).items():
            np.testing.assert_array_equal(value, states[name], f"step {step}: {name}", strict=True)
        assert seen.keys() == expected.keys()
        for name, value in seen.items():
            np.testing.assert_array_equal(value, expected[name], f"step {step}: {name}", strict=True)
    kinds = {type(arm).__name__ for arm in quick._quick.arms}
    for env in envs:
        env.close()
    return kinds


@pytest.mark.parametrize(
    "task", ["lift", *(pytest.param(task, marks=pytest.mark.slow) for task in ("can", "square", "transport"))]
)
def test_the_quick_step_leaves_everything_as_robosuites_does(task):
    assert compare(task, 120 if task == "lift" else 300) == {"_PlainArm"}


FIXED = {"input_max": 1, "input_min": -1, "output_max": 0.05, "output_min": -0.05, "interpolation": None}


@pytest.mark.parametrize(
    "changes, kind",
    [
        ({"controller_configs": FIXED | {"type": "JOINT_POSITION"}}, "_Arm"),
        (
            {"controller_configs": FIXED | {"type": "OSC_POSITION", "interpolation": "linear", "ramp_ratio": 0.2}},
            "_Arm",
        ),
        ({"controller_configs": FIXED | {"type": "OSC_POSITION"}}, "_PlainArm"),
        ({"controller_configs": FIXED | {"type": "OSC_POSE", "impedance_mode": "variable"}}, "_PlainArm"),
        ({"robots": ["UR5e"], "gripper_types": "PandaGripper"}, "_PlainArm"),  # of six joints
        ({"robots": ["UR5e"]}, "_Arm"),
    ],
    ids=["joints", "interpolated", "position", "variable", "UR5e", "other fingers"],
)
def test_the_quick_step_does_so_with_other_controllers_arms_and_grippers(changes, kind):
    assert compare("lift", 70, **changes) == {kind}


def test_the_quick_step_reads_observables_when_they_are_due():
    """Not all in an action's last substep, as by default."""
    quick, own = envs = simulators("lift")
    for env in envs:
        np.random.seed(0)
        env.reset()
        env.env.modify_observable("cube_pos", "sampling_rate", 60)
        env.env.modify_observable("cube_quat", "delayer", lambda: 0.017)
        env.env.modify_observable("robot0_eef_pos", "enabled", False)
        env.env.modify_observable(
            "robot0_joint_pos", "filter", lambda value, seen=[0]: seen.append(0) or value + len(seen)
        )
    for step in range(20):
        expected = own.step(np.full(7, 0.2))[0]
        for name, value in quick.step(np.full(7, 0.2))[0].items():
            np.testing.assert_array_equal(value, expected[name], f"step {step}: {name}", strict=True)
        states = inside(own.env)
        for name, value in inside(quick.env).items():
            np.testing.assert_array_equal(value, states[name], f"step {step}: {name}", strict=True)
    for env in envs:
        env.close()


def test_contacts_by_number_are_robosuites_by_name():
    env = simulators("can")[0]
    env.reset()
    from robomimic.envs.quick_step import check_contact
    from robosuite.utils import sim_utils

    for _ in range(10):
        env.step(np.array([0, 0, -1, 0, 0, 0, 1.0]))
    simulator = env.env
    names = [name for name in simulator.sim.model.geom_names if name is not None]
    gripper, can = simulator.robots[0].gripper, simulator.objects[simulator.object_id]
    pairs = [(name, None) for name in names] + [(can, names), (can, gripper), (gripper, None), (names[:9], names[9:])]
    pairs += [("missing", None), (can.contact_geoms, "missing")]
    answers = [check_contact(simulator.sim, *pair) for pair in pairs]
    assert answers == [sim_utils.check_contact(simulator.sim, *pair) for pair in pairs]
    assert simulator.sim.data.ncon and True in answers and False in answers
    assert sim_utils.check_contact is not check_contact
    env.close()


# Rewards and pictures


def test_success_is_rewarded_in_every_step_and_ends_nothing(lift):
    lift.reset(seed=0)
    simulator = lift.env.env.base.env
    joint = simulator.cube.joints[0]
    lifted = simulator.sim.data.get_joint_qpos(joint).copy()
    lifted[2] += 0.2
    simulator.sim.data.set_joint_qpos(joint, lifted)
    _, reward, terminated, truncated, _ = lift.step(np.zeros((2, 7)))
    assert reward == 2.0 and not terminated and not truncated


def pictures_of(env, action: np.ndarray, reflections: bool) -> list[np.ndarray]:
    """Of an episode's first steps [3,C,Hi,Wi]."""
    env.env.env.base.reflections = reflections
    return [env.reset(seed=5)["rgb"][0], *(env.step(action[None])[0]["rgb"][0] for _ in range(2))]


@pytest.mark.parametrize("task", ["lift", "square", pytest.param("transport", marks=pytest.mark.slow)])
def test_pictures_with_reflections_are_robosuites_and_those_without_are_close(task):
    rendering(compare_pictures, task)


def compare_pictures(task: str) -> None:
    action = np.full(DIMS[task][1], 0.3)
    env = recipe(task, pictures=True, reflections=True)()
    exact, fast = (pictures_of(env, action, reflections) for reflections in (True, False))
    env.close()  # robosuite renders rightly for one environment at a time only
    meta = tasks.read_env_meta(f"cfg/robomimic/env_meta/{task}-img.json")
    np.random.seed(3)
    theirs = robosuite.make(meta["env_name"], **meta["env_kwargs"])
    theirs.hard_reset = False
    np.random.seed(5)
    raw = theirs.reset()
    for with_them, without in zip(exact, fast, strict=True):
        expected = np.concatenate([np.moveaxis(raw[camera][::-1], -1, 0) for camera in CAMERAS[task]])
        assert expected.shape == (3 * len(CAMERAS[task]), 96, 96) and expected.std() > 20
        np.testing.assert_array_equal(with_them, expected, strict=True)
        difference = np.abs(without.astype(int) - expected)
        assert difference.mean() < 1 and difference.max() < 40
        raw, *_ = theirs.step(action)
    theirs.close()


# Vector environments


def test_processes_give_the_same_numbers_normalised(tmp_path):
    path = tmp_path / "normalization.npz"
    rng = np.random.default_rng(0)
    bounds = {"obs_min": rng.uniform(-1, 0, 19), "obs_max": rng.uniform(0.1, 1, 19)}
    bounds |= {"action_min": rng.uniform(-1, -0.5, 7), "action_max": rng.uniform(0.5, 1, 7)}
    np.savez(path, **bounds)
    cfg = env_cfg("lift", n_envs=2)
    cfg["wrappers"]["robomimic_lowdim"]["normalization_path"] = str(path)
    venv = make_vector_env(cfg, obs_dim=19, action_dim=7, act_steps=2, seed=7)
    bare, normalizer = recipe("lift", seed=8)(), MinMaxNormalizer(**bounds)
    actions = rng.uniform(-1, 1, (3, 2, 2, 7))
    try:
        state = venv.reset()["state"]
        np.testing.assert_array_equal(state[1, 0], normalizer.normalize_obs(bare.reset(seed=8)["state"][0]))
        for chunk in actions:
            result = venv.step(chunk)
            expected = bare.step(normalizer.unnormalize_action(chunk[1]))[0]["state"][0]
            np.testing.assert_array_equal(result.observations["state"][1, 0], normalizer.normalize_obs(expected))
        assert not np.array_equal(result.observations["state"][0], result.observations["state"][1])
    finally:
        venv.close()
        bare.close()


def film(path: str) -> None:
    env = recipe("lift", save_video=True)()
    env.reset(seed=1, options={"video_path": path})
    env.step(np.zeros((12, 7)))
    env.reset()
    env.close()


def test_an_episode_is_filmed(tmp_path):
    imageio = pytest.importorskip("imageio")
    path = tmp_path / "film.mp4"
    rendering(film, str(path))
    frames = imageio.mimread(path, memtest=False)
    assert len(frames) == 12 and frames[0].shape == (256, 256, 3) and frames[0].std() > 20


def test_workers_do_not_import_tensorflow():
    program = (
        f"import sys; from diffusion_rl.envs import robomimic; cfg = {env_cfg('lift')}; "
        "env = robomimic.recipes(cfg, [0], None, {})[0](); env.reset(); "
        "print(sorted({'tensorflow', 'torch', 'mujoco_py', 'pynput'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr
    assert not done.stderr, "robosuite's warnings"


# What the recordings of the reference's wrappers have on initial states (the rest is in test_env_goldens.py)


class ScriptedBase:
    """The robomimic side of a recording: plays its script, notes what was asked."""

    def __init__(self, recording: Recording):
        self.script, self.log, self.action_dimension = Scripted(recording, 0), [], 7
        recording_first = self.script._row("reset_obs", 0)
        self.get_observation = lambda: recording_first

    def reset(self):
        self.log.append("reset")
        return self.script.reset()[0]

    def reset_to(self, state):
        self.log.append(("reset_to", state["states"]))
        return self.script.reset()[0]

    def step(self, action):
        observation, reward, _, _, info = self.script.step(action)
        return observation, reward, False, info


@pytest.mark.parametrize("pictures", [False, True])
def test_initial_states(pictures):
    name = "env_roboimg_init_state" if pictures else "env_robolow_init_video"
    path = REPOSITORY / "parity_tests" / "goldens_env" / f"{name}.npz"
    recording = Recording(path)
    state = recording.arrays["in/kwargs.init_state"][0]
    base = ScriptedBase(recording)
    keys = ["robot0_eef_pos", "agentview_image"] if pictures else [*LOW_DIM_KEYS, "object"]
    env = tasks.Robomimic(base, keys, init_state=state)
    wrapped = env if pictures else LowdimWrapper(env, recording.normalizer, keys=keys, clamp=True)
    for op, args, _, recorded in recording.calls:
        if op == "build":
            continue
        seen = wrapped.reset(seed=4)[0] if op == "reset" else wrapped.step(*args)[0]
        if not pictures:
            expected = recorded if op == "reset" else recorded[0]
            np.testing.assert_array_equal(seen["state"].astype(expected["state"].dtype), expected["state"])
    resets = [entry for entry in base.log if entry != "reset"]
    assert base.log[:1] == ["reset"] if pictures else base.log == resets, "one reset before the first picture"
    assert len(base.log) - len(resets) == pictures and all(np.array_equal(states, state) for _, states in resets)


# Mistakes and memory


def test_memory_is_counted_before_processes_start():
    tasks.check_memory("Lift", 4, False, available=2.0)
    with pytest.raises(UserError, match=r"env.n_envs=50: each NutAssemblySquare environment with pictures takes about"):
        tasks.check_memory("NutAssemblySquare", 50, True, available=20.0)
    with pytest.raises(UserError, match="set env.n_envs=3 or less"):
        tasks.check_memory("TwoArmTransport", 9, True, available=3.5)


def test_another_version_of_robomimic_is_named(monkeypatch):
    versions = {"robomimic": "0.2.0", "robosuite": "1.4.1"}
    monkeypatch.setattr("importlib.metadata.version", versions.__getitem__)
    with pytest.raises(UserError, match="robomimic 0.2.0 is installed, 0.3.0 is needed"):
        tasks.activate()
    versions |= {"robomimic": "0.3.0", "robosuite": "1.5.2"}
    with pytest.raises(UserError, match=r"robosuite 1.5.2 is installed, 1.4.1 is needed: .*env.robosuite=1.5"):
        tasks.activate()
    tasks.activate("1.5")
    versions |= {"robosuite": "1.4.1"}
    with pytest.raises(UserError, match=r"robosuite 1.4.1 is installed, >=1.5,<1.6 is needed: pip install"):
        tasks.activate("1.5")


@pytest.mark.parametrize("visible", ["", "-1", "GPU-8932", "1,0", None])
def test_hidden_gpus_do_not_hide_the_renderer(visible, monkeypatch):
    """robosuite would fail with "invalid literal for int()"; what is said comes back."""
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    with tasks._any_renderer():
        assert os.environ.get("CUDA_VISIBLE_DEVICES") == (visible if visible == "1,0" else None)
    assert os.environ.get("CUDA_VISIBLE_DEVICES") == visible


def test_robosuite_s_generation_is_the_description_s_or_asked_for(tmp_path):
    meta = json.loads((REPOSITORY / "cfg/robomimic/env_meta/lift.json").read_text())
    assert tasks.read_env_meta("cfg/robomimic/env_meta/lift.json")["robosuite"] == "1.4"
    file = tmp_path / "newer.json"
    file.write_text(json.dumps(meta | {"env_version": "1.5.1"}))
    with pytest.raises(UserError, match="robosuite 1.4.1 is installed, >=1.5,<1.6 is needed"):
        recipe("lift", robomimic_env_cfg_path=str(file))
    with pytest.raises(UserError, match="env.robosuite=1.4: the description is of 1.5"):
        recipe("lift", robomimic_env_cfg_path=str(file), robosuite=1.4)
    with pytest.raises(UserError, match="env.robosuite=1.6 is unknown: choose one of 1.4, 1.5"):
        recipe("lift", robosuite=1.6)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"robomimic_env_cfg_path": "nowhere.json"}, "nowhere.json: no such file"),
        ({"robomimic_env_cfg_path": "setup.py"}, "is no JSON"),
        ({"robomimic_env_cfg_path": None}, "env.robomimic_env_cfg_path is missing"),
    ],
)
def test_mistakes(changes, message):
    with pytest.raises(UserError, match=message):
        recipe("lift", **changes)


def test_an_unknown_observation_is_named(lift):
    with pytest.raises(UserError, match="observation 'robot7_eef_pos' does not exist: there are object, robot0_"):
        tasks.Robomimic(lift.env.env.base, ["object", "robot7_eef_pos"])


# The subset of robomimic


def test_subset_of_robomimic():
    tasks.activate()
    import robomimic.utils.env_utils as env_utils
    import robomimic.utils.obs_utils as obs_utils
    import robomimic.utils.tensor_utils as tensor_utils

    meta = tasks.read_env_meta("cfg/robomimic/env_meta/lift.json")
    assert env_utils.check_env_type(1, meta) and env_utils.get_env_type(env_type=2) == 2
    with pytest.raises(NotImplementedError, match="type 2"):
        env_utils.get_env_class(env_type=2)
    obs_utils.initialize_obs_modality_mapping_from_dict({"low_dim": ["object"], "rgb": ["agentview_image"]})
    assert obs_utils.key_is_obs_modality("object", "low_dim")
    with pytest.raises(KeyError, match="has no modality"):
        obs_utils.key_is_obs_modality("other", "rgb")
    image = np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3)
    processed = obs_utils.process_obs_dict({"agentview_image": image, "object": np.ones(2)})
    assert processed["agentview_image"].shape == (3, 2, 3) and processed["agentview_image"].dtype == np.float32
    np.testing.assert_array_equal(processed["agentview_image"], np.moveaxis(image / np.float32(255), -1, 0))
    np.testing.assert_array_equal(obs_utils.unprocess_obs_dict(processed)["agentview_image"], image)
    nested = {"a": [np.zeros((2, 5))], "b": (np.ones((2, 5, 3)), 7)}
    assert tensor_utils.get_shape(tensor_utils.to_batch(nested)) == {"a": [(1, 2, 5)], "b": ((1, 2, 5, 3), 7)}
    assert tensor_utils.get_shape(tensor_utils.index_at_time(nested, [4, 0])) == {"a": [(2,)], "b": ((2, 3), 7)}
    assert tensor_utils.get_shape(tensor_utils.join_dimensions(nested, 0, 1)) == {"a": [(10,)], "b": ((10, 3), 7)}


def test_a_state_can_be_saved_and_gone_back_to(lift):
    lift.reset(seed=2)
    base = lift.env.env.base
    saved = base.get_state()
    before = base.get_observation()
    for _ in range(5):
        base.step(np.full(7, 0.5))
    after = base.reset_to({"states": saved["states"]})
    np.testing.assert_array_equal(after["object"], before["object"])
