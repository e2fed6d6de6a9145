"""Gaussian mixture policy networks: means, standard deviations and weights of the modes of an action chunk.

Shape letters: B batch, To observation history, O observation, H horizon, A action, M modes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from diffusion_rl.core.keras import floatx
from diffusion_rl.core.typing import Array
from diffusion_rl.networks.layers import flatten_state
from diffusion_rl.networks.mlp import MLP, ResidualMLP
from diffusion_rl.networks.spread import SpreadOwner


class GMMMLP(SpreadOwner):
    """Three separate networks on the observation history: means, standard deviations, logits of the modes.

    Args:
        action_dim, horizon_steps: A and H.
        cond_dim: width of the flattened observation history, To * O.
        mlp_dims: hidden dimensions, of each network.
        num_modes: M.
        **spread: of `SpreadOwner.init_spread`; predicted standard deviations are clamped to their range.
    """

    ALSO_TAKES = (SpreadOwner.init_spread,)

    def __init__(
        self,
        action_dim: int,
        horizon_steps: int,
        cond_dim: int,
        mlp_dims: Sequence[int] = (256, 256, 256),
        num_modes: int = 5,
        activation_type: str = "Mish",
        residual_style: bool = False,
        use_layernorm: bool = False,
        **spread: Any,
    ):
        super().__init__(dtype=floatx())
        self.action_dim, self.horizon_steps = action_dim, horizon_steps
        self.cond_dim, self.num_modes = cond_dim, num_modes

        def mlp(outputs: int) -> MLP | ResidualMLP:
            build = ResidualMLP if residual_style else MLP
            dims = [cond_dim, *mlp_dims, outputs]
            return build(dims, activation_type=activation_type, use_layernorm=use_layernorm)

        outputs = action_dim * horizon_steps * num_modes
        self.mlp_mean = mlp(outputs)
        if spread.get("fixed_std") is None:
            self.mlp_logvar = mlp(outputs)
        self.init_spread(num_modes * action_dim, **spread)
        self.mlp_weights = mlp(num_modes)

    def call(self, cond: dict[str, Array]) -> tuple[Array, Array, Array]:
        """Maps {"state": [B,To,O]} to means and standard deviations [B,M,H*A], step by step, and logits [B,M]."""
        state = flatten_state(cond)
        mean = self._by_mode(tf.tanh(self.mlp_mean(state)))
        if self.fixed_std is None:
            std = self.clamped_std(self._by_mode(self.mlp_logvar(state)))
        else:
            std = self.constant_std(mean, self.horizon_steps)
        return mean, std, self.mlp_weights(state)

    def _by_mode(self, flat: Array) -> Array:
        return tf.reshape(flat, [-1, self.num_modes, self.horizon_steps * self.action_dim])
