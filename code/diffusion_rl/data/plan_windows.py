"""Data sets of DiffuserLite: windows of several lengths in the same episodes, and the returns that condition plans.

Shape letters: N rows of the data, P episodes, L levels, M windows of a level, B batch, H states, O observation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np

from diffusion_rl.core.errors import UserError
from diffusion_rl.data.episodes import Episodes, check
from diffusion_rl.data.hdf5 import open_hdf5
from diffusion_rl.data.normalizers import GaussianNormalizer, IdentityNormalizer
from diffusion_rl.data.sources import d4rl
from diffusion_rl.data.windows import discounted_returns, window_rows, windows_of
from diffusion_rl.tasks.registry import D4RL_STEPS, steps_of

Flat = Mapping[str, np.ndarray]  # observations [N,O], actions [N,A], rewards, terminals and timeouts [N]
FIELDS = ("observations", "actions", "rewards", "terminals", "timeouts")


def read_flat(path: Path) -> dict[str, np.ndarray] | None:
    """Reads the arrays of a file in D4RL's layout; None where it has another."""
    with open_hdf5(path) as file:
        if not d4rl.recognises(file):
            return None
        flat = d4rl.read_columns(file, FIELDS)
    check(Episodes(flat["observations"], flat["actions"], np.array([len(flat["rewards"])]), flat["rewards"]), str(path))
    return flat


def flat_of(episodes: Episodes) -> dict[str, np.ndarray]:
    """Turns complete episodes with rewards into flat arrays; one that is not terminated ends with a time-out."""
    count, rewards = len(episodes.states), episodes.require_rewards("the data set")
    terminals = np.zeros(count, bool) if episodes.terminals is None else np.asarray(episodes.terminals, bool)
    timeouts = np.zeros(count, bool)
    last = episodes.starts + np.asarray(episodes.traj_lengths) - 1
    timeouts[last] = ~terminals[last]
    return dict(zip(FIELDS, (episodes.states, episodes.actions, rewards, terminals, timeouts), strict=True))


def transitions(flat: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns rows with the row after each, for Q-learning, without those that a time-out ends.

    Returns:
        "observations" [M,O], "actions" [M,A], "rewards" [M], "following" [M,O], "terminals" [M].
    """
    kept = np.flatnonzero(~flat["timeouts"][:-1].astype(bool))
    rows = {field: flat[field][kept] for field in FIELDS[:-1]}
    return rows | {"following": flat["observations"][kept + 1]}


class Segments(NamedTuple):
    """Episodes in flat arrays, and their padding: what a window sees after an episode's end.

    Row N + p of the extended arrays is the padding of episode p.
    """

    starts: np.ndarray  # [P]
    lengths: np.ndarray  # [P]
    rewards: np.ndarray  # [N]
    padded_states: np.ndarray  # [P,O], normalised
    padded_rewards: np.ndarray  # [P]


def locomotion(flat: Flat, states: np.ndarray, longest: int, penalty: float | None = -100) -> Segments:
    """Cuts episodes at terminals and time-outs and drops what follows the last end.

    Replaces the last reward of an episode that ended before its time by the penalty. Padding is zero after
    normalisation.
    """
    terminals, timeouts = flat["terminals"].astype(bool), flat["timeouts"].astype(bool)
    ends = np.flatnonzero(terminals | timeouts)
    if not len(ends):
        raise UserError("no terminal and no time-out in the data, so no episode is complete")
    rewards = flat["rewards"].astype(np.float32)
    if penalty is not None:
        rewards[terminals & ~timeouts] = penalty
    starts = np.append(0, ends[:-1] + 1)
    zeros = np.zeros((len(ends), states.shape[1]), np.float32)
    return Segments(starts, ends + 1 - starts, rewards, zeros, zeros[:, 0])


def kitchen(flat: Flat, states: np.ndarray, longest: int, penalty: float | None = None) -> Segments:
    """Cuts episodes at terminals, time-outs and the end of the data; padding repeats the last state and reward."""
    done = flat["terminals"].astype(bool) | flat["timeouts"].astype(bool)
    done[-1] = True
    ends, rewards = np.flatnonzero(done), flat["rewards"].astype(np.float32)
    starts = np.append(0, ends[:-1] + 1)
    return Segments(starts, ends + 1 - starts, rewards, states[ends], rewards[ends])


def antmaze(flat: Flat, states: np.ndarray, longest: int, penalty: float | None = -100) -> Segments:
    """Cuts segments where the goal is left and at time-outs, and drops what follows the last end.

    Rewards are -1 until the goal and 0 at it; the last one of a segment that took all the time is replaced by the
    penalty. Padding is the first state of the next segment (where the original's padding is one row late), and
    reward 0.
    """
    timeouts = flat["timeouts"].astype(bool)
    done = flat["terminals"].astype(bool) | timeouts
    begins = np.flatnonzero((done[:-1] & ~done[1:]) | timeouts[:-1]) + 1
    if not len(begins):
        raise UserError("the goal is never left and no time-out comes before the last row: there is no segment")
    starts = np.append(0, begins[:-1])
    lengths, rewards = begins - starts, flat["rewards"].astype(np.float32) - 1
    if penalty is not None:
        rewards[begins[lengths == longest] - 1] = penalty
    return Segments(starts, lengths, rewards, states[begins], np.zeros(len(begins), np.float32))


SEGMENTS: dict[str, tuple[Callable[..., Segments], int]] = {
    "mujoco": (locomotion, D4RL_STEPS),
    "kitchen": (kitchen, steps_of("kitchen")),
    "antmaze": (antmaze, steps_of("antmaze") + 1),
}


class PlanDataset:
    """Windows of L lengths. A batch has one window of each length, at proportional places in the data.

    Args:
        flat: whole data set in the environment's units.
        kind: "mujoco", "kitchen" or "antmaze": how episodes are cut and padded.
        spans: environment steps of a window, for each level.
        penalty: see the functions above.
        longest: no episode may be longer, and windows end before it; None: that of the kind.
    """

    def __init__(
        self,
        flat: Flat,
        kind: str,
        spans: Sequence[int],
        discount: float,
        penalty: float | None = -100,
        longest: int | None = None,
    ):
        cut, usual = SEGMENTS[kind]
        self.kind, self.spans, self.discount, self.longest = kind, list(spans), discount, longest or usual
        observations, actions = (np.asarray(flat[k]).astype(np.float32) for k in ("observations", "actions"))
        self.normalizer: IdentityNormalizer = GaussianNormalizer.fit(observations)
        states = self.normalizer.normalize(observations)
        self.segments = cut(flat, states, self.longest, penalty)
        if (most := int(self.segments.lengths.max())) > self.longest:
            raise UserError(f"an episode has {most} steps, {kind} allows {self.longest}: is this the right data set?")
        self.states = np.concatenate([states, self.segments.padded_states])
        self.actions = np.concatenate([actions, np.zeros((len(self.segments.starts), actions.shape[1]), np.float32)])
        self.rewards = np.concatenate([self.segments.rewards, self.segments.padded_rewards])
        self.padding = np.arange(len(self.states)) >= len(states)
        self.windows = [self._windows(span) for span in self.spans]
        if not all(map(len, self.windows)):
            raise UserError(f"windows of {max(self.spans)} steps do not fit into {self.longest}: plan less far")

    @property
    def observation_dim(self) -> int:
        return self.states.shape[1]

    @property
    def action_dim(self) -> int:
        return self.actions.shape[1]

    def __len__(self) -> int:
        return max(map(len, self.windows))

    def _windows(self, span: int) -> np.ndarray:
        """Returns episode and first step of each window, [M,2]; windows may run into the padding."""
        return np.stack(windows_of(np.minimum(self.segments.lengths, self.longest - span + 1)), axis=1)

    def at(self, items: np.ndarray) -> np.ndarray:
        """Returns the windows of each level at items [B]: [L,B].

        The places are found in floating point, in the reference's order: for some numbers of windows n the last level
        gets window k - 1 at item k, because n (k / n) is a little less than k.
        """
        fractions = np.asarray(items) / len(self.windows[-1])
        return np.stack([(len(windows) * fractions).astype(np.int64) for windows in self.windows])

    def rows(self, level: int, windows: np.ndarray | None = None, stride: int = 1) -> np.ndarray:
        """Returns the rows of `states`, `actions` and `rewards` in windows of a level (default: all of them), [B,H]."""
        chosen = self.windows[level] if windows is None else self.windows[level][windows]
        starts, lengths = self.segments.starts[chosen[:, 0]], self.segments.lengths[chosen[:, 0]]
        rows, inside = window_rows(starts + chosen[:, 1], starts + lengths, self.spans[level], stride)
        padding = len(self.states) - len(self.segments.starts) + chosen[:, :1]
        return np.where(inside, rows, padding)

    def returns(self, level: int) -> np.ndarray:
        """Sums discounted rewards from each window's first step to the end of its padded episode, [M]."""
        chosen = self.windows[level]
        return self.row_returns[self.segments.starts[chosen[:, 0]] + chosen[:, 1]]

    @cached_property
    def row_returns(self) -> np.ndarray:
        """Sums discounted rewards from each row of the data to the end of its padded episode, [N]."""
        segments = self.segments
        padded = [(self.discount ** np.arange(self.longest - length)).sum() for length in segments.lengths]
        after = segments.padded_rewards.astype(np.float64) * np.array(padded)
        rewards = segments.rewards.astype(np.float64)
        return discounted_returns(rewards, segments.lengths, self.discount, after).astype(np.float32)


def conditions(
    data: PlanDataset, level: int, scale: float, values: np.ndarray | None = None, chunk: int = 20000
) -> np.ndarray:
    """Returns what the plans of a level's windows are conditioned on, [M].

    Locomotion: the return in units of `scale`. Kitchen and AntMaze need the values of all rows of `states`, [N+P]; at
    the first level it is a discounted sum whose last reward is a value, at the others how many tasks are done on
    average (Kitchen) or how soon the goal is reached (AntMaze).
    """
    if data.kind == "mujoco":
        return data.returns(level) / np.float32(scale)
    if values is None:
        raise UserError(f"{data.kind} plans need values: run mode=iql_training first")
    parts = []
    for start in range(0, len(data.windows[level]), chunk):  # the windows of the first level are long
        rows = data.rows(level, np.arange(start, min(start + chunk, len(data.windows[level]))))
        returns_of = _kitchen_returns if data.kind == "kitchen" else _antmaze_returns
        parts.append(returns_of(data.rewards[rows], values[rows[:, -1]], data.discount, level == 0))
    return np.concatenate(parts)


def _discounts(discount: float, count: int) -> np.ndarray:
    return np.float32(discount) ** np.arange(count, dtype=np.float32)


def _kitchen_returns(rewards: np.ndarray, last: np.ndarray, discount: float, first: bool) -> np.ndarray:
    """Returns what plans are conditioned on, [B], for rewards [B,H] and the value of the last state [B]."""
    rewards = rewards / np.float32(4)
    if not first:
        return rewards.mean(axis=1)
    rewards[:, -1] = last
    return (rewards * _discounts(discount, rewards.shape[1])).sum(axis=1) / np.float32(100)


def _antmaze_returns(rewards: np.ndarray, last: np.ndarray, discount: float, first: bool) -> np.ndarray:
    """Returns what plans are conditioned on, [B]; rewards [B,H] after the first success do not count."""
    success = rewards + 1
    before = (np.cumsum(success, axis=1) == 0).astype(np.float32)
    mask = np.concatenate([np.ones_like(before[:, :1]), before[:, :-1]], axis=1)
    if not first:
        return success.max(axis=1) / mask.sum(axis=1)
    gained = success - 1
    gained[:, -1] = last
    return (gained * mask * _discounts(discount, rewards.shape[1])).sum(axis=1) / np.float32(100) + 1
