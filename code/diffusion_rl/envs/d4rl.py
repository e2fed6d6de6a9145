"""The simulators that D4RL's data were made with: gym 0.23, d4rl and mujoco-py on MuJoCo 2.1.0.

Runs in the worker processes of `ProcessVectorEnv`; only `require` is for the main process, and imports none of them.
Installing them is what installation/d4rl.md is about.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import os
import sys
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np

from diffusion_rl.core.errors import UserError
from diffusion_rl.envs.worker import EnvRecipe
from diffusion_rl.tasks.registry import D4RL_STEPS

PACKAGES = ("gym", "mujoco_py", "d4rl")


def missing() -> str | None:
    """Says what keeps the original simulators from running here; None if nothing does."""
    for package in PACKAGES:
        if importlib.util.find_spec(package) is None:
            return f"{package} is not installed"
    folder = Path(os.environ.get("MUJOCO_PY_MUJOCO_PATH", "~/.mujoco/mujoco210")).expanduser()
    libraries = folder / "bin"
    if not (libraries / "libmujoco210.so").is_file():
        return f"{folder} does not hold MuJoCo 2.1.0 (MUJOCO_PY_MUJOCO_PATH says where it is)"
    if libraries not in map(Path, os.environ.get("LD_LIBRARY_PATH", "").split(":")):
        return f"LD_LIBRARY_PATH does not name {libraries}"
    return None


def require(name: str) -> None:
    """Raises UserError with the cure if the original simulators cannot run here, or if `name` is none of theirs."""
    lacking = missing()
    if lacking is not None:
        raise UserError(
            f"env.engine=d4rl: {lacking}; installation/d4rl.md says what to install and to set "
            "(env.engine=mujoco has the same physics and needs none of it)"
        )
    from diffusion_rl.envs import locomotion  # needs a simulator of today

    locomotion.require(name)


def single(recipe: EnvRecipe) -> OriginalEnv:
    """Builds the environment of a recipe."""
    return OriginalEnv(recipe.name, time_limit=recipe.d4rl_time_limit, **recipe.kwargs)


class OriginalEnv(gymnasium.Env):
    """One environment of D4RL behind gymnasium's interface.

    name: a D4RL name, "hopper-medium-v2" say. time_limit: D4RL's, whose expiry ends an episode as terminated with
    `TimeLimit.truncated` in the info, as gym's old interface has it; None for no limit. kwargs: for D4RL's class.
    """

    def __init__(self, name: str, time_limit: int | None = D4RL_STEPS, **kwargs: Any):
        sys.modules.setdefault("pybullet", None)  # type: ignore[arg-type] # d4rl goes without it, which greets on stdout
        with contextlib.redirect_stderr(io.StringIO()):  # every process would say what is old or not installed
            import d4rl.gym_mujoco  # noqa: F401 - registers the names
            import gym

            env = gym.make(name, **kwargs)
        if time_limit != D4RL_STEPS:
            env = env.env  # without the limit that gym.make put around it
            env = env if time_limit is None else gym.wrappers.TimeLimit(env, time_limit)
        self._env = env
        self.metadata = {"render_modes": ["rgb_array"], "render_fps": env.metadata.get("render_fps", 125)}
        self.render_mode = "rgb_array"
        self.observation_space = _box(env.observation_space)
        self.action_space = _box(env.action_space)

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        """Begins an episode; returns its observation [O]."""
        return self._env.reset(seed=seed), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, Any, bool, bool, dict]:
        """Executes an action [A]; observation [O], reward, terminated, truncated (never) and facts."""
        observation, reward, done, info = self._env.step(action)
        return observation, reward, bool(done), False, info

    def render(self) -> np.ndarray:
        """Renders a picture [Hi,Wi,3]."""
        return self._env.render(mode="rgb_array")

    def close(self) -> None:
        self._env.close()


def _box(space: Any) -> gymnasium.spaces.Box:
    return gymnasium.spaces.Box(space.low, space.high, dtype=space.dtype)
