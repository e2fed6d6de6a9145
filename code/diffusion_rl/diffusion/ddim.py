"""Steps of DDIM (Song et al. 2021) as pure functions; `alpha` here is DDPM's alphas_cumprod, as in that paper.

x       x_t                    x0      estimate of the clean chunk
eps     predicted noise        sigma   standard deviation of the step
"""

from __future__ import annotations

import tensorflow as tf

from diffusion_rl.core.typing import Array


def predict_x0(x: Array, eps: Array, alpha: Array, sqrt_one_minus_alpha: Array) -> Array:
    """Returns x_0 [B,H,A] = (x_t - sqrt(1 - alpha_t) eps) / sqrt(alpha_t) (eq. 9)."""
    return (x - sqrt_one_minus_alpha * eps) / tf.sqrt(alpha)


def noise_from_x0(x: Array, x0: Array, alpha: Array, sqrt_one_minus_alpha: Array) -> Array:
    """Returns the noise [B,H,A] that goes with a clamped x_0: eq. 9 solved for eps."""
    return (x - tf.sqrt(alpha) * x0) / sqrt_one_minus_alpha


def sigma(eta: Array, alpha: Array, alpha_prev: Array) -> Array:
    """Returns eta sqrt((1 - alpha_{t-1}) / (1 - alpha_t)) sqrt(1 - alpha_t / alpha_{t-1}) (eq. 16), [B,1,1] or
    [B,1,A]."""
    return eta * tf.sqrt((1 - alpha_prev) / (1 - alpha) * (1 - alpha / alpha_prev))


def step_mean(x0: Array, eps: Array, alpha_prev: Array, direction: Array) -> Array:
    """Returns the mean [B,H,A] = sqrt(alpha_{t-1}) x_0 + direction eps (eq. 12).

    The direction is sqrt(1 - alpha_{t-1} - sigma^2).
    """
    return tf.sqrt(alpha_prev) * x0 + direction * eps
