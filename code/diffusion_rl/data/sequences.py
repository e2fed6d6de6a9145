"""Windows over stored episodes: action chunks with observation history, and Q-learning transitions.

Shape letters: N transitions, M windows, B batch, H horizon, To observation history, O observation, A action.
Observations and actions are stored normalised; nothing is scaled here.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from diffusion_rl.core.errors import UserError
from diffusion_rl.core.typing import Rng
from diffusion_rl.data.assets import resolve
from diffusion_rl.data.episodes import Episodes, load_episodes
from diffusion_rl.data.windows import discounted_returns, windows_of

log = logging.getLogger(__name__)

Conditions = dict[str, np.ndarray]


class Batch(NamedTuple):
    """actions [..., H, A]; conditions {"state": [..., To, O]} and, with images, "rgb": [..., To, C, Hi, Wi]."""

    actions: np.ndarray
    conditions: Conditions


class Transition(NamedTuple):
    """As `Batch`, with conditions["next_state"], and rewards, dones (and reward_to_gos, or None) [..., 1]."""

    actions: np.ndarray
    conditions: Conditions
    rewards: np.ndarray
    dones: np.ndarray
    reward_to_gos: np.ndarray | None = None


class SequenceDataset:
    """Every window of `horizon_steps` actions that fits into one episode, with the observations up to its first step.

    History that would reach before the episode repeats its first observation; the most recent stands last. Episodes
    shorter than the horizon have no window (`n_short_episodes` counts them). The first `max_n_episodes` are used (-1:
    all). What is left out is logged.

    Attributes: states [N,O] float32, actions [N,A] float32, traj_lengths [T], indices [M,2] int64 (row of the first
    action, steps since the episode's beginning), images [N,C,Hi,Wi] as stored or None.
    Errors: a missing file or key, NaN, inconsistent lengths or no window at all raise UserError.
    """

    def __init__(
        self,
        dataset_path: str | os.PathLike,
        horizon_steps: int = 64,
        cond_steps: int = 1,
        img_cond_steps: int = 1,
        max_n_episodes: int = 10000,
        use_img: bool = False,
        device: Any = None,  # accepted for the reference's configuration files; TensorFlow places tensors itself
    ):
        counts = {"horizon_steps": horizon_steps, "cond_steps": cond_steps, "max_n_episodes": max_n_episodes}
        for key, value in counts.items():
            if value is not None and value < 1 and (key, value) != ("max_n_episodes", -1):
                raise UserError(f"{key}={value} must be at least 1")
        if not 1 <= img_cond_steps <= cond_steps:
            raise UserError(f"img_cond_steps={img_cond_steps} must be from 1 to cond_steps={cond_steps}")
        self.dataset_path = str(dataset_path)
        self.horizon_steps, self.cond_steps, self.img_cond_steps = horizon_steps, cond_steps, img_cond_steps
        self.use_img = use_img
        self._take(load_episodes(resolve(dataset_path), None if max_n_episodes == -1 else max_n_episodes, scaled=True))
        self.indices = self._make_indices()
        self.n_short_episodes = int(np.sum(self.traj_lengths < horizon_steps))
        if not len(self.indices):
            longest = int(self.traj_lengths.max(initial=0))
            raise UserError(
                f"{self.dataset_path}: no window of {horizon_steps} steps fits (longest episode: {longest}); "
                f"lower horizon_steps"
            )
        if self.n_short_episodes:
            log.warning(
                "%s: %d of %d episodes are shorter than horizon_steps=%d and left out",
                *(self.dataset_path, self.n_short_episodes, len(self.traj_lengths), horizon_steps),
            )

    def _take(self, episodes: Episodes) -> None:
        if self.use_img and episodes.images is None:
            raise UserError(f"{self.dataset_path}: no images in it; set use_img=False or use the image data set")
        self.traj_lengths = episodes.traj_lengths
        self.states = np.asarray(episodes.states, np.float32)
        self.actions = np.asarray(episodes.actions, np.float32)
        self.images = episodes.images if self.use_img else None

    def _windows_per_episode(self) -> np.ndarray:
        return self.traj_lengths - self.horizon_steps + 1

    def _make_indices(self) -> np.ndarray:
        episodes, since_start = windows_of(self._windows_per_episode())
        starts = np.cumsum(self.traj_lengths) - self.traj_lengths
        return np.stack([starts[episodes] + since_start, since_start], axis=1).astype(np.int64)

    def __len__(self) -> int:
        return len(self.indices)

    def require_dims(self, obs_dim: int, action_dim: int) -> None:
        """Raises UserError unless the data set has these dimensions."""
        dims = (self.states.shape[1], self.actions.shape[1])
        if dims != (obs_dim, action_dim):
            raise UserError(
                f"{self.dataset_path} has obs_dim={dims[0]} and action_dim={dims[1]}, "
                f"the configuration says obs_dim={obs_dim} and action_dim={action_dim}"
            )

    def gather(self, indices: Sequence[int] | np.ndarray) -> Batch:
        """Returns windows number `indices` [B] (0 … M-1): actions [B,H,A], conditions [B,To,…]."""
        start, since_start = self.indices[np.asarray(indices)].T
        conditions = {"state": self.states[self._history(start, since_start, self.cond_steps)]}
        if self.images is not None:
            conditions["rgb"] = self.images[self._history(start, since_start, self.img_cond_steps)]
        return Batch(self.actions[start[:, None] + np.arange(self.horizon_steps)], conditions)

    def item(self, index: int) -> Any:
        """Returns one window without the leading B."""
        return _first(self.gather([index]))

    @staticmethod
    def _history(start: np.ndarray, since_start: np.ndarray, steps: int) -> np.ndarray:
        """Returns the rows [B,steps] of the observations up to `start`, the first of the episode repeated."""
        back = np.arange(steps - 1, -1, -1)
        return start[:, None] - np.minimum(back[None, :], since_start[:, None])

    def split(self, fraction: float, rng: Rng) -> tuple[np.ndarray, np.ndarray]:
        """Draws window numbers for training [n] and validation [M-n], disjoint and complete, n = int(M * fraction).

        Windows are drawn without regard to episodes, so neighbouring windows overlap across the two parts. (The
        reference draws the training part this way too, but then returns all windows for validation.)
        """
        if not 0.0 < fraction <= 1.0:
            raise UserError(f"train_split={fraction} must be above 0 and at most 1")
        order = rng.permutation(len(self))
        n = int(len(self) * fraction)
        if n == 0:
            raise UserError(f"train_split={fraction} leaves nothing of {len(self)} windows to train on")
        return order[:n], order[n:]


class QLearningDataset(SequenceDataset):
    """Chunked transitions: reward and done of the chunk's first step, next state `horizon_steps` later.

    The last window of an episode that was cut (last terminal false) is left out: its next state is not stored. As in
    the reference, the next state of the last `horizon_steps` windows of the whole set is zero, an episode's last
    windows see the beginning of the next episode (done masks it only where the terminal lies on the chunk's first
    step), and the next state's history repeats the state `horizon_steps` after the episode's first.

    More attributes: rewards, dones [N] float32; reward_to_go [N] (discounted, with get_mc_return).
    """

    def __init__(
        self,
        dataset_path: str | os.PathLike,
        max_n_episodes: int = 10000,
        discount_factor: float = 1.0,
        device: Any = None,
        get_mc_return: bool = False,
        **kwargs: Any,
    ):
        super().__init__(dataset_path, max_n_episodes=max_n_episodes, device=device, **kwargs)
        self.discount_factor, self.get_mc_return = discount_factor, get_mc_return
        if get_mc_return:
            from diffusion_rl.core.keras import floatx  # slow to import

            rewards = self.rewards.astype(floatx())
            self.reward_to_go = discounted_returns(rewards, self.traj_lengths, discount_factor)

    def _take(self, episodes: Episodes) -> None:
        super()._take(episodes)
        if episodes.rewards is None or episodes.terminals is None:
            raise UserError(f"{self.dataset_path}: Q-learning needs rewards and terminals; convert the data set anew")
        self.rewards = np.asarray(episodes.require_rewards(self.dataset_path), np.float32)
        self.dones = np.asarray(episodes.terminals, np.float32)

    def _windows_per_episode(self) -> np.ndarray:
        ends = np.maximum(np.cumsum(self.traj_lengths) - 1, 0)
        cut = self.dones[ends] == 0
        return self.traj_lengths - self.horizon_steps + 1 - cut

    def gather(self, indices: Sequence[int] | np.ndarray) -> Transition:  # type: ignore[override]  # holds more
        """Returns the transitions of windows number `indices` [B]."""
        indices = np.asarray(indices) % len(self)
        actions, conditions = super().gather(indices)
        start, since_start = self.indices[indices].T
        rows = self._history(start, since_start, self.cond_steps) + self.horizon_steps
        known = indices < len(self) - self.horizon_steps
        next_states = self.states[np.where(known[:, None], rows, 0)]
        conditions["next_state"] = np.where(known[:, None, None], next_states, np.float32(0))
        to_go = self.reward_to_go[start, None] if self.get_mc_return else None
        return Transition(actions, conditions, self.rewards[start, None], self.dones[start, None], to_go)


class ChunkDataset(QLearningDataset):
    """Transitions of whole chunks: what their actions earned together, whether the episode ended in them, and the
    state that followed."""

    def gather(self, indices: Sequence[int] | np.ndarray) -> Transition:  # type: ignore[override]  # holds more
        """Returns the transitions of windows number `indices` [B]."""
        indices = np.asarray(indices) % len(self)
        actions, conditions = SequenceDataset.gather(self, indices)
        start, since_start = self.indices[indices].T
        rows = start[:, None] + np.arange(self.horizon_steps)
        following = np.minimum(start + self.horizon_steps, len(self.states) - 1)  # where one ended nobody looks
        history = self._history(following, since_start + self.horizon_steps, self.cond_steps)
        conditions["next_state"] = self.states[history]
        to_go = self.reward_to_go[start, None] if self.get_mc_return else None
        rewards, dones = self.rewards[rows].sum(axis=1), self.dones[rows].max(axis=1)
        return Transition(actions, conditions, rewards[:, None], dones[:, None], to_go)


def _first(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _first(v) for k, v in value.items()}
    if isinstance(value, tuple):
        return type(value)(*(_first(v) for v in value))
    return None if value is None else value[0]
