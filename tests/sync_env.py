"""Environments of `MultiStepVectorEnv` in this process, for tests."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from diffusion_rl.core.errors import UserError
from diffusion_rl.envs import worker
from diffusion_rl.envs.multi_step import MultiStep
from diffusion_rl.envs.vector import MultiStepVectorEnv


class _LocalLane:
    """An environment in this process; it works while being asked for the answer."""

    def __init__(self, build: Callable[[], MultiStep]):
        self._build = build
        self._env: MultiStep | None = None
        self._next: Callable[[], Any] = lambda: worker.spaces(self._made())

    def _made(self) -> MultiStep:
        if self._env is None:
            self._env = self._build()
        return self._env

    def send(self, method: str, arguments: tuple) -> None:
        self._next = lambda: worker.call(self._made(), method, arguments)

    def receive(self) -> tuple[str, Any]:
        try:
            return "ok", self._next()
        except UserError as error:
            return "refused", str(error)

    def exit_code(self) -> int | None:
        return None

    def hang_up(self) -> None:
        if self._env is not None:
            self._env.close()

    def wait(self, seconds: float) -> None:
        pass


class SyncVectorEnv(MultiStepVectorEnv):
    """All environments in this process, one after the other; errors come unchanged but for a UserError, which names the
    environment."""

    def _open(self, builders: Sequence[Callable[[], MultiStep]]) -> None:
        self._lanes = []
        for build in builders:
            self._lanes.append(_LocalLane(build))
