"""Acting, without training: step until the first episode of every environment has ended.

Shape letters: E environments, Ta actions of a chunk, A action, O observation.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np

from diffusion_rl.envs.interface import Observations, StepResult

T = TypeVar("T")
Act = Callable[[int, Observations], np.ndarray]  # (number of the step, observations) -> actions [E,Ta,A]


class Steps(Protocol):
    """What `run` needs of a vector environment."""

    n_envs: int

    def step(self, actions: np.ndarray) -> Any:
        """Executes chunks [E,Ta,A]; gives a `StepResult`."""


class Step(NamedTuple):
    """A step that was just made.

    Attributes:
        number: from 0 on.
        result: what it gave.
        alive: [E], whose first episode had not ended before it.
        returns: [E], of the first episodes so far, this step included.
    """

    number: int
    result: StepResult
    alive: np.ndarray
    returns: np.ndarray

    @property
    def going_on(self) -> np.ndarray:
        """Returns which environments' first episode has not ended with it, [E]."""
        return self.alive & ~(self.result.terminated | self.result.truncated)


@dataclass
class FirstEpisodes:
    """The first episode of each of E environments.

    Attributes:
        returns: [E], rewards up to and including the step that ended the episode.
        steps: [E], how many.
        terminated: [E], whether it ended before a limit.
    """

    returns: np.ndarray
    steps: np.ndarray
    terminated: np.ndarray


def run(
    act: Act,
    venv: Steps,
    observations: Observations,
    limit: int,
    on_step: Callable[[Step], None] = lambda step: None,
) -> FirstEpisodes:
    """Steps until the first episode of every environment has ended, at most `limit` times.

    Args:
        act: decides.
        observations: the present ones, of the reset.
        on_step: called after every step, to account for more than `FirstEpisodes` holds.
    """
    n_envs, alive = venv.n_envs, np.ones(venv.n_envs, bool)
    episodes = FirstEpisodes(np.zeros(n_envs), np.zeros(n_envs, np.int64), np.zeros(n_envs, bool))
    for number in range(limit):
        result = venv.step(act(number, observations))
        episodes.returns += np.where(alive, result.rewards, 0)
        episodes.steps[alive] = number + 1
        episodes.terminated |= alive & result.terminated
        step = Step(number, result, alive, episodes.returns)
        on_step(step)
        alive, observations = step.going_on, result.observations
        if not alive.any():
            break
    return episodes


def seeded_options(seed: int, n_envs: int) -> list[dict[str, Any]]:
    """Seeds environments: number i starts from seed + i."""
    return [{"seed": seed + i} for i in range(n_envs)]


class Alone:
    """A single simulator as E = 1 environments without ends.

    Args:
        step: of the simulator: action [A] -> observation [O] and reward.
    """

    n_envs = 1

    def __init__(self, step: Callable[[np.ndarray], tuple[np.ndarray, float]]):
        self._step, self._goes_on = step, np.zeros(1, bool)

    @staticmethod
    def observed(observation: np.ndarray) -> Observations:
        """Returns an observation [O] in the shape of those of vector environments."""
        return {"state": observation[None, None]}

    def step(self, actions: np.ndarray) -> StepResult:
        """Executes an action [1,1,A]."""
        observation, reward = self._step(actions[0, 0])
        return StepResult(self.observed(observation), np.array([reward]), self._goes_on, self._goes_on)


@dataclass
class Stopwatch:
    """Seconds that decisions take, without the first one's, which compiles the program."""

    seconds: list[float] = field(default_factory=list)
    started: bool = False

    def time(self, decide: Callable[[], T]) -> T:
        """Makes a decision."""
        began = time.perf_counter()
        decision = decide()
        if self.started:
            self.seconds.append(time.perf_counter() - began)
        self.started = True
        return decision
