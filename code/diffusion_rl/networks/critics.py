"""Value and action-value networks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from diffusion_rl.core.errors import UserError
from diffusion_rl.core.keras import floatx
from diffusion_rl.core.typing import Array
from diffusion_rl.networks.layers import Network, flatten_state, named_variables, variables_of, with_variables
from diffusion_rl.networks.mlp import MLP, ResidualMLP


class CriticObs(Network):
    """State value: the flattened observation history to one number."""

    def __init__(
        self,
        cond_dim: int,
        mlp_dims: Sequence[int],
        activation_type: str = "Mish",
        use_layernorm: bool = False,
        residual_style: bool = False,
        **unused: Any,
    ):
        super().__init__(dtype=floatx())
        self.cond_dim = cond_dim
        self.Q1 = (ResidualMLP if residual_style else MLP)(
            [cond_dim, *mlp_dims, 1], activation_type=activation_type, use_layernorm=use_layernorm
        )

    def call(self, cond: dict[str, Array] | Array) -> Array:
        """Maps {"state": [B,To,O]} or features [B,F] to [B,1]."""
        return self.Q1(flatten_state(cond) if isinstance(cond, dict) else cond)


class CriticObsAct(Network):
    """Action value, with a second network for double Q-learning.

    The reference spells its argument `residual_tyle` and ignores the `residual_style` that its configurations pass,
    so that these critics are plain MLPs; published results rest on that, so it is kept.
    """

    def __init__(
        self,
        cond_dim: int,
        mlp_dims: Sequence[int],
        action_dim: int,
        action_steps: int = 1,
        activation_type: str = "Mish",
        use_layernorm: bool = False,
        residual_tyle: bool = False,
        double_q: bool = True,
        **unused: Any,
    ):
        super().__init__(dtype=floatx())
        dims = [cond_dim + action_dim * action_steps, *mlp_dims, 1]
        build = ResidualMLP if residual_tyle else MLP
        self.Q1 = build(dims, activation_type=activation_type, use_layernorm=use_layernorm)
        self.double_q = double_q
        if double_q:
            self.Q2 = build(dims, activation_type=activation_type, use_layernorm=use_layernorm)

    def call(self, cond: dict[str, Array], action: Array) -> Array | tuple[Array, Array]:
        """Maps cond {"state": [B,To,O]}, action [B,Ta,A] to (q1 [B], q2 [B]), or q1 alone without double Q."""
        x = _with_action(cond, action)
        q1 = tf.squeeze(self.Q1(x), -1)
        return (q1, tf.squeeze(self.Q2(x), -1)) if self.double_q else q1


class DistributionalCritic(Network):
    """Two Gaussians over the return of an action (DSAC-T, Duan et al. 2023, arXiv:2310.05858)."""

    def __init__(
        self,
        cond_dim: int,
        mlp_dims: Sequence[int],
        action_dim: int,
        action_steps: int = 1,
        activation_type: str = "GELU",
    ):
        super().__init__(dtype=floatx())
        dims = [cond_dim + action_dim * action_steps, *mlp_dims, 2]
        self.Q1 = MLP(dims, activation_type=activation_type)
        self.Q2 = MLP(dims, activation_type=activation_type)

    def call(self, cond: dict[str, Array], action: Array) -> tuple[Array, Array]:
        """Maps cond {"state": [B,To,O]}, action [B,Ta,A] to mean [2,B], standard deviation [2,B]."""
        x = _with_action(cond, action)
        outputs = tf.stack([self.Q1(x), self.Q2(x)])
        return outputs[..., 0], tf.nn.softplus(outputs[..., 1])


class CriticEnsemble(Network):
    """M action values by one batched product per layer (RLPD, Ball et al. 2023): weights with a leading axis M.

    The reference starts all members as copies of one network: `CriticEnsemble([critic] * M)`.

    Args:
        members: M networks of the same architecture, of one output each, whose weights are stacked. They are not kept.
    """

    def __init__(self, members: Sequence[CriticObsAct]):
        super().__init__(dtype=floatx())
        if any(member.double_q for member in members):
            raise UserError("members of an ensemble of critics have one value each: set critic.double_q to false")
        self.size = len(members)
        weights = [dict(named_variables(member)) for member in members]
        self.members = with_variables(
            members[0],
            lambda path, variable: tf.Variable(tf.stack([w[path] for w in weights]), trainable=variable.trainable),
        )
        self._stacked = variables_of(self.members)  # Keras does not look into what `with_variables` returns

    def call(self, cond: dict[str, Array], action: Array, subset: Array | None = None) -> Array:
        """Maps cond {"state": [B,To,O]}, action [B,Ta,A] to [M,B]; with `subset` [N] of indices only these: [N,B]."""
        if subset is None:
            return self.members(cond, action)
        return with_variables(self.members, lambda path, variable: tf.gather(variable, subset))(cond, action)


def _with_action(cond: dict[str, Array], action: Array) -> Array:
    """Maps cond {"state": [B,To,O]}, action [B,Ta,A] to [B, To*O + Ta*A]."""
    action = tf.convert_to_tensor(action)
    flat_action = tf.reshape(action, [tf.shape(action)[0], -1])
    return tf.concat([flatten_state(cond), tf.ensure_shape(flat_action, [None, _flat_dim(action)])], axis=-1)


def _flat_dim(action: Array) -> int | None:
    dims = action.shape[1:]
    return int(tf.TensorShape(dims).num_elements()) if dims.is_fully_defined() else None
