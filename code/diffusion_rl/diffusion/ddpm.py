"""Steps of DDPM (Ho et al. 2020) as pure functions. Coefficients are tables' entries, broadcastable to x [B,H,A].

x      x_t, the noisy chunk           x0     the network's estimate of the clean chunk
eps    predicted noise                abar   alphas_cumprod
"""

from __future__ import annotations

from diffusion_rl.core.typing import Array


def q_sample(x0: Array, noise: Array, sqrt_abar: Array, sqrt_one_minus_abar: Array) -> Array:
    """Returns x_t [B,H,A] = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps (eq. 4)."""
    return sqrt_abar * x0 + sqrt_one_minus_abar * noise


def predict_x0(x: Array, eps: Array, sqrt_recip_abar: Array, sqrt_recipm1_abar: Array) -> Array:
    """Returns x_0 [B,H,A] = sqrt(1/abar_t) x_t - sqrt(1/abar_t - 1) eps (eq. 4, solved for x_0)."""
    return sqrt_recip_abar * x - sqrt_recipm1_abar * eps


def posterior_mean(x: Array, x0: Array, mu_coef1: Array, mu_coef2: Array) -> Array:
    """Returns the mean [B,H,A] of q(x_{t-1} | x_t, x_0) (eq. 7)."""
    return mu_coef1 * x0 + mu_coef2 * x
