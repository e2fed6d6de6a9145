"""The process of DDPM (Ho et al. 2020), for policies and planners: noising, and the posterior of a denoising step.

x    x_t [B,H,D], the noisy chunk or trajectory      x0   the estimate of the clean one
eps  predicted noise                                 t    [B], integers in [0, K)
"""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
import tensorflow as tf

from diffusion_rl.diffusion.schedules import DDPMSchedule

Array: TypeAlias = tf.Tensor


def entries(table: np.ndarray, index: Array, dtype: tf.DType) -> Array:
    """Looks up entries of a table [K] for a batch of indices [B], as [B,1,1]."""
    return tf.gather(tf.constant(table, dtype), index)[:, None, None]


def q_sample(s: DDPMSchedule, x0: Array, t: Array, noise: Array) -> Array:
    """Returns x_t [B,H,D] = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps (eq. 4)."""
    signal = entries(s.sqrt_alphas_cumprod, t, x0.dtype)
    return signal * x0 + entries(s.sqrt_one_minus_alphas_cumprod, t, x0.dtype) * noise


def predict_x0(s: DDPMSchedule, x: Array, t: Array, eps: Array) -> Array:
    """Returns x_0 [B,H,D] = sqrt(1/abar_t) x_t - sqrt(1/abar_t - 1) eps (eq. 4, solved for x_0)."""
    scale = entries(s.sqrt_recip_alphas_cumprod, t, x.dtype)
    return scale * x - entries(s.sqrt_recipm1_alphas_cumprod, t, x.dtype) * eps


def posterior_mean(s: DDPMSchedule, x: Array, t: Array, x0: Array) -> Array:
    """Returns the mean [B,H,D] of q(x_{t-1} | x_t, x_0) (eq. 7)."""
    return entries(s.ddpm_mu_coef1, t, x.dtype) * x0 + entries(s.ddpm_mu_coef2, t, x.dtype) * x


def posterior_log_variance(s: DDPMSchedule, t: Array, dtype: tf.DType) -> Array:
    """Returns the logarithm of the variance of q(x_{t-1} | x_t, x_0), clipped, [B,1,1]."""
    return entries(s.ddpm_logvar_clipped, t, dtype)
