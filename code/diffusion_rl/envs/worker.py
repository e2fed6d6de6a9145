"""What runs in the worker processes of `ProcessVectorEnv`. Imports no TensorFlow."""

from __future__ import annotations

import contextlib
import signal
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import gymnasium

from diffusion_rl.core.errors import UserError
from diffusion_rl.data.normalizers import MinMaxNormalizer
from diffusion_rl.envs import kitchen, own
from diffusion_rl.envs.d4rl import OriginalEnv
from diffusion_rl.envs.multi_step import CHUNK_KEYS, ImageWrapper, LowdimWrapper, MultiStep

LOCOMOTION_PREFIXES = ("hopper-", "walker2d-", "halfcheetah-")


@dataclass(frozen=True)
class EnvRecipe:
    """Everything a worker needs to build its environment.

    name: a gymnasium id, with the module that registers it if it is the user's own ("my_pkg:MyEnv-v0"), or a D4RL
    locomotion or kitchen name. kwargs: for its constructor. chunks: keyword arguments of MultiStep. original: step
    D4RL's own simulator instead of gymnasium's. obs_dim: what the user's own should show (None: whatever it shows).
    """

    name: str
    kwargs: dict[str, Any] = field(default_factory=dict)
    chunks: dict[str, Any] = field(default_factory=dict)
    normalizer: MinMaxNormalizer | None = None
    render: bool = False
    d4rl_time_limit: int | None = None
    original: bool = False
    obs_dim: int | None = None

    def __call__(self) -> MultiStep:
        env = self._base()
        if isinstance(env.observation_space, gymnasium.spaces.Dict):
            env = ImageWrapper(env, self.normalizer, keys=[own.STATE], image_keys=[own.PICTURE])
        elif self.normalizer is not None:
            env = LowdimWrapper(env, self.normalizer)
        return MultiStep(env, **self.chunks)

    def _base(self) -> gymnasium.Env:
        render_mode = "rgb_array" if self.render else None
        if self.original:
            return OriginalEnv(self.name, time_limit=self.d4rl_time_limit, **self.kwargs)
        if self.name.startswith(LOCOMOTION_PREFIXES):
            from diffusion_rl.envs.locomotion import single_locomotion  # needs the simulator

            return single_locomotion(self.name, time_limit=self.d4rl_time_limit, render_mode=render_mode, **self.kwargs)
        if self.name.startswith(kitchen.PREFIX):
            return kitchen.Kitchen(self.name, time_limit=self.d4rl_time_limit, render_mode=render_mode, **self.kwargs)
        return own.make_own(self.name, self.kwargs, self.render, self.obs_dim)


class Spaces(NamedTuple):
    """observations: the shape of each;  action_dim: A;  notes: what the user should be told."""

    observations: dict[str, tuple[int, ...]]
    action_dim: int
    notes: list[str]


def spaces(env: MultiStep) -> Spaces:
    """What the environment shows and takes. Raises UserError where its actions are not vectors of numbers."""
    space, action = env.env.observation_space, env.env.action_space
    shapes = space.spaces if isinstance(space, gymnasium.spaces.Dict) else {"state": space}
    if not isinstance(action, gymnasium.spaces.Box) or len(action.shape) != 1:
        raise UserError(
            f"actions must be vectors of numbers (a one-dimensional gymnasium Box), its are {action}: "
            "wrap it so that it takes them"
        )
    notes = env.env.get_wrapper_attr("notes") if env.env.has_wrapper_attr("notes") else []
    return Spaces({key: tuple(value.shape or ()) for key, value in shapes.items()}, action.shape[0], notes)


def call(env: MultiStep, method: str, arguments: tuple) -> Any:
    """What a method of `env` returns; of a chunk's info only `CHUNK_KEYS`, since the rest may be anything, and
    `succeeded` where the environment says so."""
    answer = getattr(env, method)(*arguments)
    if method != "step":
        return answer
    *first, info = answer
    kept = {key: info[key] for key in CHUNK_KEYS if key in info}
    return *first, kept if env.succeeded is None else kept | {"succeeded": env.succeeded}


def serve(connection: Connection, build: Callable[[], MultiStep]) -> None:
    """Answer (method, arguments) until the other end hangs up: ("ok", result), ("refused", line of a UserError) or
    ("error", traceback)."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle; it hangs up when it ends
    env: MultiStep | None = None
    try:
        env = build()
        connection.send(("ok", spaces(env)))
        while True:
            method, arguments = connection.recv()
            connection.send(("ok", call(env, method, arguments)))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        pass  # the parent has hung up
    except UserError as error:
        with contextlib.suppress(OSError):
            connection.send(("refused", str(error)))
    except (Exception, SystemExit):
        with contextlib.suppress(OSError):
            connection.send(("error", traceback.format_exc()))
    finally:
        if env is not None:
            env.close()
        connection.close()
