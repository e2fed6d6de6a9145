"""The Gaussian every denoising step draws from."""

from __future__ import annotations

import tensorflow as tf

from diffusion_rl.core.keras import distributions
from diffusion_rl.core.typing import Array


def normal_log_prob(x: Array, mean: Array, std: Array) -> Array:
    """Returns log N(x; mean, std^2) elementwise, [...] as x."""
    return distributions().Normal(mean, std).log_prob(x)


def clip(x: Array, bound: float | None) -> Array:
    """Clamps x [...] elementwise to +-bound; no bound, no clamp."""
    return x if bound is None else tf.clip_by_value(x, -bound, bound)
