"""What runs on the machines of a cluster: some of the environments, in a process that knows no TensorFlow."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from typing import Any, NamedTuple

from diffusion_rl.envs.interface import VectorEnv
from diffusion_rl.envs.make import EnvPlan

Call = tuple[str, tuple[Any, ...]]  # method of a vector environment, arguments


class Facts(NamedTuple):
    """What the driver has to know of simulators: as of `VectorEnv`, and where they are."""

    obs_spec: dict[str, tuple[int, ...]]
    action_dim: int
    restorable: bool
    host: str
    pid: int


class Point(NamedTuple):
    """A point from which simulators can repeat what they did.

    Attributes:
        state: of `VectorEnv.get_state`.
        random: where there is no such state: what the reset draws from that comes next.
        (Neither of them: as the environments are built.)
    """

    state: Any = None
    random: Any = None


class Reply(NamedTuple):
    """The answer to a call, and the point before or after it that was asked for."""

    value: Any
    point: Point | None = None


class Simulators:
    """Steps some of the environments of a run for its driver."""

    venv: VectorEnv | None = None

    def here(self) -> None:
        """Says that the process runs."""

    def build(self, plan: EnvPlan) -> Facts:
        """Builds the environments; returns what they are."""
        self.venv = venv = plan.build()
        return Facts(venv.obs_spec, venv.action_dim, venv.restorable, socket.gethostname(), os.getpid())

    def call(self, method: str, arguments: tuple[Any, ...], keep: bool) -> Reply:
        """Calls a method of the environments.

        Args:
            keep: give the point after the call, too. Where environments cannot be restored it is that before a reset.
        """
        venv: Any = self.venv
        resets = method == "reset" and not venv.restorable
        before = Point(random=venv.get_random()) if resets else None
        value = getattr(venv, method)(*arguments)
        return Reply(value, Point(state=venv.get_state()) if keep and venv.restorable else before)

    def repeat(self, plan: EnvPlan, point: Point, calls: Sequence[Call], keep: bool) -> Reply:
        """Builds the environments, goes to a point and makes the calls again; answers as to the last of them.

        They give the same to the bit: simulators draw from nothing but what a point holds.
        """
        self.build(plan)
        venv: Any = self.venv
        if point.state is not None:
            venv.set_state(point.state)
        elif point.random is not None:
            venv.set_random(point.random)
        for method, arguments in calls[:-1]:
            getattr(venv, method)(*arguments)
        return self.call(*calls[-1], keep)
