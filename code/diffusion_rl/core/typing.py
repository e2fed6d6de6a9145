"""Types that every layer names: tensors, and sources of random draws."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, runtime_checkable

import numpy as np

if TYPE_CHECKING:
    import tensorflow as tf

    Array: TypeAlias = tf.Tensor
else:
    Array: TypeAlias = Any  # so that who draws or plans without TensorFlow can import this module


class Rng(Protocol):
    """Draws random numbers: `core.noise.NoiseSource`, or a tape that replays recorded draws."""

    def normal(self, shape: Sequence[int], dtype: Any = np.float32) -> np.ndarray:
        """Draws standard normal numbers [*shape]."""
        ...

    def uniform(self, shape: Sequence[int], low: float = 0.0, high: float = 1.0, dtype: Any = np.float32) -> np.ndarray:
        """Draws numbers [*shape] uniformly from [low, high)."""
        ...

    def integers(self, low: int, high: int, shape: Sequence[int]) -> np.ndarray:
        """Draws int64 numbers [*shape] uniformly from low … high-1."""
        ...

    def permutation(self, n: int) -> np.ndarray:
        """Draws an order [n] of 0 … n-1."""
        ...

    def distinct(self, high: int, n: int) -> np.ndarray:
        """Draws different numbers [n] from 0 … high-1."""
        ...

    def choose(self, weights: np.ndarray) -> np.ndarray:
        """Draws an index [B] for each row of weights [B,N], in proportion to them."""
        ...


@runtime_checkable
class StatefulRng(Rng, Protocol):
    """Can also say where its stream stands, as JSON values, and continue there: what a training goes on with."""

    def state(self) -> dict[str, Any]:
        """Returns the whole state as JSON values."""
        ...

    def restore(self, state: dict[str, Any]) -> None:
        """Continues exactly where `state()` was taken."""
        ...
