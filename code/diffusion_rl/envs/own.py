"""Environments that users register with gymnasium, made to fit this package whatever their age and shape.

Runs in worker processes; imports neither TensorFlow nor a simulator.
"""

from __future__ import annotations

import importlib
import inspect
import traceback
from collections.abc import Mapping
from typing import Any

import gymnasium
import numpy as np
from gymnasium.spaces import Box, Dict

from diffusion_rl.core.errors import UserError
from diffusion_rl.envs import processes
from diffusion_rl.envs.interface import unknown
from diffusion_rl.envs.multi_step import PICTURE, STATE
from diffusion_rl.envs.worker import EnvRecipe
from diffusion_rl.tasks.registry import tasks_of


def require(name: str) -> None:
    """Raises UserError now, rather than from a worker, if gymnasium does not know the id."""
    module, _, registered = name.rpartition(":")
    if module:
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise UserError(f"environment {name!r}: cannot import {module} ({error}); is it on PYTHONPATH?") from error
        except Exception as error:
            cause = processes.in_one_line("".join(traceback.format_exception(error)))
            raise UserError(f"environment {name!r}: importing {module} failed: {cause}") from error
    try:
        gymnasium.spec(registered)
    except gymnasium.error.Error as error:
        examples = [f"{task.name}-medium-v2" for task in tasks_of(simulator="locomotion")]
        raise unknown(registered, [*examples, *gymnasium.registry]) from error


def single(recipe: EnvRecipe) -> OwnEnv:
    """Builds the environment of a recipe. Raises UserError if it is to be filmed and cannot be."""
    rendering: dict[str, Any] = {"render_mode": recipe.render_mode} if recipe.render_mode else {}
    try:
        env = gymnasium.make(recipe.name, disable_env_checker=True, **rendering, **recipe.kwargs)
    except TypeError as error:
        if "unexpected keyword argument 'render_mode'" not in str(error):
            raise
        option = "env.render=true" if recipe.window else "env.save_video=true"
        raise UserError(f"{option}: its constructor takes no render_mode, so it cannot be seen") from error
    return OwnEnv(_with_current_interface(env), recipe.obs_dim)


def _with_current_interface(env: gymnasium.Env) -> gymnasium.Env:
    """Puts `CurrentInterface` around the user's part of an environment, below the wrappers of gymnasium."""
    outer: Any = None
    inner: Any = env
    while type(inner).__module__.startswith("gymnasium.wrappers"):
        outer, inner = inner, inner.env
    if outer is None:
        return CurrentInterface(inner)
    outer.env = CurrentInterface(inner)
    return env


class CurrentInterface(gymnasium.Wrapper):
    """Gives gymnasium's present interface to an environment that may have an older one.

    Its `reset` may take neither seed nor options and return the observation alone; its `step` may return gym's four
    values (observation, reward, done, info).
    """

    def __init__(self, env: gymnasium.Env):
        super().__init__(env)
        parameters = inspect.signature(env.reset).parameters.values()
        takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
        named = (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        names = {parameter.name for parameter in parameters if parameter.kind in named}
        self._takes = {"seed", "options"} if takes_all else names

    @property
    def takes_seed(self) -> bool:
        """Whether `reset` says what it draws from."""
        return "seed" in self._takes

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[Any, dict]:
        if seed is not None and not self.takes_seed:
            gymnasium.Env.reset(self.env.unwrapped, seed=seed)  # for one that draws from gymnasium's `np_random`
        arguments: dict[str, Any] = {"seed": seed, "options": options}
        answer: Any = self.env.reset(**{key: value for key, value in arguments.items() if key in self._takes})
        if isinstance(answer, tuple) and len(answer) == 2 and isinstance(answer[1], Mapping):
            return answer[0], dict(answer[1])
        return answer, {}

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict]:
        answer: Any = self.env.step(action)
        if not isinstance(answer, tuple) or len(answer) not in (4, 5):
            raise UserError("its step must return observation, reward, terminated, truncated and info")
        if len(answer) == 4:
            answer = *answer[:3], False, answer[3]
        return answer if answer[4] else (*answer[:4], {})


class OwnEnv(gymnasium.Wrapper):
    """Shows observations as one vector, or as {"state": vector, "rgb": picture [C,Hi,Wi]}, and rewards as numbers.

    A Dict of observations may have "state" and "rgb" (also [Hi, Wi, C]); of any other the vectors are joined in the
    space's order, if that gives `obs_dim` entries (None: whatever it gives). What `step` and `reset` return is held to
    the observation space. info["is_success"] is also known as info["success"].

    Attributes:
        notes: warnings for the user.

    Raises:
        UserError: observations that no policy of this package can take.
    """

    def __init__(self, env: gymnasium.Env, obs_dim: int | None = None):
        super().__init__(env)
        self.notes: list[str] = []
        bottom: Any = env
        while isinstance(bottom, gymnasium.Wrapper) and not isinstance(bottom, CurrentInterface):
            bottom = bottom.env
        if isinstance(bottom, CurrentInterface) and not bottom.takes_seed:
            self.notes.append("its reset takes no seed: its episodes are repeatable only if it draws from np_random")
        space = env.observation_space
        self._is_dict = isinstance(space, Dict)
        spaces = space.spaces if isinstance(space, Dict) else {STATE: space}
        self._vectors = self._chosen(spaces, obs_dim)
        size = sum(map(np.prod, self._vectors.values()))
        self.observation_space = Box(-np.inf, np.inf, (int(size),), np.float64)
        self._picture = spaces[PICTURE].shape if self._is_dict and STATE in spaces and PICTURE in spaces else None
        if self._picture is not None:
            self._picture_kind = _picture_kind(spaces[PICTURE])
            shape = _channels_first(np.broadcast_to(np.uint8(0), self._picture)).shape
            self.observation_space = Dict({PICTURE: Box(0, 255, shape, np.uint8), STATE: self.observation_space})

    def _chosen(self, spaces: Mapping[str, gymnasium.Space], obs_dim: int | None) -> dict[str, tuple[int, ...]]:
        """Returns the shapes of the entries that make the state."""
        vectors = {key: space.shape for key, space in spaces.items() if isinstance(space, Box) and len(space.shape) < 2}
        if self._is_dict and STATE not in spaces:
            _require_fit(vectors, spaces, obs_dim)
        elif STATE not in vectors:
            raise UserError(_unusable(spaces[STATE]))
        else:
            vectors = {STATE: vectors[STATE]}
        unused = [key for key in spaces if key not in (*vectors, PICTURE if STATE in spaces else "")]
        if unused:
            self.notes.append(f"of its observations {', '.join(map(str, unused))} are not used")
        return vectors

    def _observe(self, raw: Any) -> Any:
        if not self._is_dict:
            if type(raw) is np.ndarray and raw.shape == self.observation_space.shape and raw.dtype.kind == "f":
                return raw  # what most environments give, at once
            return np.atleast_1d(_numbers(raw, self._vectors[STATE], "its observation"))
        if not isinstance(raw, Mapping):
            raise UserError(f"its observation is a {type(raw).__name__}, its observation_space says a Dict")
        parts = [_numbers(raw[key], shape, f"its observation {key!r}") for key, shape in self._vectors.items()]
        state = np.concatenate([np.atleast_1d(part) for part in parts])
        if self._picture is None:
            return state
        picture = np.asarray(raw[PICTURE])
        _require_shape(picture, self._picture, f"its picture {PICTURE!r}")
        if picture.dtype.kind != self._picture_kind:
            raise UserError(f"its picture {PICTURE!r} has dtype {picture.dtype}, not what its observation_space says")
        return {PICTURE: _channels_first(picture), STATE: state}

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[Any, dict]:
        raw, info = self.env.reset(seed=seed, options=options)
        return self._observe(raw), info

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict]:
        raw, reward, terminated, truncated, info = self.env.step(action)
        if "is_success" in info:
            info = {"success": info["is_success"], **info}
        return self._observe(raw), _reward(reward), terminated, truncated, info


def _require_fit(vectors: Mapping[str, Any], spaces: Mapping[str, gymnasium.Space], obs_dim: int | None) -> None:
    """Raises UserError if the joined vectors of a Dict are none or not `obs_dim` entries."""
    listed = ", ".join(f"{key} {list(s.shape) if isinstance(s, Box) else s}" for key, s in spaces.items())
    size = sum(int(np.prod(shape)) for shape in vectors.values())
    if not vectors:
        raise UserError(f"its observations are a Dict without a vector ({listed}): add one as {STATE!r}")
    if obs_dim not in (None, size):
        raise UserError(
            f"obs_dim={obs_dim}, but its observations are a Dict ({listed}) whose vectors, joined, have {size} "
            f"entries: set obs_dim={size}, or name the vector that is meant {STATE!r}"
        )


def _picture_kind(space: Any) -> str:
    """Returns numpy's letter for the type of the pictures. Raises UserError if they are neither bytes nor in [0, 1]."""
    if not (space.dtype == np.uint8 or (space.dtype.kind == "f" and np.max(space.high) <= 1)):
        raise UserError(
            f"its picture {PICTURE!r} must be bytes (uint8) or numbers in [0, 1], its space says {space.dtype} up to "
            f"{np.max(space.high)}"
        )
    return str(space.dtype.kind)


def _unusable(space: gymnasium.Space) -> str:
    """Says why observations of this space cannot be used."""
    if not isinstance(space, Box):
        return f"observations must be arrays or a dict of arrays (gymnasium Box or Dict), its are {space}"
    shape = list(space.shape)
    if len(shape) == 3:
        return (
            f"its observations are pictures alone {shape}: a policy needs a Dict with the vector {STATE!r} beside the "
            f"picture {PICTURE!r}"
        )
    return f"observations must be vectors (a one-dimensional gymnasium Box), its have shape {shape}: flatten them"


def _channels_first(picture: np.ndarray) -> np.ndarray:
    """Turns [Hi,Wi,C] into [C,Hi,Wi]; a picture that has its channels first stays as it is."""
    last = picture.ndim == 3 and picture.shape[-1] < min(picture.shape[:2])
    return np.moveaxis(picture, -1, 0) if last else picture


def _require_shape(array: np.ndarray, shape: tuple[int, ...], what: str) -> None:
    """Raises UserError if an array has another shape than the observation space says."""
    if array.shape != shape:
        raise UserError(f"{what} has shape {list(array.shape)}, its observation_space says {list(shape)}")


def _numbers(value: Any, shape: tuple[int, ...], what: str) -> np.ndarray:
    """Returns `value` as an array of floating-point numbers. Raises UserError if it has another shape than `shape`."""
    array = np.asarray(value)
    if array.dtype.kind not in "fiub":
        raise UserError(f"{what} has dtype {array.dtype}: an array of numbers is needed")
    _require_shape(array, shape, what)
    return array if array.dtype.kind == "f" else array.astype(np.float64)


def _reward(value: Any) -> Any:
    """Returns a number, or an array that holds one, as a scalar of its own type. Raises UserError for anything else."""
    if isinstance(value, float):  # numpy's own of double precision is one, too
        return value
    array = np.asarray(value)
    if array.dtype.kind not in "fiub" or array.size != 1:
        raise UserError(f"its reward is {str(value)[:60]} ({type(value).__name__}): one number is needed")
    return array.reshape(())[()]
