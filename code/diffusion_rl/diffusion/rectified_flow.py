"""Rectified flow (Liu et al. 2023, arXiv:2209.03003): straight paths from noise to data, and Euler's method along them.

Legend: x0 data, x1 noise, t in [0, 1], x_t = x0 + t (x1 - x0); the network v(x_t, t) estimates x0 - x1, the velocity
from noise to data. Some entries of a sample may be known: they are exact on the whole path.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import tensorflow as tf

from diffusion_rl.core.typing import Array

Velocity = Callable[[Array, Array], Array]  # (x [B,...], t [B]) -> [B,...]
EXPONENT = 1.5


def put(x: Array, known: Array, mask: np.ndarray | None) -> Array:
    """Returns x [B,H,O] with the known entries, where mask [H,O] is 1, in place."""
    return x if mask is None else tf.where(mask > 0, known, x)


def time_grid(steps: int, exponent: float = EXPONENT, start: float = 0.0, end: float = 1.0) -> np.ndarray:
    """Returns times [steps+1], start + (end - start) (k / steps)^exponent for k = 0 … steps: dense near the data."""
    return start + (end - start) * np.linspace(0, 1, steps + 1) ** exponent


def interpolate(x0: Array, x1: Array, t: Array) -> Array:
    """Returns x_t [B,H,O] at t [B]."""
    return x0 + t[:, None, None] * (x1 - x0)


def mean_error(
    estimate: Array, aim: Array, mask: np.ndarray | None, weights: np.ndarray | None, states: slice | None
) -> Array:
    """Returns the mean squared error over all entries of `aim` [B,H,O], weighted; known entries count as zeros.

    Args:
        mask: 1 where entries are known [H,O];  weights: of the errors [H,O].
        states: those of the estimate; None: all. All others are known.
    """
    chosen = slice(None) if states is None else states
    errors = tf.square(estimate - aim[:, chosen])
    for factor in (weights, None if mask is None else 1 - mask):
        if factor is not None:
            errors *= tf.constant(factor[chosen], errors.dtype)
    return tf.reduce_mean(errors) * (errors.shape[1] / aim.shape[1])


def loss(
    velocity: Velocity,
    x0: Array,
    x1: Array,
    t: Array,
    mask: np.ndarray | None = None,
    weights: np.ndarray | None = None,
    states: slice | None = None,
) -> Array:
    """Returns the mean weighted squared error of the velocity; arguments as of `mean_error`, x0 and x1 [B,H,O] data and
    noise."""
    estimate = velocity(put(interpolate(x0, x1, t), x0, mask), t)
    return mean_error(estimate, x0 - x1, mask, weights, states)


def guided(conditional: Array, unconditional: Array, weight: float) -> Array:
    """Mixes outputs [B,...] (Ho & Salimans 2022): weight 1 is the conditional model alone, 0 the other."""
    return weight * conditional + (1 - weight) * unconditional


class Steps(NamedTuple):
    """The steps of sampling, from noise to data: x <- keep x + gain v(x, time), each [N]."""

    times: np.ndarray
    keep: np.ndarray
    gain: np.ndarray


def steps(grid: np.ndarray) -> Steps:
    """Returns Euler's steps on a grid [N+1]: x <- x + (s_k - s_{k-1}) v(x, s_k) for k = N … 1, s_0 … s_N ascending."""
    return Steps(grid[:0:-1], np.ones(len(grid) - 1), np.diff(grid)[::-1])


def sample(
    velocity: Velocity,
    x1: Array,
    steps: Steps,
    known: Array | None = None,
    mask: np.ndarray | None = None,
    repeat_last: int = 0,
) -> Array:
    """Goes from noise x1 [B,H,O] to data, unrolled.

    Args:
        known: [B,H,O], put where mask [H,O] is 1, before and after each step.
        repeat_last: how often the last step is made once more.
    """
    x = x1 if known is None else put(x1, known, mask)
    count = len(steps.times)
    for k in [*range(count), *[count - 1] * repeat_last]:
        t = tf.fill([tf.shape(x)[0]], tf.constant(steps.times[k], x.dtype))
        x = tf.constant(steps.keep[k], x.dtype) * x + tf.constant(steps.gain[k], x.dtype) * velocity(x, t)
        x = x if known is None else put(x, known, mask)
    return x
