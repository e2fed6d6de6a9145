"""Where experience is kept, and the draws of its rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from diffusion_rl.core.typing import Array, Rng
from diffusion_rl.data.replay import ReplayBuffer

Draws = Mapping[str, Array]  # everything random of one update or decision, by name


@dataclass
class Buffers:
    """The replay buffer, and the offline data where they are kept apart."""

    online: ReplayBuffer
    offline: ReplayBuffer | None = None


class Rows:
    """Random draws of rows of the buffers, as places, during one iteration.

    `last` keeps the latest draw of each kind: an actor may be trained on the critics' last batch.
    """

    def __init__(self, buffers: Buffers, rng: Rng, n_envs: int):
        self.buffers, self.rng, self.n_envs = buffers, rng, n_envs
        self.last: dict[str, np.ndarray] = {}
        self._order, self._used = np.arange(0), 0

    def online(self, n: int, steps_only: bool = False) -> np.ndarray:
        """Draws rows [n] of the replay buffer, with replacement.

        steps_only: from as many of the oldest ones as there are steps.
        """
        buffer = self.buffers.online
        ages = self.rng.integers(0, buffer.size // (self.n_envs if steps_only else 1), (n,))
        self.last["online"] = buffer.places(ages)
        return self.last["online"]

    def distinct(self, n: int) -> np.ndarray:
        """Draws different rows [n] of the replay buffer."""
        return self.buffers.online.places(self.rng.distinct(self.buffers.online.size, n))

    def shuffled(self, n: int) -> np.ndarray:
        """Takes the next rows [n] of a shuffle of all (at most all), shuffled again when fewer than n are left."""
        size = self.buffers.online.size
        n = min(n, size)
        if self._used + n > len(self._order):
            order = self._order if len(self._order) else np.arange(size)
            self._order, self._used = order[self.rng.permutation(size)], 0
        self._used += n
        return self.buffers.online.places(self._order[self._used - n : self._used])

    def offline(self, n: int) -> np.ndarray:
        """Draws rows [n] of the offline data, with replacement."""
        assert self.buffers.offline is not None
        self.last["offline"] = self.buffers.offline.places(self.rng.integers(0, self.buffers.offline.size, (n,)))
        return self.last["offline"]
