"""The bookkeeping of action chunks for a batch of environments: the reference's MultiStep, vectorised.

The simulator runs the whole chunk of every environment and hands over what each single step gave; this module decides
where each chunk really ended and what the policy gets to see. Shape letters: E environments, Ta actions of a chunk,
To observation history, O observation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from diffusion_rl.core.errors import UserError


@dataclass
class StepOutcomes:
    """The outcomes of all actions of a chunk, those after an early end included.

    observations [E, Ta, O]; rewards [E, Ta]; done [E, Ta] bool.
    limit_known [E, Ta] bool: the environment itself says whether its time limit cut the episode at this step
    (the key `TimeLimit.truncated` of gym's wrapper); limit_hit [E, Ta] bool is what it says.
    """

    observations: np.ndarray
    rewards: np.ndarray
    done: np.ndarray
    limit_known: np.ndarray
    limit_hit: np.ndarray

    @classmethod
    def unending(cls, observations: np.ndarray, rewards: np.ndarray) -> StepOutcomes:
        """Returns observations [E,Ta,O] and rewards [E,Ta] of episodes that never end by themselves."""
        never = np.zeros(rewards.shape, bool)
        return cls(observations, rewards, never, never, never)


@dataclass
class ChunkOutcome:
    """executed [E] steps; rewards [E] summed over them; terminated, truncated [E] bool; observations [E, To, O] and
    frames [E, Ta, O], the observation after each action, repeating the last executed one."""

    executed: np.ndarray
    rewards: np.ndarray
    terminated: np.ndarray
    truncated: np.ndarray
    observations: np.ndarray
    frames: np.ndarray


class ChunkHistory:
    """Counts the steps and keeps the observation histories of E environments of one name.

    Raises UserError where an observation or a reward that counts is NaN or infinite.
    """

    def __init__(
        self, n_envs: int, n_obs_steps: int, obs_dim: int, max_episode_steps: int | None, name: str = "environment"
    ):
        self.name = name
        self.n_obs_steps = n_obs_steps
        self.max_episode_steps = max_episode_steps
        self.count = np.zeros(n_envs, dtype=np.int64)
        self.frames = np.zeros((n_envs, n_obs_steps, obs_dim))

    def start(self, rows: np.ndarray, observations: np.ndarray) -> None:
        """Begins new episodes in `rows` [N] with their first observations [N, O], which also fill the history."""
        n_rows = len(observations)
        no_rewards, one_step = np.zeros((n_rows, 1)), np.ones(n_rows)
        require_finite(self.name, observations[:, None], no_rewards, rows, executed=one_step, before=-one_step)
        self.count[rows] = 0
        self.frames[rows] = observations[:, None]

    def advance(self, rows: np.ndarray, steps: StepOutcomes) -> ChunkOutcome:
        """Accounts for one chunk in the environments `rows` [N]; arrays of `steps` and of the result have N rows."""
        n_rows, chunk = steps.rewards.shape
        terminated, truncated = self._flags(self.count[rows], steps)
        ended = terminated | truncated
        executed = np.where(ended.any(axis=1), ended.argmax(axis=1) + 1, chunk)
        require_finite(self.name, steps.observations, steps.rewards, rows, executed, self.count[rows])
        last = (np.arange(n_rows), executed - 1)
        # An early end counts one action more than it executed, as in the reference. It shows only where nothing
        # resets: there the time limit of what follows comes a step early.
        self.count[rows] += executed + (executed < chunk)
        history = np.concatenate([self.frames[rows], steps.observations], axis=1)
        shown = executed[:, None] + np.arange(self.n_obs_steps)
        self.frames[rows] = np.take_along_axis(history, shown[..., None], axis=1)
        kept = np.minimum(np.arange(chunk), executed[:, None] - 1)
        return ChunkOutcome(
            executed=executed,
            rewards=_sum_executed(steps.rewards, executed),
            terminated=terminated[last],
            truncated=truncated[last],
            observations=self.frames[rows],
            frames=np.take_along_axis(steps.observations, kept[..., None], axis=1),
        )

    def _flags(self, count: np.ndarray, steps: StepOutcomes) -> tuple[np.ndarray, np.ndarray]:
        """Returns terminated and truncated [N,Ta] of each step; the environment's own time limit takes precedence."""
        limit = np.inf if self.max_episode_steps is None else self.max_episode_steps
        over = count[:, None] + 1 + np.arange(steps.done.shape[1]) >= limit
        truncated = np.where(steps.limit_known, steps.limit_hit, over & ~steps.done)
        return steps.done.astype(bool), truncated.astype(bool)


def _sum_executed(rewards: np.ndarray, executed: np.ndarray) -> np.ndarray:
    """Sums the first `executed` [N] rewards of each row [N,Ta] in the order in which numpy would sum exactly those,
    [N]."""
    total = rewards.sum(axis=1)
    for row in np.flatnonzero(executed < rewards.shape[1]):
        total[row] = rewards[row, : executed[row]].sum()
    return total


def fault(what: str, values: Any, step: int) -> str | None:
    """Says which entry of `values` is NaN or infinite; None if all are finite.

    Args:
        what: a name for the values.
        step: of the episode; 0 for its reset.
    """
    values = np.asarray(values)
    if values.dtype.kind != "f":
        return None
    finite = np.isfinite(values)
    if finite.all():
        return None
    entry = int(np.flatnonzero(~finite)[0])
    where = f"entry {entry} is {values.ravel()[entry]}" if values.ndim else f"it is {values}"
    when = f"in step {step} of the episode" if step else "after a reset"
    return f"its {what} is not finite {when} ({where}): mend the environment, or let it end the episode before"


def require_finite(
    name: str,
    observations: np.ndarray,
    rewards: np.ndarray,
    rows: Sequence[int] | np.ndarray,
    executed: Sequence[int] | np.ndarray,
    before: Sequence[int] | np.ndarray,
) -> None:
    """Raises UserError naming environment, step and entry if an executed step gave NaN or infinity.

    Args:
        name: of the environments.
        observations: [N, Ta, O];  rewards: [N, Ta].
        rows: [N] numbers of the environments;  executed: [N] how many steps of the chunk count.
        before: [N] steps of the episode before the chunk (-1: the chunk is the reset).
    """
    if np.isfinite(observations).all() and np.isfinite(rewards).all():
        return
    for i, row in enumerate(rows):
        for t in range(int(executed[i])):
            step = int(before[i]) + t + 1
            line = fault("observation", observations[i, t], step) or fault("reward", rewards[i, t], step)
            if line:
                raise UserError(f"environment {row} ({name}): {line}")
