"""Noise schedules of DDPM and DDIM.

    beta_t                  variance added by step t
    alphas_cumprod_t        abar_t = prod_{s<=t} (1 - beta_s)

Notation of Ho et al. 2020 (DDPM), Nichol & Dhariwal 2021 (cosine schedule) and Song et al. 2021 (DDIM, whose alpha is
DDPM's abar). Everything is computed in float32, in the reference's order of operations, whatever precision the
networks run in: these tables are part of the model.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from diffusion_rl.core.errors import UserError

f32 = np.float32


def cosine_betas(denoising_steps: int, s: float = 0.008) -> np.ndarray:
    """Returns the cosine schedule (Nichol & Dhariwal 2021, eq. 17), [K] float32, clipped at 0.999."""
    steps = denoising_steps + 1
    x = np.linspace(0, steps, steps)  # ends at K + 1, not K: the reference's grid
    abar = np.cos((x / steps + s) / (1 + s) * np.pi * 0.5) ** 2
    abar = abar / abar[0]
    return np.clip(1 - abar[1:] / abar[:-1], 0, 0.999).astype(f32)


@dataclass(frozen=True)
class DDPMSchedule:
    """Tables [K] of DDPM."""

    betas: np.ndarray
    alphas: np.ndarray
    alphas_cumprod: np.ndarray
    alphas_cumprod_prev: np.ndarray
    sqrt_alphas_cumprod: np.ndarray
    sqrt_one_minus_alphas_cumprod: np.ndarray
    sqrt_recip_alphas_cumprod: np.ndarray
    sqrt_recipm1_alphas_cumprod: np.ndarray
    ddpm_var: np.ndarray
    ddpm_logvar_clipped: np.ndarray
    ddpm_mu_coef1: np.ndarray
    ddpm_mu_coef2: np.ndarray


def ddpm_schedule(denoising_steps: int) -> DDPMSchedule:
    """Returns all tables of DDPM for K denoising steps."""
    one = f32(1.0)
    betas = cosine_betas(denoising_steps)
    alphas = one - betas
    abar = np.cumprod(alphas, dtype=np.float64).astype(f32)  # torch accumulates in double and rounds each entry
    abar_prev = np.concatenate([np.ones(1, f32), abar[:-1]])
    var = betas * (one - abar_prev) / (one - abar)
    return DDPMSchedule(
        betas=betas,
        alphas=alphas,
        alphas_cumprod=abar,
        alphas_cumprod_prev=abar_prev,
        sqrt_alphas_cumprod=np.sqrt(abar),
        sqrt_one_minus_alphas_cumprod=np.sqrt(one - abar),
        sqrt_recip_alphas_cumprod=np.sqrt(one / abar),
        sqrt_recipm1_alphas_cumprod=np.sqrt(one / abar - one),
        ddpm_var=var,
        ddpm_logvar_clipped=np.log(np.maximum(var, f32(1e-20))),
        ddpm_mu_coef1=betas * np.sqrt(abar_prev) / (one - abar),
        ddpm_mu_coef2=(one - abar_prev) * np.sqrt(alphas) / (one - abar),
    )


@dataclass(frozen=True)
class DDIMSchedule:
    """Tables [S] of DDIM, first entry = noisiest step. `ddim_t` are the DDPM steps visited."""

    ddim_t: np.ndarray
    ddim_alphas: np.ndarray
    ddim_alphas_sqrt: np.ndarray
    ddim_alphas_prev: np.ndarray
    ddim_sqrt_one_minus_alphas: np.ndarray
    ddim_sigmas: np.ndarray


def ddim_schedule(ddpm: DDPMSchedule, ddim_steps: int, discretize: str = "uniform") -> DDIMSchedule:
    """Returns evenly spaced steps 0, r, 2r, … with r = K // S ("leading" spacing), from noisy to clean.

    `ddim_sigmas` are those of eta = 0, that is zero.
    """
    if discretize != "uniform":
        raise UserError(f"ddim_discretize={discretize!r}: only 'uniform' is known")
    if not ddim_steps or ddim_steps > len(ddpm.betas):
        raise UserError(f"ddim_steps={ddim_steps}: give between 1 and denoising_steps={len(ddpm.betas)}")
    t = np.arange(ddim_steps) * (len(ddpm.betas) // ddim_steps)
    alphas = ddpm.alphas_cumprod[t]
    tables = (
        t,
        alphas,
        np.sqrt(alphas),
        np.concatenate([np.ones(1, f32), ddpm.alphas_cumprod[t[:-1]]]),
        np.sqrt(f32(1.0) - alphas),
        np.zeros(ddim_steps, f32),
    )
    return DDIMSchedule(*(table[::-1].copy() for table in tables))
