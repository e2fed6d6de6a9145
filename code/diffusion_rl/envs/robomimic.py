"""robomimic's simulated tasks (Mandlekar et al. 2021, arXiv:2108.03298): lift, can, square and transport, in robosuite.

An environment is described by a JSON file (`env_meta`) as robomimic's data sets carry one; those of the four tasks are
in cfg/robomimic/env_meta, with the suffix -img for observations with pictures. This module needs neither robomimic nor
PyTorch: `activate` puts the subset in changed_robomimic/ on the import path of the process.

observation  robot<i>_eef_pos (3), robot<i>_eef_quat (4), robot<i>_gripper_qpos (2), object, and the cameras that were
    asked for, <camera>_image [3, Hi, Wi] uint8
action       per arm: change of position (3) and orientation (3) and gripper (1), in [-1, 1], at 20 Hz
reward       1 in every step in which the task is done, else 0; shaped: robosuite's own
end          none of its own: episodes last until their time limit
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import importlib.util
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np

from diffusion_rl.core.errors import UserError
from diffusion_rl.core.files import read_json
from diffusion_rl.core.places import REPOSITORY, here_or_shipped
from diffusion_rl.data.normalizers import MinMaxNormalizer
from diffusion_rl.data.sources.robomimic import IMAGE_SUFFIX, low_dim_keys
from diffusion_rl.envs import processes, room
from diffusion_rl.envs.interface import EnvRequest
from diffusion_rl.envs.multi_step import ImageWrapper, LowdimWrapper, MultiStep
from diffusion_rl.envs.vector import ProcessVectorEnv
from diffusion_rl.envs.video import Window

SUBSET = REPOSITORY / "changed_robomimic"
ROBOMIMIC = "0.3.0"
ROBOSUITE = {"1.4": "==1.4.1", "1.5": ">=1.5,<1.6"}  # generations of the simulator: what is installed for them
WRAPPERS = ("robomimic_lowdim", "robomimic_image")
FPS = 20  # actions per second, so that videos run at the speed of the simulation
_OPTIONS = {"init_state": "init_state", "render_hw": "render_hw", "render_camera_name": "camera"}  # of the wrapper

#: Parts of `object` that come last in robosuite 1.4, in this order.
_LAST_PARTS = [f"{thing}_to_robot0_eef_{part}" for thing in ("Can", "SquareNut") for part in ("pos", "quat")]
_LAST_PARTS += ["payload_in_target_bin", "trash_in_trash_bin"]

#: Memory of a process in GB, measured: with states alone, with pictures.
PROCESS_GB = {"Lift": (0.45, 0.75), "PickPlaceCan": (0.45, 0.75), "NutAssemblySquare": (0.45, 0.75)}
PROCESS_GB["TwoArmTransport"] = (0.65, 1.0)


def activate(generation: str = "1.4") -> None:
    """Puts the subset in changed_robomimic/ on the import path of this process as `robomimic`. Further calls do
    nothing.

    Args:
        generation: the robosuite that is needed, a key of `ROBOSUITE`.

    Raises:
        UserError: another robomimic is imported or installed in another version than the subset's; robosuite is missing
            or of another generation.
    """
    loaded = sys.modules.get("robomimic")
    if loaded is not None and SUBSET not in Path(str(loaded.__file__)).parents:
        raise UserError(f"another robomimic is already imported ({loaded.__file__}): start a process without it")
    if _installed("robomimic") not in (None, ROBOMIMIC):
        raise UserError(
            f"robomimic {_installed('robomimic')} is installed, {ROBOMIMIC} is needed: "
            f"pip install 'robomimic=={ROBOMIMIC}'"
        )
    _require_robosuite(generation)
    if not (SUBSET / "robomimic").is_dir():
        raise UserError(f"{SUBSET} is missing: install with pip install -e '.[robomimic]' from the repository")
    if str(SUBSET) not in sys.path:
        sys.path.insert(0, str(SUBSET))


def _installed(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _require_robosuite(generation: str) -> None:
    installed = _installed("robosuite")
    if installed is None:
        raise UserError("robosuite is not installed: pip install -e '.[robomimic]' (see installation/robomimic.md)")
    wanted = ROBOSUITE[generation]
    if installed == wanted.removeprefix("==") or (generation != "1.4" and installed.startswith(f"{generation}.")):
        return
    cure = f"pip install 'robosuite{wanted}'"
    if generation == "1.4" and installed.startswith("1.5."):
        cure += ", or take env.robosuite=1.5, where policies of 1.4 may do otherwise (see installation/robomimic.md)"
    raise UserError(f"robosuite {installed} is installed, {wanted.removeprefix('==')} is needed: {cure}")


def read_env_meta(path: str | Path) -> dict[str, Any]:
    """Reads the description of an environment. Looks for a relative path here, then in the repository.

    `robosuite` of what it returns is the generation that simulates, `described` the one that the description was made
    with, "1.4" if it does not say, whose observations and actions are meant. They are the same here.
    """
    file = here_or_shipped(path)
    if not file.is_file():
        raise UserError(f"robomimic_env_cfg_path={path}: no such file")
    meta = read_json(file)
    try:
        named = {"env_name": str(meta["env_name"]), "type": int(meta["type"]), "env_kwargs": dict(meta["env_kwargs"])}
        described = "1.5" if str(meta.get("env_version", "")).startswith("1.5") else "1.4"
        return named | {"robosuite": described, "described": described}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file}: not a robomimic env_meta file ({type(error).__name__}: {error})") from error


def _composed(env_kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the keyword arguments for robosuite 1.5, where the arm's controller is a part of a robot's.

    A description of 1.4 says how the arm is controlled and nothing else. The names of its values are changed, and its
    actions stay in the frame of the world, in which 1.4 takes them (1.5's own default is that of the robot's base).
    """
    given = dict(env_kwargs["controller_configs"])
    if "body_parts" in given:
        parts = dict(given["body_parts"])  # robosuite's own files have arms in a group, which it flattens on reading
        parts = {**parts.pop("arms", {}), **parts}
        return {**env_kwargs, "controller_configs": {**given, "body_parts": parts}}
    renamed = {"damping": "damping_ratio", "damping_limits": "damping_ratio_limits"}
    arm = {renamed.get(name, name): value for name, value in given.items()}
    frame = {"input_type": "delta" if arm.pop("control_delta", True) else "absolute", "input_ref_frame": "world"}
    parts = {"right": arm | frame | {"gripper": {"type": "GRIP"}}}
    return {**env_kwargs, "controller_configs": {"type": "BASIC", "body_parts": parts}}


def _observe_as_14(env: Any) -> None:
    """Lets an environment of robosuite 1.5 observe objects as 1.4 does: in its order, with its signs, as they are now.

    1.5 computes where the can and the nut are from the gripper before it looks where they are: from the step before.
    """
    from robosuite.utils.observables import sensor

    for name in _LAST_PARTS:
        if name in env._observables:
            env._observables[name] = env._observables.pop(name)

    @sensor(modality="object")
    def gripper_to_cube_pos(seen: Mapping[str, np.ndarray]) -> np.ndarray:
        known = "robot0_eef_pos" in seen and "cube_pos" in seen
        return seen["robot0_eef_pos"] - seen["cube_pos"] if known else np.zeros(3)

    if gripper_to_cube_pos.__name__ in env._observables:
        env.modify_observable(gripper_to_cube_pos.__name__, "sensor", gripper_to_cube_pos)


@contextlib.contextmanager
def _any_renderer() -> Iterator[None]:
    """Lets EGL take any device meanwhile where CUDA_VISIBLE_DEVICES hides all: robosuite takes its entries for EGL's
    numbers, and fails on others."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None or visible.partition(",")[0].strip().isdigit():
        yield
        return
    del os.environ["CUDA_VISIBLE_DEVICES"]
    try:
        yield
    finally:
        os.environ["CUDA_VISIBLE_DEVICES"] = visible


def make_simulator(
    meta: Mapping[str, Any],
    *,
    low_dim_keys: Sequence[str],
    image_keys: Sequence[str],
    render: bool,
    seed: int,
    reflections: bool = False,
) -> Any:
    """Makes a robomimic environment (`EnvRobosuite`).

    Args:
        meta: its description (see `read_env_meta`).
        seed: of what it draws when it is made (the size of Lift's cube).
        reflections: renders robosuite's pixels exactly, in more than twice the time.

    Raises:
        UserError: pictures cannot be rendered here.
    """
    generation = meta.get("robosuite", "1.4")
    activate(generation)
    if generation != "1.4":
        meta = {**meta, "env_kwargs": _composed(meta["env_kwargs"])}
    import robomimic.utils.env_utils as env_utils
    import robomimic.utils.obs_utils as obs_utils

    import diffusion_rl.envs.quiet_robosuite  # noqa: F401

    modalities = {"low_dim": list(low_dim_keys)} | ({"rgb": list(image_keys)} if image_keys else {})
    obs_utils.initialize_obs_modality_mapping_from_dict(modalities)
    np.random.seed(seed)
    kwargs = {} if generation == "1.4" else {"seed": seed}  # later ones draw from a generator of their own
    meta = {**meta, "env_kwargs": {**meta["env_kwargs"], **kwargs}}
    try:
        with _any_renderer():
            env = env_utils.create_env_from_metadata(
                env_meta=meta, render=False, render_offscreen=render, use_image_obs=bool(image_keys)
            )
    except (ImportError, RuntimeError) as error:
        if not (render or image_keys):
            raise
        raise UserError(
            f"cannot render here with MUJOCO_GL={os.environ.get('MUJOCO_GL', 'unset')} ({error}); set MUJOCO_GL=egl or "
            "MUJOCO_GL=osmesa and install that library (Debian: libegl1 or libosmesa6)"
        ) from error
    if generation != meta.get("described", generation):
        _observe_as_14(env.env)
    env.env.hard_reset = False  # a hard one builds the model anew: slow, and memory grows
    env.postprocess_visual_obs = False
    env.reflections = reflections
    return env


class Robomimic(gymnasium.Env):
    """A robomimic environment under gymnasium's interface.

    base: an `EnvRobosuite` (see `make_simulator`), which draws from numpy's global generator, or from its own in
    robosuite 1.5: seeding this seeds that.
    init_state: flat simulator state that every episode begins with, instead of a drawn one. camera, render_hw: of
    `render`. window: show every step in a window, through the same camera.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": FPS}
    render_mode = "rgb_array"

    def __init__(
        self,
        base: Any,
        keys: Sequence[str],
        *,
        init_state: np.ndarray | None = None,
        render_hw: Sequence[int] = (256, 256),
        camera: str = "agentview",
        window: bool = False,
    ):
        self.base = base
        self.keys = list(keys)
        self.init_state = init_state
        self.render_hw = render_hw
        self.camera = camera
        raw = self._pick(base.get_observation())
        self._shows_pictures = any(value.ndim == 3 for value in raw.values())
        self._was_reset = False
        self._window = _open_window(base.env.sim, camera) if window else None
        self.observation_space = gymnasium.spaces.Dict({key: _box(value) for key, value in raw.items()})
        self.action_space = gymnasium.spaces.Box(-1.0, 1.0, (base.action_dimension,), np.float64)

    def _pick(self, raw: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        missing = [key for key in self.keys if key not in raw]
        if missing:
            raise UserError(f"observation {missing[0]!r} does not exist: there are {', '.join(sorted(raw))}")
        return {key: _channels_first(raw[key]) for key in self.keys}

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[dict[str, np.ndarray], dict]:
        if self.init_state is None:
            if seed is not None:
                self._seed(seed)
            return self._seen(self.base.reset()), {}
        if self._shows_pictures and not self._was_reset:
            self.base.reset()  # the first pictures are right only after one
            self._was_reset = True
        return self.show(self.init_state), {}

    def generators(self) -> list[np.random.Generator]:
        """Returns what it draws from beside numpy's global generator: one of its own in robosuite 1.5."""
        own = getattr(self.base.env, "rng", None)
        return [] if own is None else [own]

    def _seed(self, seed: int) -> None:
        np.random.seed(seed)
        for own in self.generators():  # its parts hold the same one
            own.bit_generator.state = np.random.default_rng(seed).bit_generator.state

    def show(self, state: np.ndarray) -> dict[str, np.ndarray]:
        """Puts the simulation into a flat state; returns its observation."""
        return self._seen(self.base.reset_to({"states": state}))

    def step(self, action: np.ndarray) -> tuple[dict[str, np.ndarray], float, bool, bool, dict[str, Any]]:
        """Executes an action [A]; an episode never ends by itself."""
        raw, reward, _, info = self.base.step(action)
        return self._seen(raw), reward, False, False, info

    def _seen(self, raw: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        if self._window is not None:
            self._window.show()
        return self._pick(raw)

    def render(self) -> Any:
        height, width = self.render_hw
        return self.base.render(mode="rgb_array", height=height, width=width, camera_name=self.camera)

    def close(self) -> None:
        if self._window is not None:
            self._window.close()
        close = getattr(self.base, "close", None)
        if close is not None:
            close()


def _open_window(sim: Any, camera: str) -> Window:
    """Opens a window on robosuite's simulation, without the shapes that only collide."""
    model, data = sim.model._model, sim.data._data
    fixed = {"type": 2, "fixedcamid": model.camera(camera).id}  # mjCAMERA_FIXED
    return Window(model, data, fixed, hidden=[0])


def _channels_first(value: np.ndarray) -> np.ndarray:
    """Pictures as bytes come [Hi, Wi, C]."""
    return np.moveaxis(value, -1, 0) if value.dtype == np.uint8 else value


def _box(value: np.ndarray) -> gymnasium.spaces.Box:
    low, high = (0, 255) if value.dtype == np.uint8 else (-np.inf, np.inf)
    return gymnasium.spaces.Box(low, high, value.shape, value.dtype.type)


@dataclass(frozen=True)
class RobomimicRecipe:
    """Everything a worker needs to build its environment.

    meta: contents of the env_meta file. wrapper: options of the configuration's robomimic wrapper. chunks: keyword
    arguments of MultiStep. render: able to film. window: shown in a window.
    """

    meta: dict[str, Any]
    seed: int
    wrapper: dict[str, Any]
    normalizer: MinMaxNormalizer | None
    chunks: dict[str, Any]
    render: bool
    reflections: bool
    window: bool = False

    @property
    def name(self) -> str:
        """Returns the name of the task in robosuite."""
        return str(self.meta["env_name"])

    def __call__(self) -> MultiStep:
        keys, image_keys = list(self.wrapper["low_dim_keys"]), list(self.wrapper.get("image_keys") or [])
        modalities = {"low_dim_keys": keys, "image_keys": image_keys}
        base = make_simulator(self.meta, **modalities, render=self.render, seed=self.seed, reflections=self.reflections)
        options = {ours: self.wrapper[name] for name, ours in _OPTIONS.items() if self.wrapper.get(name) is not None}
        env: gymnasium.Env = Robomimic(base, [*keys, *image_keys], window=self.window, **options)
        clamp = bool(self.wrapper.get("clamp_obs"))
        common: dict[str, Any] = {"keys": keys, "clamp": clamp, "never_terminates": True}
        if image_keys:
            env = ImageWrapper(env, self.normalizer, image_keys=image_keys, **common)
        else:
            env = LowdimWrapper(env, self.normalizer, **common)
        return MultiStep(env, **self.chunks)


def env_node(task: str, pictures: bool) -> dict[str, Any]:
    """Returns the `env` node of a task with the observations of its data sets: states, or what its cameras see."""
    path = f"cfg/robomimic/env_meta/{task}{'-img' if pictures else ''}.json"
    meta = read_env_meta(path)["env_kwargs"]
    wrapper: dict[str, Any] = {"low_dim_keys": low_dim_keys(len(meta["robots"]), with_object=not pictures)}
    if pictures:
        wrapper["image_keys"] = [f"{camera}{IMAGE_SUFFIX}" for camera in meta["camera_names"]]
    return {"name": task, "robomimic_env_cfg_path": path, "wrappers": {WRAPPERS[pictures]: wrapper}}


def vector(request: EnvRequest) -> ProcessVectorEnv:
    """Builds the environments of a request, each in a process."""
    builders = recipes(request.config, request.seeds, request.normalizer, request.chunks)
    builders[0] = dataclasses.replace(builders[0], window=request.window)
    if not request.window:  # which cannot be opened in a process that was forked after robosuite was imported
        processes.preload("diffusion_rl.envs.quiet_robosuite")
    return ProcessVectorEnv(builders, request.act_steps, request.seeds, request.worker_timeout)


def recipes(
    env_cfg: Mapping[str, Any], seeds: Sequence[int], normalizer: MinMaxNormalizer | None, chunks: dict[str, Any]
) -> list[RobomimicRecipe]:
    """Returns the recipes of the environments of an `env` node, one for each seed.

    Reads `robomimic_env_cfg_path`, `robosuite` (its generation), `reward_shaping`, `save_video`, `reflections` and
    `wrappers.robomimic_lowdim` or `wrappers.robomimic_image` (`low_dim_keys`, `image_keys`, `clamp_obs`, `init_state`,
    `render_hw`, `render_camera_name`). Raises UserError if robosuite is missing or the memory will not do.
    """
    wrappers = env_cfg["wrappers"]
    wrapper = dict(next(wrappers[name] for name in WRAPPERS if name in wrappers))
    path = env_cfg.get("robomimic_env_cfg_path")
    if path is None:
        raise UserError(
            "env.robomimic_env_cfg_path is missing: name an env_meta file, as cfg/robomimic/env_meta/can.json"
        )
    meta = read_env_meta(path)
    meta["robosuite"] = _generation(env_cfg.get("robosuite"), meta["robosuite"])
    activate(meta["robosuite"])
    meta["env_kwargs"]["reward_shaping"] = bool(env_cfg.get("reward_shaping", False))
    cameras = [key.removesuffix(IMAGE_SUFFIX) for key in wrapper.get("image_keys") or []]
    if cameras:
        meta["env_kwargs"]["camera_names"] = cameras
    render, reflections = (bool(env_cfg.get(key, False)) for key in ("save_video", "reflections"))
    check_memory(meta["env_name"], len(seeds), bool(cameras) or render)
    return [RobomimicRecipe(meta, seed, wrapper, normalizer, chunks, render, reflections) for seed in seeds]


def _generation(asked: Any, described: str) -> str:
    """Returns robosuite's generation: the one that is asked for, or else the one of the description."""
    if asked is None:
        return described
    if str(asked) not in ROBOSUITE:
        raise UserError(f"env.robosuite={asked} is unknown: choose one of {', '.join(ROBOSUITE)}")
    if str(asked) < described:
        raise UserError(f"env.robosuite={asked}: the description is of {described}, whose controllers are newer")
    return str(asked)


def check_memory(env_name: str, n_envs: int, pictures: bool, available: float | None = None) -> None:
    """Raises UserError if `n_envs` processes need more GB than are `available` (default: the free memory)."""
    kind = f"{env_name} environment" + (" with pictures" if pictures else "")
    room.require_memory(n_envs, PROCESS_GB.get(env_name, (0.65, 1.0))[pictures], kind, available)
