"""What is asked of a vector environment. Shape letters: E environments, Ta actions of a chunk, To history."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import numpy as np

Observations = dict[str, np.ndarray]


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
