"""What runs in the worker processes of `ProcessVectorEnv`. Imports no TensorFlow."""

from __future__ import annotations

import contextlib
import signal
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

import gymnasium

from diffusion_rl.core.normalizers import MinMaxNormalizer
from diffusion_rl.envs import kitchen
from diffusion_rl.envs.d4rl import OriginalEnv
from diffusion_rl.envs.multi_step import LowdimWrapper, MultiStep

LOCOMOTION_PREFIXES = ("hopper-", "walker2d-", "halfcheetah-")


@dataclass(frozen=True)
class EnvRecipe:
    """Everything a worker needs to build its environment.

    name: a gymnasium id, with the module that registers it if it is the user's own ("my_pkg:MyEnv-v0"), or a D4RL
    locomotion or kitchen name. kwargs: for its constructor. chunks: keyword arguments of MultiStep. original: step
    D4RL's own simulator instead of gymnasium's.
    """

    name: str
    kwargs: dict[str, Any] = field(default_factory=dict)
    chunks: dict[str, Any] = field(default_factory=dict)
    normalizer: MinMaxNormalizer | None = None
    render: bool = False
    d4rl_time_limit: int | None = None
    original: bool = False

    def __call__(self) -> MultiStep:
        env = self._base()
        if self.normalizer is not None:
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
        return gymnasium.make(self.name, render_mode=render_mode, disable_env_checker=True, **self.kwargs)


def spaces(env: MultiStep) -> tuple[dict[str, tuple[int, ...]], tuple[int, ...] | None]:
    """The shape of each observation, and of one action (None where actions are not vectors of numbers)."""
    space = env.env.observation_space
    shapes = space.spaces if isinstance(space, gymnasium.spaces.Dict) else {"state": space}
    action = env.env.action_space
    return (
        {key: tuple(value.shape or ()) for key, value in shapes.items()},
        tuple(action.shape) if isinstance(action, gymnasium.spaces.Box) else None,
    )


def serve(connection: Connection, build: Callable[[], MultiStep]) -> None:
    """Answer (method, arguments) with ("ok", result) or ("error", traceback) until the other end hangs up."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle; it hangs up when it ends
    env: MultiStep | None = None
    try:
        env = build()
        connection.send(("ok", spaces(env)))
        while True:
            method, arguments = connection.recv()
            connection.send(("ok", getattr(env, method)(*arguments)))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        pass  # the parent has hung up
    except Exception:
        with contextlib.suppress(OSError):
            connection.send(("error", traceback.format_exc()))
    finally:
        if env is not None:
            env.close()
        connection.close()
