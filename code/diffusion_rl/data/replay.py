"""A preallocated first-in first-out replay buffer."""

from __future__ import annotations

import numpy as np


class ReplayBuffer:
    """Transitions as float32 arrays, the oldest overwritten when full.

    obs, next_obs [N,To,O], actions [N,Ta,A], rewards, terminated [N] with N the capacity; `size` rows are filled.
    """

    def __init__(self, capacity: int, obs_shape: tuple[int, int], action_shape: tuple[int, int]):
        self.capacity, self.size, self._next = capacity, 0, 0
        self.obs = np.zeros((capacity, *obs_shape), np.float32)
        self.next_obs = np.zeros((capacity, *obs_shape), np.float32)
        self.actions = np.zeros((capacity, *action_shape), np.float32)
        self.rewards = np.zeros(capacity, np.float32)
        self.terminated = np.zeros(capacity, np.float32)

    def add(self, obs, next_obs, actions, rewards, terminated) -> None:
        """Append E transitions (one of each environment)."""
        n = len(obs)
        where = (self._next + np.arange(n)) % self.capacity
        for store, new in zip(self.arrays, (obs, next_obs, actions, rewards, terminated), strict=True):
            store[where] = new
        self._next = int((self._next + n) % self.capacity)
        self.size = min(self.size + n, self.capacity)

    @property
    def arrays(self) -> tuple[np.ndarray, ...]:
        return self.obs, self.next_obs, self.actions, self.rewards, self.terminated

    def gather(self, indices: np.ndarray) -> tuple[np.ndarray, ...]:
        """(obs, next_obs, actions, rewards, terminated) at `indices` of any shape."""
        return tuple(a[indices] for a in self.arrays)
