"""Diffusion with continuous time as DiffuserLite's third backbone: our reconstruction, its code is not published.

The variance-preserving process (Song et al. 2021): log a(t) = -(b1 - b0) t^2 / 4 - b0 t / 2, s(t)^2 = 1 - a(t)^2,
x_t = a x_0 + s e; the network estimates e. Sampling is deterministic (DDIM, which is first-order DPM-Solver).
The functions have the arguments of those in `rectified_flow`, whose `sample` takes the steps.
"""

from __future__ import annotations

import numpy as np
import tensorflow as tf

from diffusion_rl.core.typing import Array
from diffusion_rl.diffusion.rectified_flow import Steps, Velocity, mean_error, put

BETA_0, BETA_1 = 0.1, 20.0
EARLIEST = 1e-3  # time is in [EARLIEST, 1]


def signal(t: Array | np.ndarray) -> Array | np.ndarray:
    """Returns log a(t) [...] of times t [...]."""
    return -(BETA_1 - BETA_0) * t * t / 4 - BETA_0 * t / 2


def loss(
    noise_of: Velocity,
    x0: Array,
    x1: Array,
    t: Array,
    mask: np.ndarray | None = None,
    weights: np.ndarray | None = None,
    states: slice | None = None,
) -> Array:
    """Returns the mean weighted squared error of the noise x1; `t` [B] uniform in [0, 1)."""
    t = EARLIEST + (1 - EARLIEST) * t
    a = tf.exp(signal(t))[:, None, None]
    estimate = noise_of(put(a * x0 + tf.sqrt(1 - a * a) * x1, x0, mask), t)
    return mean_error(estimate, x1, mask, weights, states)


def steps(grid: np.ndarray) -> Steps:
    """Returns steps on a grid [N+1]: x <- a_s x0 + s_s e with x0 = (x - s_t e) / a_t; the last step gives x0."""
    times = EARLIEST + (1 - EARLIEST) * grid
    a = np.exp(signal(times))
    s = np.sqrt(1 - a * a)
    a[0], s[0] = 1.0, 0.0
    keep = a[:-1] / a[1:]
    return Steps(times[:0:-1], keep[::-1], (s[:-1] - keep * s[1:])[::-1])
