"""The interface of vector environments. Shape letters: E environments, Ta actions of a chunk, To history."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import numpy as np

from diffusion_rl.config.schema import near_words
from diffusion_rl.core.errors import UserError
from diffusion_rl.data.normalizers import MinMaxNormalizer
from diffusion_rl.tasks.registry import task_named

Observations = dict[str, np.ndarray]
WORKER_TIMEOUT = 600.0  # seconds that a process may take to answer
LONGEST_TIMEOUT = 10**6


@dataclass
class StepResult:
    """The result of one chunk of actions.

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
        """Seeds environment i with seeds[i]; it takes effect with the next reset."""

    def reset(self, options: Sequence[dict[str, Any]] | None = None) -> Observations:
        """Begins new episodes everywhere; options[i] goes to environment i (`seed`, `video_path`)."""

    def step(self, actions: np.ndarray) -> StepResult:
        """Executes chunks [E, Ta, A] of normalised actions."""

    def get_state(self) -> dict[str, np.ndarray]:
        """Returns everything needed to continue bit for bit, if `restorable`."""

    def set_state(self, state: dict[str, np.ndarray]) -> None:
        """Continues where `get_state` was taken."""

    def close(self) -> None:
        """Releases processes, threads and files."""


class SimulatorDied(UserError):
    """The process of an environment has ended, or does not answer: another one may do better."""


class Unrestorable:
    """Implements saving and restoring for environments whose simulators cannot be saved."""

    restorable = False

    def get_state(self) -> dict[str, np.ndarray]:
        return {}

    def get_random(self) -> Any:
        """Returns what the next resets draw from; None: nothing is known of it."""
        return None

    def set_state(self, state: dict[str, np.ndarray]) -> None:
        """Raises UserError for a state, which is that of other environments."""
        if state:
            raise UserError("these environments cannot be restored: a run goes on with new episodes (see env.engine)")


@dataclass(frozen=True)
class EnvRequest:
    """The description of the environments that a simulator builds.

    Attributes:
        name: of the environments.
        config: the whole `env` node as plain dictionaries.
        seeds: of each environment, and so how many there are.
        act_steps: Ta.
        chunks: `n_obs_steps`, `max_episode_steps`, `reset_within_step`, `full_observations` of the chunk wrapper.
        normalizer: bounds of the data set; None: raw observations and actions.
        obs_dim: O of the configuration.
    """

    name: str
    config: Mapping[str, Any]
    seeds: Sequence[int]
    act_steps: int
    chunks: dict[str, Any]
    normalizer: MinMaxNormalizer | None
    obs_dim: int

    @property
    def time_limit(self) -> int | None:
        """Returns the configured `d4rl_time_limit` in steps; without one, D4RL's own."""
        task = task_named(self.name)
        return self.config.get("d4rl_time_limit", task.episode_steps if task else None)

    @property
    def window(self) -> bool:
        """Returns whether environment 0 is shown in a window."""
        return bool(self.config.get("render"))

    @property
    def worker_timeout(self) -> float:
        """Seconds that a process may take to answer. Raises UserError where that is no such number."""
        seconds = self.config.get("worker_timeout", WORKER_TIMEOUT)
        if isinstance(seconds, bool) or not isinstance(seconds, (int, float)) or not 0 < seconds < LONGEST_TIMEOUT:
            raise UserError(f"env.worker_timeout={seconds}: give seconds, more than 0 and less than {LONGEST_TIMEOUT}")
        return float(seconds)


def require_one_each(what: str, values: Sequence[Any], n_envs: int) -> None:
    """Raises ValueError unless there is one value for each environment."""
    if len(values) != n_envs:
        raise ValueError(f"{len(values)} {what} for {n_envs} environments")


def unknown(name: str, known: Sequence[str]) -> UserError:
    """Returns the error about an unknown environment; it names known ones that are spelled alike."""
    close = near_words(name, known, cutoff=0.5)
    hint = f"did you mean {' or '.join(close)}?" if close else "give a D4RL name (hopper-medium-v2) or a gymnasium id"
    return UserError(f"environment {name!r} is unknown: {hint}")
