"""Recordings of the reference's environment wrappers: reader, and scripted environments that play them back.

Imported by worker processes too. The format is described in parity_tests/goldens_env/README.md.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np

from diffusion_rl.data.normalizers import KEYS, MinMaxNormalizer
from diffusion_rl.envs.multi_step import ImageWrapper, LowdimWrapper, MultiStep

WRAPPERS = {  # keys of the reference's configurations
    "mujoco_locomotion_lowdim": "MujocoLocomotionLowdimWrapper",
    "d3il_lowdim": "D3ilLowdimWrapper",
    "robomimic_lowdim": "RobomimicLowdimWrapper",
    "robomimic_image": "RobomimicImageWrapper",
    "multi_step": "MultiStep",
}
LOW_DIM_KEYS = ["robot0_eef_pos", "robot0_eef_quat", "robot0_gripper_qpos"]
IMAGE_KEYS = ["agentview_image", "robot0_eye_in_hand_image"]


class Raised(str):
    """The reference raised; the text is its type and message."""


class Recording:
    """One recorded case."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        with np.load(path, allow_pickle=False) as archive:
            self.meta = json.loads(str(archive["meta"]))
            self.arrays = {key: archive[key] for key in archive.files if key != "meta"}

    def decode(self, value: Any) -> Any:
        """A value of the recording's JSON with its references to arrays resolved."""
        if isinstance(value, list):
            return [self.decode(item) for item in value]
        if not isinstance(value, dict):
            return value
        if "a" in value or "s" in value:
            return self.arrays[value.get("a", value.get("s"))][value["i"]].copy()
        if "d" in value or "od" in value:
            return {key: self.decode(item) for key, item in value.get("d", value.get("od")).items()}
        if "t" in value:
            return tuple(self.decode(item) for item in value["t"])
        if "e" in value:
            return Raised(": ".join(value["e"]))
        array = np.empty(len(value["o"]), dtype=object)
        array[:] = [self.decode(item) for item in value["o"]]
        return array.reshape(value["shape"])

    @property
    def calls(self) -> Iterator[tuple[str, list, dict, Any]]:
        for call in self.meta["calls"]:
            yield call["op"], self.decode(call["args"]), self.decode(call["kwargs"]), self.decode(call["ret"])

    @cached_property
    def stack(self) -> list[tuple[str, dict[str, Any]]]:
        """(class, keyword arguments) of the wrappers, innermost first."""
        vector = self.meta["vector"]
        if vector and vector["class"] == "make_async":
            wrappers = self.decode(vector["kwargs"])["wrappers"]
            return [(WRAPPERS[name], kwargs) for name, kwargs in wrappers.items()]
        return [(layer["class"], self.decode(layer["kwargs"])) for layer in self.meta["stack"]]

    @property
    def n_envs(self) -> int:
        return self.meta["vector"]["n_envs"] if self.meta["vector"] else 1

    @property
    def normalizer(self) -> MinMaxNormalizer:
        return MinMaxNormalizer(*(self.arrays[f"in/norm.{key}"] for key in KEYS))

    @property
    def time_limit(self) -> int | None:
        """The limit of gym's TimeLimit under the wrappers, where the recorded environment was registered with one."""
        return ((self.meta["vector"] or {}).get("register") or {}).get("max_episode_steps")

    def actions_received(self, env: int) -> list[np.ndarray]:
        """The actions that reached base environment `env`."""
        return [self.decode(value) for event, value in self.meta["env_log"][env] if event == "step"]


class Scripted(gymnasium.Env):
    """Plays one recorded script: step t (over all episodes) gives row t whatever the action, reset k gives row k.

    gym's old `done` is given as `terminated`; a time limit speaks through the info, as gym's old wrapper did.
    """

    def __init__(self, recording: Recording, index: int):
        self._recording = recording
        self._meta = recording.meta["envs"][index]
        prefix = f"in/env{index}."
        self._arrays = {k.removeprefix(prefix): v for k, v in recording.arrays.items() if k.startswith(prefix)}
        self._infos = recording.decode(self._meta["infos"]) if "infos" in self._meta else None
        self._time_limit = recording.time_limit
        self.t = self.k = self.elapsed = 0
        self.actions: list[np.ndarray] = []
        self.observation_space = self._space()
        samples = self._arrays.get("action_samples")
        size = samples.shape[1] if samples is not None else self._meta["action_dimension"]
        self.action_space = gymnasium.spaces.Box(-1.0, 1.0, (size,))

    def _space(self) -> gymnasium.Space:
        declared = self._meta.get("observation_space")
        if declared is not None and declared["type"] == "discrete":
            return gymnasium.spaces.Discrete(declared["n"])
        if declared is not None and declared["type"] == "box":
            return gymnasium.spaces.Box(-np.inf, np.inf, tuple(declared["shape"]))
        shapes = (
            {key: tuple(value["shape"]) for key, value in declared["spaces"].items()}
            if declared is not None
            else {key: value.shape for key, value in self._row("reset_obs", 0).items()}
        )
        return gymnasium.spaces.Dict({key: gymnasium.spaces.Box(-np.inf, np.inf, s) for key, s in shapes.items()})

    def _row(self, name: str, row: int) -> Any:
        if name in self._arrays:
            return self._arrays[name][row].copy()
        prefix = name + "."
        return {k.removeprefix(prefix): v[row].copy() for k, v in self._arrays.items() if k.startswith(prefix)}

    @property
    def n_steps(self) -> int:
        return len(self._arrays["reward"])

    @property
    def n_resets(self) -> int:
        return len(next(value for key, value in self._arrays.items() if key.startswith("reset_obs")))

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[Any, dict]:
        observation = self._row("reset_obs", self.k % self.n_resets)
        self.k += 1
        self.elapsed = 0
        return observation, {}

    def peek(self, t: int, elapsed: int) -> tuple[Any, Any, bool, dict]:
        """observation, reward, done, info of overall step t, the episode's step number `elapsed`."""
        reward, done = self._arrays["reward"][t], self._arrays["done"][t]
        reward = reward.item() if self._meta.get("reward_type", "py") == "py" else reward
        info = dict(self._infos[t]) if self._infos is not None else {}
        if self._time_limit is not None and elapsed >= self._time_limit:
            info["TimeLimit.truncated"] = not done
            done = True
        return self._row("obs", t), reward, bool(done), info

    def step(self, action: np.ndarray) -> tuple[Any, Any, bool, bool, dict]:
        if self.t == self._meta.get("raise_at"):
            raise ValueError("scripted failure")
        self.actions.append(np.array(action))
        self.elapsed += 1
        observation, reward, done, info = self.peek(self.t, self.elapsed)
        self.t += 1
        return observation, reward, done, False, info


def build(path: str | Path, index: int) -> MultiStep | gymnasium.Env:
    """Scripted environment `index` of a recording under our counterparts of the recorded wrappers."""
    recording = Recording(path)
    env: Any = Scripted(recording, index)
    for name, kwargs in recording.stack:
        env = _multi_step(env, kwargs) if name == "MultiStep" else _normalizing(env, name, kwargs, recording)
    return env


def _multi_step(env: gymnasium.Env, kwargs: dict[str, Any]) -> MultiStep:
    known = ("n_obs_steps", "max_episode_steps", "reward_agg_method", "reset_within_step")
    ours = {key: kwargs[key] for key in known if key in kwargs}
    return MultiStep(env, full_observations=kwargs.get("pass_full_observations", False), **ours)


def _normalizing(env: Any, name: str, kwargs: dict[str, Any], recording: Recording) -> gymnasium.Env:
    if name in ("MujocoLocomotionLowdimWrapper", "D3ilLowdimWrapper"):
        env.reset()  # the recorded constructors reset once, which used up the first scripted reset
        return LowdimWrapper(env, recording.normalizer, never_terminates=name.startswith("D3il"))
    normalizer = recording.normalizer if kwargs.get("normalization_path") else None
    options = {"clamp": kwargs.get("clamp_obs", False), "never_terminates": True}
    if name == "RobomimicLowdimWrapper":
        keys = kwargs.get("low_dim_keys") or [*LOW_DIM_KEYS, "object"]
        return LowdimWrapper(env, normalizer, keys=keys, **options)
    keys = kwargs.get("low_dim_keys", LOW_DIM_KEYS)
    return ImageWrapper(env, normalizer, keys=keys, image_keys=kwargs.get("image_keys", IMAGE_KEYS), **options)
