"""A first-in first-out replay buffer of tensors."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import tensorflow as tf

from diffusion_rl.core.keras import floatx
from diffusion_rl.core.transitions import Transitions

SCALARS = ("rewards", "terminated", "returns", "advantages", "weights")


class ReplayBuffer:
    """Rows of `Transitions` in preallocated variables, the oldest overwritten when full.

    What is added waits on the host until `flush` (or anything that reads) moves it over at once. Rows are addressed in
    two ways: by age (0 = oldest), as random draws do, and by place in the variables, as compiled programs do.

    Args:
        capacity: rows N.
        shapes: {field of Transitions: shape of a row}; `fields` gives the usual ones.
    """

    def __init__(self, capacity: int, shapes: Mapping[str, tuple[int, ...]]):
        self.capacity, self.size, self._next = int(capacity), 0, 0
        self.stores = {k: tf.Variable(tf.zeros([self.capacity, *s], floatx())) for k, s in shapes.items()}
        self._waiting: dict[str, list[np.ndarray]] = {k: [] for k in shapes}
        self._write = tf.function(self._scatter, reduce_retracing=True)

    def add(self, **rows: np.ndarray) -> None:
        """Appends rows [n,…] of fields; the fields left out are zero."""
        n = len(rows["obs"])
        for name, store in self.stores.items():
            value = rows.get(name, np.zeros((n, *store.shape[1:]), floatx()))
            self._waiting[name].append(np.array(value, floatx()))

    def flush(self) -> None:
        """Moves the waiting rows into the variables."""
        if not self._waiting["obs"]:
            return
        rows = {k: np.concatenate(v)[-self.capacity :] for k, v in self._waiting.items()}
        self._waiting = {k: [] for k in self._waiting}
        n = len(rows["obs"])
        self._write((self._next + np.arange(n)) % self.capacity, rows)
        self._next = (self._next + n) % self.capacity
        self.size = min(self.size + n, self.capacity)

    def _scatter(self, where: tf.Tensor, rows: dict[str, tf.Tensor]) -> None:
        for name, values in rows.items():
            self.stores[name].scatter_update(tf.IndexedSlices(values, where))

    def clear(self) -> None:
        """Removes all rows."""
        self.size = self._next = 0
        self._waiting = {k: [] for k in self._waiting}

    def places(self, ages: np.ndarray) -> np.ndarray:
        """Returns the places [n] int32 in the variables of rows given by age [n] (0 = oldest)."""
        oldest = self._next if self.size == self.capacity else 0
        return ((oldest + ages) % self.capacity).astype(np.int32)

    def at(self, places: tf.Tensor) -> Transitions:
        """Gathers the rows at these places [B]; for compiled programs."""
        return Transitions(**{"obs": None, "actions": None} | {k: tf.gather(v, places) for k, v in self.stores.items()})

    def replace(self, name: str, places: tf.Tensor, values: tf.Tensor) -> None:
        """Overwrites a field at places [B], equally where one is named twice; for compiled programs."""
        self.stores[name].scatter_update(tf.IndexedSlices(values, places))

    def read(self, name: str) -> np.ndarray:
        """Reads a field of all rows, oldest first, [size,...]."""
        self.flush()
        return tf.gather(self.stores[name], self.places(np.arange(self.size))).numpy()

    def write(self, name: str, values: np.ndarray) -> None:
        """Overwrites a field of the newest rows (or of all) with values [n,...], oldest first."""
        self.flush()
        values = np.asarray(values, floatx())[-self.size :]
        self._write(self.places(np.arange(self.size - len(values), self.size)), {name: values})

    def tensors(self) -> dict[str, np.ndarray]:
        """Returns all rows [size,…], oldest first, by field."""
        return {name: self.read(name) for name in self.stores}

    def restore(self, tensors: Mapping[str, np.ndarray]) -> None:
        """Replaces the contents by these rows [n,…]."""
        self.clear()
        self.add(**tensors)
        self.flush()


def fields(names: tuple[str, ...], obs_shape: tuple[int, ...], action_shape: tuple[int, ...]) -> dict[str, tuple]:
    """Returns the shapes of these fields of `Transitions`: observations [To,O], actions [Ta,A], numbers."""
    shapes: dict[str, tuple[int, ...]] = {"obs": obs_shape, "next_obs": obs_shape, "actions": action_shape}
    return {name: () if name in SCALARS else shapes[name] for name in names}
