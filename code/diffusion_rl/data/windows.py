"""Windows over episodes in flat arrays, one after the other: their numbers, rows and returns.

Shape letters: N rows, T episodes, M windows, B batch, H rows of a window.
"""

from __future__ import annotations

import logging

import numpy as np

from diffusion_rl.core.errors import UserError
from diffusion_rl.core.typing import Rng

log = logging.getLogger(__name__)


def windows_of(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Lists the windows of episodes that have `counts` [T] each: their episodes and first steps within these, [M]."""
    counts = np.maximum(counts, 0)
    episodes = np.repeat(np.arange(len(counts)), counts)
    return episodes, np.arange(len(episodes)) - np.repeat(np.cumsum(counts) - counts, counts)


def window_rows(first: np.ndarray, end: np.ndarray, length: int, stride: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Returns the rows of windows [...,H], and which of them lie within their episodes, bool [...,H].

    Args:
        first, end: [...], the window's first row and the row after its episode's last one.
        length, stride: rows that a window spans, of which every `stride`-th is taken.
    """
    rows = first[..., None] + np.arange(0, length, stride)
    return rows, rows < end[..., None]


def discounted_returns(
    rewards: np.ndarray, lengths: np.ndarray, discount: float, after: np.ndarray | float = 0.0
) -> np.ndarray:
    """Sums discounted rewards from every row to the end of its episode, [N] -> [N], in their precision.

    All episodes advance together, so the Python loop runs over the longest episode's steps, not over N.

    Args:
        lengths: [T] of the episodes; what stands after the last one keeps 0.
        after: [T], what is still to come at the end of each.
    """
    to_go, last = np.zeros_like(rewards), np.cumsum(lengths) - 1
    following = np.zeros(len(lengths), rewards.dtype) + np.asarray(after, rewards.dtype)
    for back in range(int(lengths.max(initial=0))):
        alive = back < lengths
        rows = last[alive] - back
        following[alive] = to_go[rows] = rewards[rows] + rewards.dtype.type(discount) * following[alive]
    return to_go


def require_lengths(lengths: np.ndarray, max_path_length: int) -> None:
    """Raises UserError where an episode [T] is longer than is allowed."""
    if lengths.max() > max_path_length:
        raise UserError(f"an episode has {lengths.max()} steps: set max_path_length to that (now {max_path_length})")


def require_windows(lengths: np.ndarray, episodes: np.ndarray, horizon: int) -> None:
    """Raises UserError where there is no window of `horizon` steps; says in a line how many episodes have none.

    Args:
        lengths: of the episodes [T].
        episodes: of the windows [M].
    """
    if not len(episodes):
        raise UserError(f"no episode has a window of {horizon} steps: choose a smaller horizon")
    if left_out := len(lengths) - len(np.unique(episodes)):
        log.warning("%d of %d episodes have no window of %d steps and are left out", left_out, len(lengths), horizon)


class WindowOrder:
    """Goes through the windows of a data set in random order, again and again; the last batch of a pass is smaller.

    Args:
        count, size: of the windows, of a batch.
        rng: draws the order of each pass.
    """

    def __init__(self, count: int, size: int, rng: Rng):
        self.count, self.size, self.rng = count, size, rng
        self.order, self.position = np.arange(0), 0

    def __next__(self) -> np.ndarray:
        if self.position >= len(self.order):
            self.order, self.position = self.rng.permutation(self.count), 0
        items = self.order[self.position : self.position + self.size]
        self.position += self.size
        return items
