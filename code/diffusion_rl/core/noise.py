"""The only source of randomness.

Everything that draws takes the draw as an argument; the loops obtain it here. A `NoiseSource` is a counter-based
generator whose whole state is a small JSON value, so a run that goes on continues the very same stream, and a
`NoiseTape` replays draws recorded elsewhere (in the PyTorch reference, say), so that both frameworks see one noise.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from diffusion_rl.core.typing import Rng


class NoiseSource:
    """Random draws as numpy arrays, with a state that can be saved and restored exactly."""

    def __init__(self, seed: int | Sequence[int]):
        self._generator = np.random.Generator(np.random.Philox(seed))

    def normal(self, shape: Sequence[int], dtype: Any = np.float32) -> np.ndarray:
        """Draws standard normal numbers [*shape]."""
        return self._generator.standard_normal(tuple(shape), dtype=dtype)

    def uniform(self, shape: Sequence[int], low: float = 0.0, high: float = 1.0, dtype: Any = np.float32) -> np.ndarray:
        """Draws numbers [*shape] uniformly from low (included) to high (excluded)."""
        return (low + (high - low) * self._generator.random(tuple(shape))).astype(dtype)

    def integers(self, low: int, high: int, shape: Sequence[int]) -> np.ndarray:
        """Draws int64 numbers [*shape] uniformly from low … high-1."""
        return self._generator.integers(low, high, tuple(shape))

    def permutation(self, n: int) -> np.ndarray:
        """Draws an order [n] of 0 … n-1, int64."""
        return self._generator.permutation(n)

    def distinct(self, high: int, n: int) -> np.ndarray:
        """Draws n different numbers [n] from 0 … high-1, int64."""
        return self._generator.choice(high, n, replace=False)

    def choose(self, weights: np.ndarray) -> np.ndarray:
        """Draws an index int64 [B] for each row of weights [B,N] (not negative, of any sum), in proportion to them."""
        cumulative = np.cumsum(weights, axis=1, dtype=np.float64)
        threshold = self._generator.random((len(weights), 1)) * cumulative[:, -1:]
        return np.minimum((cumulative <= threshold).sum(axis=1), weights.shape[1] - 1)

    def state(self) -> dict[str, Any]:
        """Returns the whole state as JSON values."""
        return _plain(self._generator.bit_generator.state)

    def restore(self, state: dict[str, Any]) -> None:
        """Continues exactly where `state()` was taken."""
        restored = dict(state)
        restored["state"] = {k: np.array(v, dtype=np.uint64) for k, v in state["state"].items()}
        restored["buffer"] = np.array(state["buffer"], dtype=np.uint64)
        self._generator.bit_generator.state = restored


class NoiseTape:
    """Replays recorded draws in order; the requested shape must be the recorded one.

    A request for [n, ...] is also served by n recorded draws of shape [...], stacked: the reference draws the noise
    of a denoising chain step by step, here it is drawn at once.
    """

    def __init__(self, draws: Sequence[np.ndarray]):
        self._draws = list(draws)
        self._next = 0

    def _take(self, shape: Sequence[int] | None) -> np.ndarray:
        if self._next >= len(self._draws):
            raise ValueError(f"the noise tape holds {len(self._draws)} draws; one more was asked for")
        draw = np.asarray(self._draws[self._next])
        if shape is not None and draw.shape == tuple(shape[1:]):
            self._next += 1
            rest = [self._take(shape[1:]) for _ in range(shape[0] - 1)]
            return np.stack([draw, *rest])
        if shape is not None and draw.shape != tuple(shape):
            raise ValueError(f"draw {self._next} of the noise tape has shape {draw.shape}, asked for {tuple(shape)}")
        self._next += 1
        return draw

    def normal(self, shape: Sequence[int], dtype: Any = np.float32) -> np.ndarray:
        """Takes the next draw [*shape]."""
        return self._take(shape).astype(dtype)

    def uniform(self, shape: Sequence[int], low: float = 0.0, high: float = 1.0, dtype: Any = np.float32) -> np.ndarray:
        """Takes the next draw [*shape] from 0 to 1 and brings it between low and high."""
        return (low + (high - low) * self._take(shape)).astype(dtype)

    def integers(self, low: int, high: int, shape: Sequence[int]) -> np.ndarray:
        """Takes the next draw [*shape]."""
        return self._take(shape)

    def permutation(self, n: int) -> np.ndarray:
        """Takes the next draw [n]."""
        return self._take((n,))

    def distinct(self, high: int, n: int) -> np.ndarray:
        """Takes the next draw [n]."""
        return self._take((n,))

    def choose(self, weights: np.ndarray) -> np.ndarray:
        """Takes the next draw [B], for weights [B,N]."""
        return self._take((len(weights),))

    @property
    def remaining(self) -> int:
        """Draws not yet consumed."""
        return len(self._draws) - self._next


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, np.ndarray):
        return [int(v) for v in value]
    return value if isinstance(value, str) else int(value)


_init_rngs: list[Rng] = [NoiseSource(0)]


def init_rng() -> Rng:
    """Returns the source that networks draw their initial weights from (set it with `initial_weights`)."""
    return _init_rngs[-1]


@contextlib.contextmanager
def initial_weights(rng: Rng) -> Iterator[None]:
    """Lets networks built inside this block draw their initial weights from `rng`."""
    _init_rngs.append(rng)
    try:
        yield
    finally:
        _init_rngs.pop()


def normal_inside(shape: Any, dtype: Any) -> Any:
    """Draws standard normal numbers [*shape] in a compiled program, anew in every call: for exported policies only,
    which have no `NoiseSource`. TensorFlow and TensorFlow Lite seed them from the operating system."""
    import tensorflow as tf  # not above: command lines that need no TensorFlow import this module

    return tf.random.normal(shape, dtype=dtype)


def uniform_inside(shape: Any, dtype: Any) -> Any:
    """Draws numbers [*shape] uniformly in [0, 1), as `normal_inside` draws."""
    import tensorflow as tf

    return tf.random.uniform(shape, dtype=dtype)
