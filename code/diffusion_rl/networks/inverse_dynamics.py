"""The action that leads from one state to the next (DiffuserLite's `FancyMlpInvDynamic`)."""

from __future__ import annotations

import tensorflow as tf

from diffusion_rl.core.keras import floatx
from diffusion_rl.core.typing import Array
from diffusion_rl.networks.layers import LayerNorm, Linear, Network, dropped, gelu


class InverseDynamics(Network):
    """[s, s'] -> action in [-1, 1].

    Args:
        o_dim, a_dim, hidden_dim: O, A and the width.
        dropout: share of the first layer's features that training drops.
        add_norm: LayerNorm after the first layer.
    """

    def __init__(self, o_dim: int, a_dim: int, hidden_dim: int = 256, dropout: float = 0.1, add_norm: bool = False):
        super().__init__(dtype=floatx())
        self.hidden_dim, self.dropout = hidden_dim, dropout
        norm = LayerNorm(hidden_dim) if add_norm else tf.identity
        first, second, last = Linear(2 * o_dim, hidden_dim), Linear(hidden_dim, hidden_dim), Linear(hidden_dim, a_dim)
        self.model = [first, gelu, norm, None, second, gelu, last, tf.tanh]  # None: where dropout stands

    def call(self, state: Array, following: Array, keep: Array | None = None) -> Array:
        """Maps state, following [...,O] normalised to [...,A]; `keep` [...,hidden_dim] is dropout's 0/1 mask."""
        x = tf.concat([state, following], axis=-1)
        for step in self.model:
            x = dropped(x, keep, self.dropout) if step is None else step(x)
        return x
