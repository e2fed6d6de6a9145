"""The worker processes of `ProcessVectorEnv`. Imports no TensorFlow."""

from __future__ import annotations

import contextlib
import importlib
import signal
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import gymnasium

from diffusion_rl.core.errors import UserError
from diffusion_rl.data.normalizers import MinMaxNormalizer
from diffusion_rl.envs.interface import EnvRequest
from diffusion_rl.envs.multi_step import CHUNK_KEYS, PICTURE, STATE, ImageWrapper, LowdimWrapper, MultiStep
from diffusion_rl.tasks.registry import task_named

BY_CONFIGURATION = ("furniture", "robomimic")  # simulators of which a name alone says nothing


def simulator_named(name: str) -> str:
    """Finds the module of `envs` that builds the environments of this name; unknown names are the user's own."""
    task = task_named(name)
    return task.simulator if task and task.simulator and task.simulator not in BY_CONFIGURATION else "own"


@dataclass(frozen=True)
class EnvRecipe:
    """Everything a worker needs to build its environment.

    name: a gymnasium id, with the module that registers it if it is the user's own ("my_pkg:MyEnv-v0"), or a name of
    the registry's tasks. kwargs: for its constructor. chunks: keyword arguments of MultiStep. render: able to film.
    window: shown in a window of its own.
    simulator: the module of `envs` whose `single` builds it; None: as the name says. obs_dim: what the user's own
    should show (None: whatever it shows).
    """

    name: str
    kwargs: dict[str, Any] = field(default_factory=dict)
    chunks: dict[str, Any] = field(default_factory=dict)
    normalizer: MinMaxNormalizer | None = None
    render: bool = False
    window: bool = False
    d4rl_time_limit: int | None = None
    simulator: str | None = None
    obs_dim: int | None = None

    @classmethod
    def of(cls, request: EnvRequest, simulator: str) -> EnvRecipe:
        """Returns the recipe of each environment of a request."""
        return cls(
            name=request.name,
            kwargs=dict(request.config.get("specific") or {}),
            chunks=request.chunks,
            normalizer=request.normalizer,
            render=bool(request.config.get("save_video", False)),
            d4rl_time_limit=request.time_limit,
            simulator=simulator,
            obs_dim=request.obs_dim,
        )

    @property
    def render_mode(self) -> str | None:
        """Returns the `render_mode` for gymnasium's constructors."""
        return "human" if self.window else "rgb_array" if self.render else None

    def __call__(self) -> MultiStep:
        env = importlib.import_module(f"{__package__}.{self.simulator or simulator_named(self.name)}").single(self)
        if isinstance(env.observation_space, gymnasium.spaces.Dict):
            env = ImageWrapper(env, self.normalizer, keys=[STATE], image_keys=[PICTURE])
        elif self.normalizer is not None:
            env = LowdimWrapper(env, self.normalizer)
        return MultiStep(env, **self.chunks)


class Spaces(NamedTuple):
    """observations: {entry: shape}; action_dim: A; notes: warnings for the user."""

    observations: dict[str, tuple[int, ...]]
    action_dim: int
    notes: list[str]


def spaces(env: MultiStep) -> Spaces:
    """Returns what the environment shows and takes. Raises UserError where its actions are not vectors of numbers."""
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
    """Calls a method of `env` and returns its answer.

    Keeps of a chunk's info only `CHUNK_KEYS`, since the rest may be anything, and `succeeded` where it is known.
    """
    answer = getattr(env, method)(*arguments)
    if method != "step":
        return answer
    *first, info = answer
    kept = {key: info[key] for key in CHUNK_KEYS if key in info}
    return *first, kept if env.succeeded is None else kept | {"succeeded": env.succeeded}


def serve(connection: Connection, build: Callable[[], MultiStep]) -> None:
    """Answers (method, arguments) until the other end is closed: ("ok", result), ("refused", line of a UserError) or
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
