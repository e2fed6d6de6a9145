"""Data sets of Diffuser: windows of H transitions, actions first, their known states and their returns.

Shape letters: N transitions, M windows, B batch, H horizon, A action, O observation, D = A + O, L length of an episode.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from diffusion_rl.core.errors import UserError
from diffusion_rl.data.episodes import Episodes
from diffusion_rl.data.normalizers import IdentityNormalizer, normalizer
from diffusion_rl.data.windows import discounted_returns, require_lengths, require_windows, window_rows, windows_of

FIELDS = ("observations", "actions")


class TrajectoryDataset:
    """Windows of normalised transitions.

    A window may run over the end of its episode (`use_padding`); what lies there are zeros before normalisation.

    Args:
        episodes: complete ones, in the environment's units.
        horizon: H.
        normalizer: name of the class for observations and actions.
        max_path_length: no episode may be longer; windows end before it.
        termination_penalty: added to the last reward of episodes that ended; None adds nothing.
        goal: the last observation of a window is known, not only the first.
        discount: of the returns; None: the windows have none.
        normed: scale the returns to [-1, 1].
        pictures: the observation in which a window begins is known as a picture, too.

    Raises:
        UserError: an episode is too long, no window fits, or rewards or pictures are missing.
    """

    def __init__(
        self,
        episodes: Episodes,
        horizon: int,
        normalizer: str = "LimitsNormalizer",
        max_path_length: int = 1000,
        termination_penalty: float | None = 0,
        use_padding: bool = True,
        goal: bool = False,
        discount: float | None = None,
        normed: bool = False,
        pictures: bool = False,
    ):
        if pictures and episodes.images is None:
            raise UserError("--obs_type pixel: there are no pictures (images) in the data set; use state_features")
        self.images = episodes.images if pictures else None  # [N,C,Hi,Wi]
        self.horizon, self.normalizer = horizon, normalizer
        self.path_lengths = np.asarray(episodes.traj_lengths, np.int64)
        self.starts, self.max_path_length = episodes.starts, max_path_length
        require_lengths(self.path_lengths, max_path_length)
        raw = {"observations": _float32(episodes.states), "actions": _float32(episodes.actions)}
        self.normalizers = fit(raw, normalizer)
        self.observation_dim, self.action_dim = raw["observations"].shape[1], raw["actions"].shape[1]
        if discount is not None:
            episodes.require_rewards("the data set")
        self.rewards = self._rewards(episodes, termination_penalty)
        padded = {k: np.concatenate([v, np.zeros_like(v[:1])]) for k, v in raw.items()}
        normed_fields = [_float32(self.normalizers[k].normalize(padded[k])) for k in ("actions", "observations")]
        self.transitions = np.concatenate(normed_fields, axis=1)  # [N+1,D]; the last row is what padding becomes
        self.windows = self._windows(use_padding)
        require_windows(self.path_lengths, self.windows[:, 0], horizon)
        self.condition_times: tuple[int, ...] = (0, horizon - 1) if goal else (0,)
        self.values = None if discount is None else self._values(discount, normed)  # [M,1]

    def __len__(self) -> int:
        return len(self.windows)

    def _rewards(self, episodes: Episodes, penalty: float | None) -> np.ndarray:
        rewards = np.zeros(len(episodes.states), np.float32) if episodes.rewards is None else episodes.rewards
        rewards = _float32(rewards).copy()
        if penalty is not None and episodes.terminals is not None:
            last = self.starts + self.path_lengths - 1
            rewards[last[np.asarray(episodes.terminals, bool)[last]]] += np.float32(penalty)
        return rewards

    def _windows(self, use_padding: bool) -> np.ndarray:
        """Returns episode and first step of each window, [M,2]; the last possible start of every episode is left out,
        as in the reference."""
        counts = np.minimum(self.path_lengths - 1, self.max_path_length - self.horizon)
        counts = counts if use_padding else np.minimum(counts, self.path_lengths - self.horizon)
        return np.stack(windows_of(counts), axis=1)

    def _values(self, discount: float, normed: bool) -> np.ndarray:
        """Sums discounted rewards from each window's first step to the end of its episode, [M,1]."""
        values = discounted_returns(self.rewards.astype(np.float64), self.path_lengths, discount)[self.first_rows]
        if normed:
            low, high = (float(np.float32(bound)) for bound in (values.min(), values.max()))
            self.value_bounds = low, high
            values = (values - low) / (high - low) * 2 - 1
        return _float32(values[:, None])

    @property
    def first_rows(self) -> np.ndarray:
        """Returns the row of `transitions` at which each window begins, [M]."""
        return self.starts[self.windows[:, 0]] + self.windows[:, 1]

    @property
    def end_rows(self) -> np.ndarray:
        """Returns the row after the last one of each window's episode, [M]."""
        return (self.starts + self.path_lengths)[self.windows[:, 0]]

    def rows(self, items: np.ndarray) -> np.ndarray:
        """Returns the rows of `transitions` in windows `items` [B], [B,H]."""
        rows, inside = window_rows(self.first_rows[items], self.end_rows[items], self.horizon)
        return np.where(inside, rows, len(self.transitions) - 1)

    def conditions(self, items: np.ndarray) -> dict[int, Any]:
        """Returns what is known of windows `items` [B], by time: observations [B,O], or with pictures
        {"state": [B,O], "rgb": [B,C,Hi,Wi]}."""
        windows = self.trajectories(items)
        known: dict[int, Any] = {t: windows[:, t, self.action_dim :] for t in self.condition_times}
        if self.images is not None:
            known[0] = {"state": known[0], "rgb": self.images[self.first_rows[items]]}
        return known

    def trajectories(self, items: np.ndarray) -> np.ndarray:
        """Returns windows `items` [B], [B,H,D]."""
        return self.transitions[self.rows(items)]


def fit(fields: dict[str, np.ndarray], name: str) -> dict[str, IdentityNormalizer]:
    """Fits a normalizer of that name for each field [N,D]."""
    return {key: normalizer(name).fit(rows) for key, rows in fields.items()}


def without_last_steps(episodes: Episodes) -> Episodes:
    """Drops the last step of every episode: in Maze2D it already belongs to the next goal."""
    lengths = np.asarray(episodes.traj_lengths)
    keep = np.ones(len(episodes.states), bool)
    keep[episodes.starts + lengths - 1] = False
    kept = {k: v[keep] for k, v in episodes.arrays().items() if k != "traj_lengths"}
    return replace(episodes, traj_lengths=lengths - 1, **kept)


def leaving_goal(observations: np.ndarray, goal: np.ndarray, distance: float = 0.5) -> np.ndarray:
    """Whether the position [N,:2] is within `distance` of the goal but no longer at the next step, bool [N]."""
    at_goal = np.linalg.norm(observations[:, :2] - goal, axis=-1) < distance
    return np.append(at_goal[:-1] & ~at_goal[1:], False)


def _float32(x: np.ndarray) -> np.ndarray:
    return np.asarray(x).astype(np.float32)
