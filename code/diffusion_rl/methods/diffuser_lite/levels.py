"""The levels of DiffuserLite's plans: their shapes, the model of one, and how they are sampled.

Shape letters: B batch, H states of a level, O observation.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import tensorflow as tf

from diffusion_rl.core.errors import UserError
from diffusion_rl.diffusion import rectified_flow, vp_flow
from diffusion_rl.networks.dit import ConditionalDiT
from diffusion_rl.networks.layers import Array, clone, dtype_of

BACKBONES = {"flow": rectified_flow, "diffusion": vp_flow}


class LevelShape(NamedTuple):
    """What one level plans."""

    states: int  # H
    stride: int  # environment steps between them
    span: int  # environment steps from the first to the last, both counted


def level_shapes(planning_horizons: Sequence[int]) -> list[LevelShape]:
    """Returns the levels from coarse to fine: the first interval of one is the whole of the next.

    [5, 5, 9] spans 129, 33 and 9 steps, in strides of 32, 8 and 1.
    """
    shapes = [LevelShape(planning_horizons[-1], 1, planning_horizons[-1])]
    for states in reversed(planning_horizons[:-1]):
        stride = shapes[0].span - 1
        shapes.insert(0, LevelShape(states, stride, (states - 1) * stride + 1))
    return shapes


class PlanLevel:
    """A level's model of H states given a return; the first state is known, below the first level the last one, too.

    Args:
        network: trained; `ema` is its average.
        states: H.
        first: whether it is the coarsest level.
        next_obs_weight: of the error of the second state.
        backbone: "flow" (rectified flow) or "diffusion".
    """

    def __init__(
        self,
        network: ConditionalDiT,
        states: int,
        observation_dim: int,
        first: bool,
        next_obs_weight: float = 10.0,
        backbone: str = "flow",
    ):
        if backbone not in BACKBONES:
            raise UserError(f"backbone={backbone!r}: choose one of {', '.join(BACKBONES)}")
        self.network, self.ema, self.backbone = network, clone(network), BACKBONES[backbone]
        self.shape = states, observation_dim
        self.mask: np.ndarray | None = np.zeros(self.shape, np.float32)
        self.mask[[0] if first else [0, -1]] = 1
        self.weights: np.ndarray | None = np.ones(self.shape, np.float32)
        self.weights[1] = next_obs_weight

    @property
    def unknown(self) -> slice:
        """Returns the states from the first to the last of which something is not known."""
        if self.mask is None:
            return slice(self.shape[0])
        some = np.flatnonzero((self.mask == 0).any(axis=1))
        return slice(int(some[0]), int(some[-1]) + 1)

    @property
    def dtype(self) -> tf.DType:
        return dtype_of(self.network)

    def loss(self, x0: Array, x1: Array, t: Array, condition: Array | None = None, keep: Array | None = None) -> Array:
        """Returns the loss of clean plans and noise [B,H,O] at t [B] in [0, 1); condition [B,1], keep [B] of 0, 1."""

        def output(x: Array, t: Array) -> Array:
            return self.network(x, t, condition, keep, self.unknown)

        return self.backbone.loss(output, x0, x1, t, self.mask, self.weights, self.unknown)

    def sample(
        self,
        noise: Array,
        known: Array,
        grid: np.ndarray,
        condition: Array | None = None,
        guidance: float = 0.0,
        keep: Array | None = None,
        use_ema: bool = True,
        repeat_last: int = 0,
    ) -> Array:
        """Samples plans [B,H,O] from noise, unrolled over the steps.

        Args:
            known: [B,H,O], of which the known states count.
            grid: times, ascending from 0.
            condition: returns [B,1]; guidance: 0 ignores them, 1 is the conditional model, more exaggerates.
        """
        network = self.ema if use_ema else self.network
        embedded = None if condition is None else network.condition(condition, keep)

        def output(x: Array, t: Array) -> Array:
            if embedded is None or guidance == 0:
                return network.diffusion(x, t)
            if guidance == 1:
                return network.diffusion(x, t, embedded)
            both = tf.concat([embedded, tf.zeros_like(embedded)], axis=0)
            wanted, free = tf.split(network.diffusion(tf.concat([x, x], axis=0), tf.concat([t, t], axis=0), both), 2)
            return rectified_flow.guided(wanted, free, guidance)

        return rectified_flow.sample(output, noise, self.backbone.steps(grid), known, self.mask, repeat_last)


class Acting(NamedTuple):
    """How plans are sampled.

    Attributes:
        steps: denoising steps of every level.
        temperature: standard deviation of the first noise.
        guidance: of each level.
        candidates: plans of the first level, of which the one is taken whose state `judged` has the largest value.
        use_ema: sample from the averaged weights.
    """

    steps: int = 3
    temperature: float = 0.5
    guidance: tuple[float, ...] = (1.0, 1.0, 1.0)
    candidates: int = 1
    judged: int = -1
    use_ema: bool = True
