"""Likelihood of samples of a diffusion model by its probability-flow ODE (Song et al. 2021, arXiv:2011.13456).

    eq. 13   dx/dt = v(x, t) = f(x, t) - g(t)^2 score(x, t) / 2,    f = -beta(t) x / 2,    g^2 = beta(t)
    eq. 39   log p_0(x_0) = log p_T(x_T) + int_0^T div v(x_t, t) dt
    eq. 40   div v is estimated with random probes e of unit covariance: e' (dv/dx) e  (Hutchinson)

The reference takes DDPM's beta of a discrete step for beta(t), without the factor K that belongs to it on the unit
interval: its flow covers 1/K of the way to the prior, and its result is not the likelihood that DDPM samples with. It
is kept, because results rest on it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import tensorflow as tf

from diffusion_rl.core.errors import UserError
from diffusion_rl.diffusion.schedules import DDPMSchedule, f32

# Explicit Runge-Kutta methods: nodes c, coefficients a (a row per stage), weights b. rk4 is the 3/8 rule.
METHODS: dict[str, tuple[Sequence[float], Sequence[Sequence[float]], Sequence[float]]] = {
    "euler": ([0], [[]], [1]),
    "midpoint": ([0, 1 / 2], [[], [1 / 2]], [0, 1]),
    "heun2": ([0, 1], [[], [1]], [1 / 2, 1 / 2]),
    "rk4": ([0, 1 / 3, 2 / 3, 1], [[], [1 / 3], [-1 / 3, 1], [1, -1, 1]], [1 / 8, 3 / 8, 3 / 8, 1 / 8]),
}


class FlowTables(NamedTuple):
    """[K] of the flow, float32 like all schedules."""

    betas: np.ndarray
    sqrt_alphas: np.ndarray
    sqrt_one_minus_alphas_cumprod: np.ndarray


class VPSDE:
    """The variance-preserving SDE whose discretisation is DDPM (Song et al. 2021, appendix B).

    Args:
        N: number of discrete steps, as in the reference's configurations; the policy's schedule has as many.
    """

    def __init__(self, N: int = 1000):
        self.N = N

    def tables(self, schedule: DDPMSchedule, min_beta: float) -> FlowTables:
        """Returns the schedule's tables with every beta at least `min_beta`."""
        betas = np.maximum(schedule.betas, f32(min_beta))
        alphas = f32(1) - betas
        abar = np.cumprod(alphas, dtype=np.float64).astype(f32)
        raised = bool((betas != schedule.betas).any())
        root = np.sqrt(f32(1) - abar) if raised else schedule.sqrt_one_minus_alphas_cumprod
        return FlowTables(betas, np.sqrt(alphas), root)


def time_grid(start: float, step_size: float) -> list[float]:
    """Returns times from `start` to 1 in steps of `step_size`; the last step is what is left."""
    n_steps = math.ceil((1 - start) / step_size)
    return [start + i * step_size for i in range(n_steps)] + [1.0]


def integrate(
    derivative: Callable[[float, list[tf.Tensor]], list[tf.Tensor]],
    state: list[tf.Tensor],
    grid: Sequence[float],
    method: str,
) -> list[tf.Tensor]:
    """Solves d state / dt = derivative(t, state) for states [...] along the times of `grid`, step by step."""
    nodes, coefficients, weights = METHODS[method]
    for t0, t1 in itertools.pairwise(grid):
        dt = t1 - t0
        slopes: list[list[tf.Tensor]] = []
        for node, row in zip(nodes, coefficients, strict=True):
            slopes.append(derivative(t0 + node * dt, _advanced(state, slopes, row, dt)))
        state = _advanced(state, slopes, weights, dt)
    return state


def _advanced(
    state: list[tf.Tensor], slopes: list[list[tf.Tensor]], weights: Sequence[float], dt: float
) -> list[tf.Tensor]:
    for slope, weight in zip(slopes, weights, strict=True):
        if weight:
            state = [y + tf.constant(dt * weight, y.dtype) * k for y, k in zip(state, slope, strict=True)]
    return state


def require_method(method: str) -> None:
    """Raises UserError unless this package knows the integrator."""
    if method not in METHODS:
        raise UserError(f"model.sde_method={method}: take one of {', '.join(METHODS)} (the reference's runs use euler)")


def standard_normal_log_prob(x: tf.Tensor) -> tf.Tensor:
    """Returns log N(x; 0, 1) summed over all but the batch, [B,...] -> [B]."""
    axes = list(range(1, len(x.shape)))
    return -0.5 * tf.reduce_sum(tf.square(x) + tf.constant(math.log(2 * math.pi), x.dtype), axis=axes)
