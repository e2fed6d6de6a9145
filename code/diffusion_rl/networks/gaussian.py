"""Gaussian policy networks: mean and standard deviation of an action chunk.

Shape letters: B batch, To observation history, O observation, H horizon, A action.
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


class GaussianMLP(SpreadOwner):
    """Mean and standard deviation from the observation history.

    Args:
        action_dim, horizon_steps: A and H.
        cond_dim: width of the flattened observation history, To * O.
        mlp_dims: hidden dimensions.
        tanh_output: squash the mean (not for SAC and its kin, which squash the sample).
        **spread: of `SpreadOwner.init_spread`; standard deviations are predicted by a second head on a shared trunk and
            squashed into their range, learned fixed ones are clamped to it.
    """

    ALSO_TAKES = (SpreadOwner.init_spread,)

    def __init__(
        self,
        action_dim: int,
        horizon_steps: int,
        cond_dim: int,
        mlp_dims: Sequence[int] = (256, 256, 256),
        activation_type: str = "Mish",
        tanh_output: bool = True,
        residual_style: bool = False,
        use_layernorm: bool = False,
        dropout: float = 0.0,
        **spread: Any,
    ):
        super().__init__(dtype=floatx())
        self.action_dim, self.horizon_steps, self.cond_dim = action_dim, horizon_steps, cond_dim
        self.tanh_output, self.dropout = tanh_output, dropout
        build, output_dim = (ResidualMLP if residual_style else MLP), action_dim * horizon_steps
        common: dict[str, Any] = {
            "activation_type": activation_type,
            "use_layernorm": use_layernorm,
            "dropout": dropout,
        }
        if spread.get("fixed_std") is None:
            trunk: dict[str, Any] = {"out_activation_type": activation_type, "use_layernorm_final": use_layernorm}
            self.mlp_base = build([cond_dim, *mlp_dims], **trunk, **common)
            self.mlp_mean = MLP([mlp_dims[-1], output_dim])
            self.mlp_logvar = MLP([mlp_dims[-1], output_dim])
        else:
            self.mlp_mean = build([cond_dim, *mlp_dims, output_dim], **common)
        self.init_spread(action_dim, **spread)

    def masks_shapes(self, batch: int) -> list[tuple[int, int]]:
        """Returns the shapes of the 0/1 dropout masks that training draws, one for each hidden layer; none without
        dropout."""
        dropped = self.mlp_base if self.fixed_std is None else self.mlp_mean
        return dropped.masks_shapes(batch) if isinstance(dropped, MLP) else []

    def call(self, cond: dict[str, Array], keep_masks: Sequence[Array] = ()) -> tuple[Array, Array]:
        """Maps {"state": [B,To,O]} to mean, standard deviation, both [B,H*A], step by step.

        `keep_masks`: see `masks_shapes`; none in evaluation.
        """
        state, masks = flatten_state(cond), {"keep_masks": keep_masks} if keep_masks else {}
        if self.fixed_std is None:
            state, masks = self.mlp_base(state, **masks), {}
        mean = self.mlp_mean(state, **masks)
        if self.tanh_output:
            mean = tf.tanh(mean)
        if self.fixed_std is None:
            return mean, self.squashed_std(self.mlp_logvar(state))
        return mean, self.constant_std(mean, self.horizon_steps)
