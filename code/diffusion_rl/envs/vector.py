"""What the loops ask of a vector environment. Shape letters: E environments, Ta actions of a chunk, To history."""

from __future__ import annotations

import abc
import logging
import select
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import numpy as np

from diffusion_rl.core.errors import UserError
from diffusion_rl.envs import processes, room, worker
from diffusion_rl.envs.multi_step import MultiStep, Observations

log = logging.getLogger(__name__)

WORKER_TIMEOUT = 600.0  # seconds that a process may take to answer
CLOSING_SECONDS = 5.0  # that all processes together may take to end


@dataclass
class StepResult:
    """What one chunk of actions gave.

    observations: {key: [E, To, ...]}, already those of the new episode where `reset_within_step` began one.
    rewards: [E] float64, summed over the executed part of the chunk.
    terminated, truncated: [E] bool. Both are set where D4RL's time limit ended the episode.
    infos: `executed_steps` [E] int64; `final_observations` {key: [E, To, ...]}, the last ones of the old episode,
        valid where truncated and reset; `full_observations` {key: [E, Ta, ...]} when asked for: the observation after
        each action, repeating the last executed one; `success` [E] bool where environments say whether the chunk
        reached the goal.
    """

    observations: Observations
    rewards: np.ndarray
    terminated: np.ndarray
    truncated: np.ndarray
    infos: dict[str, Any] = field(default_factory=dict)


@runtime_checkable
class VectorEnv(Protocol):
    """E environments stepped together, a chunk of Ta normalised actions at a time."""

    n_envs: int
    act_steps: int
    obs_spec: dict[str, tuple[int, ...]]
    action_dim: int
    restorable: bool

    def seed(self, seeds: Sequence[int]) -> None:
        """Seed environment i with seeds[i]; it takes effect with the next reset."""

    def reset(self, options: Sequence[dict[str, Any]] | None = None) -> Observations:
        """Begin new episodes everywhere; options[i] goes to environment i (`seed`, `video_path`)."""

    def step(self, actions: np.ndarray) -> StepResult:
        """Execute chunks [E, Ta, A] of normalised actions."""

    def get_state(self) -> dict[str, np.ndarray]:
        """Everything needed to go on bit for bit, if `restorable`."""

    def set_state(self, state: dict[str, np.ndarray]) -> None:
        """Go on where `get_state` was taken."""

    def close(self) -> None:
        """Release processes, threads and files."""


class MultiStepVectorEnv(abc.ABC):
    """E `MultiStep` environments behind the `VectorEnv` interface, each behind a lane: here, or in a process.

    builders[i] makes environment i. Subclasses say what a lane is. The simulators cannot be saved: `restorable` is
    false, `get_state` is empty.
    """

    restorable = False

    def __init__(self, builders: Sequence[Callable[[], MultiStep]], act_steps: int, seeds: Sequence[int] | None = None):
        self.n_envs = len(builders)
        self.act_steps = act_steps
        self._names = [str(getattr(build, "name", "")) for build in builders]
        self._seeds: list[int | None] = [None] * self.n_envs
        self._says_success = False
        self._lanes: list[Lane] = []
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
        """Make the environments."""

    def seed(self, seeds: Sequence[int]) -> None:
        if len(seeds) != self.n_envs:
            raise ValueError(f"{len(seeds)} seeds for {self.n_envs} environments")
        self._seeds = list(seeds)

    def reset(self, options: Sequence[dict[str, Any]] | None = None) -> Observations:
        options = [{}] * self.n_envs if options is None else options
        if len(options) != self.n_envs:
            raise ValueError(f"{len(options)} options for {self.n_envs} environments")
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

    def get_state(self) -> dict[str, np.ndarray]:
        return {}

    def set_state(self, state: dict[str, np.ndarray]) -> None:
        if state:
            raise UserError("these environments cannot be restored: resume restarts them (env.engine says which kind)")

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
            raise UserError(f"environment {index} ({name}) stands still: {silence}") from None
        except (EOFError, OSError):
            code = self._lanes[index].exit_code()
            self.close()
            cause = f"killed by signal {-code}" if code is not None and code < 0 else f"exit code {code}"
            hint = " (out of memory?)" if code == -9 else ""
            line = f"environment {index} died: its process ended without a word, {cause}{hint} [{name}]"
            raise UserError(line) from None
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


class Lane(Protocol):
    """The way to one environment."""

    def send(self, method: str, arguments: tuple) -> None:
        """Ask it to do something."""

    def receive(self) -> tuple[str, Any]:
        """("ok", result), ("refused", line) or ("error", traceback)."""

    def exit_code(self) -> int | None:
        """How its process ended."""

    def hang_up(self) -> None:
        """Tell it to end."""

    def wait(self, seconds: float) -> None:
        """Wait until it has ended; after so many seconds end it."""


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
    """All environments in this process, one after the other: for tests and debugging; errors come unchanged but
    for a UserError, which names the environment."""

    def _open(self, builders: Sequence[Callable[[], MultiStep]]) -> None:
        self._lanes = []
        for build in builders:
            self._lanes.append(_LocalLane(build))


class _ProcessLane:
    """An environment in a process of its own, which may take `timeout` seconds to answer."""

    def __init__(self, build: Callable[[], MultiStep], timeout: float):
        self._process, self._connection = processes.start(worker.serve, build)
        self._timeout, self._asked = timeout, "its start"
        self._poll = select.poll()  # multiprocessing's own way of waiting takes ten times as long
        self._poll.register(self._connection.fileno(), select.POLLIN)

    def send(self, method: str, arguments: tuple) -> None:
        self._asked = method
        self._connection.send((method, arguments))

    def receive(self) -> tuple[str, Any]:
        """Raises TimeoutError if it does not answer in time."""
        if not self._poll.poll(self._timeout * 1000):
            raise TimeoutError(
                f"no answer to {self._asked} for {self._timeout:g} s (process {self._process.pid}); mend it, or raise "
                "env.worker_timeout"
            )
        return self._connection.recv()

    def exit_code(self) -> int | None:
        self._process.join(timeout=5)
        return self._process.exitcode

    def hang_up(self) -> None:
        self._connection.close()

    def wait(self, seconds: float) -> None:
        self._process.join(timeout=seconds)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()


class ProcessVectorEnv(MultiStepVectorEnv):
    """Every environment in a process of its own; one that fails, dies or stands still is reported in one line.

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
    return {key: np.stack([one[key] for one in observations]) for key in observations[0]}


def _merge_infos(observations: Sequence[Observations], infos: Sequence[dict[str, Any]], chunk: int) -> dict[str, Any]:
    """The infos of StepResult from those of the single environments."""
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
    """Frames {key: [n, ...]} -> {key: [length, ...]}."""
    return {
        key: np.concatenate([values, np.repeat(values[-1:], length - len(values), axis=0)])
        for key, values in frames.items()
    }
