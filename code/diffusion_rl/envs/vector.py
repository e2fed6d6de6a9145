"""Environments of one simulator each, stepped together here or in processes of their own.

Shape letters: E environments, Ta actions of a chunk, To history.
"""

from __future__ import annotations

import abc
import logging
import select
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from diffusion_rl.core.errors import UserError
from diffusion_rl.envs import processes, room, worker
from diffusion_rl.envs.interface import (
    WORKER_TIMEOUT,
    Observations,
    SimulatorDied,
    StepResult,
    Unrestorable,
    require_one_each,
)
from diffusion_rl.envs.multi_step import MultiStep

log = logging.getLogger(__name__)

CLOSING_SECONDS = 5.0  # that all processes together may take to end


class MultiStepVectorEnv(Unrestorable, abc.ABC):
    """Steps E `MultiStep` environments, each at the other end of a lane: a process, or an object in this process.

    builders[i] makes environment i. Subclasses say what a lane is.
    """

    def __init__(self, builders: Sequence[Callable[[], MultiStep]], act_steps: int, seeds: Sequence[int] | None = None):
        self.n_envs = len(builders)
        self.act_steps = act_steps
        self._names = [str(getattr(build, "name", "")) for build in builders]
        self._seeds: list[int | None] = [None] * self.n_envs
        self._says_success = False
        self._lanes: list[Any] = []  # like `_ProcessLane`
        try:
            self._open(builders)
            answers = [self._receive(i) for i in range(self.n_envs)]
        except BaseException:
            self.close()
            raise
        self.obs_spec, self.action_dim, notes = answers[0]
        for note in notes:
            log.warning("environment %s: %s", self._names[0], note)
        if seeds is not None:
            self.seed(seeds)

    @abc.abstractmethod
    def _open(self, builders: Sequence[Callable[[], MultiStep]]) -> None:
        """Makes the lanes of all environments."""

    def seed(self, seeds: Sequence[int]) -> None:
        require_one_each("seeds", seeds, self.n_envs)
        self._seeds = list(seeds)

    def reset(self, options: Sequence[dict[str, Any]] | None = None) -> Observations:
        options = [{}] * self.n_envs if options is None else options
        require_one_each("options", options, self.n_envs)
        answers = self._call("reset", [(seed, dict(option)) for seed, option in zip(self._seeds, options, strict=True)])
        self._seeds = [None] * self.n_envs  # the next reset goes on with the environments' own random streams
        return _stack(answers)

    def step(self, actions: np.ndarray) -> StepResult:
        """Executes chunks [E,Ta,A] in all processes."""
        actions = np.asarray(actions)
        if actions.ndim != 3 or actions.shape[::2] != (self.n_envs, self.action_dim):
            raise ValueError(f"actions have shape {actions.shape}, expected ({self.n_envs}, Ta, {self.action_dim})")
        answers = self._call("step", [(chunk,) for chunk in actions])
        observations, rewards, terminated, truncated, infos = zip(*answers, strict=True)
        merged = _merge_infos(observations, infos, actions.shape[1])
        if self._says_success:  # some speak of it only when it happens
            merged.setdefault("success", np.zeros(self.n_envs, bool))
        self._says_success = "success" in merged
        return StepResult(
            _stack(observations),
            np.array(rewards, dtype=np.float64),
            np.array(terminated, dtype=bool),
            np.array(truncated, dtype=bool),
            merged,
        )

    def get_random(self) -> Any:
        """Returns what the next resets draw from; with it, their episodes can be repeated."""
        return {"seeds": list(self._seeds), "states": self._call("get_random", [()] * self.n_envs)}

    def set_random(self, random: Any) -> None:
        """Takes back what `get_random` returned."""
        self._call("set_random", [(state,) for state in random["states"]])
        self._seeds = list(random["seeds"])

    def _call(self, method: str, arguments: Sequence[tuple]) -> list[Any]:
        for i, lane in enumerate(self._lanes):
            try:
                lane.send(method, arguments[i])
            except OSError:  # it died before; receiving says why
                continue
        return [self._receive(i) for i in range(self.n_envs)]

    def _receive(self, index: int) -> Any:
        name = self._names[index]
        try:
            status, value = self._lanes[index].receive()
        except TimeoutError as silence:
            self._lanes[index].wait(0)
            self.close()
            raise SimulatorDied(f"environment {index} ({name}) stands still: {silence}") from None
        except (EOFError, OSError):
            code = self._lanes[index].exit_code()
            self.close()
            cause = f"killed by signal {-code}" if code is not None and code < 0 else f"exit code {code}"
            hint = " (out of memory?)" if code == -9 else ""
            line = f"environment {index} died: its process ended without a word, {cause}{hint} [{name}]"
            raise SimulatorDied(line) from None
        if status == "refused":
            self.close()
            raise UserError(f"environment {index} ({name}): {value}")
        if status == "error":
            self.close()
            line = f"environment {index} failed: {processes.in_one_line(value, name)}"
            raise UserError(line) from RuntimeError(f"in its process:\n{value}")
        return value

    def close(self) -> None:
        lanes, self._lanes = self._lanes, []
        for lane in lanes:
            lane.hang_up()
        deadline = time.monotonic() + CLOSING_SECONDS
        for lane in lanes:
            lane.wait(max(0.0, deadline - time.monotonic()))


class _ProcessLane:
    """Talks to an environment in a process of its own, which may take `timeout` seconds to answer."""

    def __init__(self, build: Callable[[], MultiStep], timeout: float):
        self._process, self._connection = processes.start(worker.serve, build)
        self._timeout, self._asked = timeout, "its start"
        self._poll = select.poll()  # multiprocessing's own way of waiting takes ten times as long
        self._poll.register(self._connection.fileno(), select.POLLIN)

    def send(self, method: str, arguments: tuple) -> None:
        """Asks for a method of the environment."""
        self._asked = method
        self._connection.send((method, arguments))

    def receive(self) -> tuple[str, Any]:
        """Returns ("ok", result), ("refused", line) or ("error", traceback). Raises TimeoutError if that takes too
        long."""
        if not self._poll.poll(self._timeout * 1000):
            raise TimeoutError(
                f"no answer to {self._asked} for {self._timeout:g} s (process {self._process.pid}); mend it, or raise "
                "env.worker_timeout"
            )
        return self._connection.recv()

    def exit_code(self) -> int | None:
        """Returns the exit code of its process; None if that still runs."""
        self._process.join(timeout=5)
        return self._process.exitcode

    def hang_up(self) -> None:
        """Tells it to end."""
        self._connection.close()

    def wait(self, seconds: float) -> None:
        """Waits so many seconds until the process has ended, then kills it."""
        self._process.join(timeout=seconds)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()


class ProcessVectorEnv(MultiStepVectorEnv):
    """Runs every environment in a process of its own; reports in one line one that fails, dies or does not answer.

    The processes know nothing of the main script (see processes.py): what `builders` name must be importable.
    timeout: seconds after which one that does not answer is reported. Raises UserError if this machine has no room for
    so many processes.
    """

    def __init__(
        self,
        builders: Sequence[Callable[[], MultiStep]],
        act_steps: int,
        seeds: Sequence[int] | None = None,
        timeout: float = WORKER_TIMEOUT,
    ):
        self._timeout = timeout
        super().__init__(builders, act_steps, seeds)

    def _open(self, builders: Sequence[Callable[[], MultiStep]]) -> None:
        room.require_processes(len(builders))
        for build in builders:
            self._lanes.append(_ProcessLane(build, self._timeout))


def _stack(observations: Sequence[Observations]) -> Observations:
    return {key: np.stack([frame[key] for frame in observations]) for key in observations[0]}


def _merge_infos(observations: Sequence[Observations], infos: Sequence[dict[str, Any]], chunk: int) -> dict[str, Any]:
    """Joins the infos of single environments to those of `StepResult`."""
    merged: dict[str, Any] = {"executed_steps": np.array([info["executed_steps"] for info in infos], dtype=np.int64)}
    if any("final_obs" in info for info in infos):
        pairs = zip(infos, observations, strict=True)
        merged["final_observations"] = _stack([info.get("final_obs", shown) for info, shown in pairs])
    if any("succeeded" in info for info in infos):
        merged["success"] = np.array([info.get("succeeded", False) for info in infos])
    if "full_obs" in infos[0]:
        merged["full_observations"] = _stack([_repeat_last(info["full_obs"], chunk) for info in infos])
    return merged


def _repeat_last(frames: Observations, length: int) -> Observations:
    """Extends frames {key: [n,...]} to {key: [length,...]} by repeating the last one."""
    return {
        key: np.concatenate([values, np.repeat(values[-1:], length - len(values), axis=0)])
        for key, values in frames.items()
    }
