"""Networks of the Kuka experiments (Janner et al. 2022, section 5.3), which see whole trajectories of states.

Shape letters: B batch, H horizon, D width of a state, L logits.
"""

from __future__ import annotations

from collections.abc import Sequence

import tensorflow as tf

from diffusion_rl.core.keras import floatx
from diffusion_rl.core.typing import Array
from diffusion_rl.networks.layers import Linear, Network, TimeEmbedding, gelu, mish, sequential
from diffusion_rl.networks.temporal_unet import ResidualTemporalBlock, TemporalUnet


class MaskedTemporalUnet(TemporalUnet):
    """The U-Net that knows which states are given: by one more channel, and beside the time in every block.

    Every block has attention of its own.

    Args:
        horizon: H; the network works for this one only.
        transition_dim: D.
        dim, dim_mults: channels of the levels are dim times these.
    """

    def __init__(self, horizon: int, transition_dim: int, dim: int = 128, dim_mults: Sequence[int] = (1, 2, 4, 8)):
        super().__init__(horizon, transition_dim, 0, dim, dim_mults, input_dim=transition_dim + 1)
        self.cond_mlp = [Linear(horizon, 2 * dim), mish, Linear(2 * dim, dim)]

    def block(self, before: int, after: int, dim: int) -> ResidualTemporalBlock:
        return ResidualTemporalBlock(before, after, 2 * dim, attention=True)

    def call(self, x: Array, time: Array, mask: Array) -> Array:  # type: ignore[override]  # one more input
        """Maps x [B,H,D], time [B] or [1] integers, mask [B,H] or [1,H] (1: known, 0: not) to noise [B,H,D]."""
        where, t = sequential(self.cond_mlp, mask), self.time_mlp(time)
        rows = tf.maximum(tf.shape(where)[0], tf.shape(t)[0])
        seen = tf.concat([tf.broadcast_to(part, [rows, part.shape[1]]) for part in (where, t)], axis=-1)
        channel = tf.broadcast_to(mask, tf.shape(x)[:2])[..., None]
        return self.denoise(tf.concat([x, channel], axis=-1), seen)


class StackClassifier(Network):
    """Logits of every noisy state by itself, whatever comes before and after: an MLP into which the time is added.

    Args:
        observation_dim: D.
        hidden_dims: of the layers between.
        out_dim: L.
        time_dim: width of the time embedding.
    """

    def __init__(
        self, observation_dim: int, hidden_dims: Sequence[int] = (128, 128, 128), out_dim: int = 12, time_dim: int = 128
    ):
        super().__init__(dtype=floatx())
        dims = [observation_dim, *hidden_dims]
        self.linears = [Linear(a, b) for a, b in zip(dims, [*hidden_dims, out_dim], strict=True)]
        self.time_model = TimeEmbedding(time_dim, expansion=4)
        self.shifts = [Linear(time_dim, width) for width in dims]

    def call(self, x: Array, time: Array) -> Array:
        """Maps x [B,H,D], time [B] or [1] integers to [B,H,L]."""
        t = mish(self.time_model(time))
        for linear, shift in zip(self.linears, self.shifts, strict=True):
            x = linear(x + shift(t)[:, None])
            x = gelu(x) if linear is not self.linears[-1] else x
        return x
