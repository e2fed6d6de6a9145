"""Values of states and of actions for implicit Q-learning (Kostrikov et al. 2022), as DiffuserLite has them."""

from __future__ import annotations

import tensorflow as tf

from diffusion_rl.core.keras import floatx
from diffusion_rl.core.typing import Array
from diffusion_rl.networks.layers import LayerNorm, Linear, Network, mish, sequential


def perceptron(in_dim: int, hidden_dim: int) -> list:
    """Makes two hidden layers with LayerNorm and Mish, and one output."""
    first = [Linear(in_dim, hidden_dim), LayerNorm(hidden_dim), mish]
    return [*first, Linear(hidden_dim, hidden_dim), LayerNorm(hidden_dim), mish, Linear(hidden_dim, 1)]


class TwinQ(Network):
    """Two action values."""

    def __init__(self, obs_dim: int, act_dim: int, hidden_dim: int = 256):
        super().__init__(dtype=floatx())
        self.Q1 = perceptron(obs_dim + act_dim, hidden_dim)
        self.Q2 = perceptron(obs_dim + act_dim, hidden_dim)

    def both(self, obs: Array, act: Array) -> tuple[Array, Array]:
        """Maps obs [B,O], act [B,A] to two of [B,1]."""
        x = tf.concat([obs, act], axis=-1)
        return sequential(self.Q1, x), sequential(self.Q2, x)

    def call(self, obs: Array, act: Array) -> Array:
        """Returns the smaller one, [B,1]."""
        return tf.minimum(*self.both(obs, act))


class StateValue(Network):
    """The value of a state."""

    def __init__(self, obs_dim: int, hidden_dim: int = 256):
        super().__init__(dtype=floatx())
        self.V = perceptron(obs_dim, hidden_dim)

    def call(self, obs: Array) -> Array:
        """Maps [...,O] to [...,1]."""
        return sequential(self.V, obs)
