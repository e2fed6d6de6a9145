"""Implicit Q-learning (Kostrikov et al. 2022, arXiv:2110.06169): values that judge DiffuserLite's candidates.

Shape letters: B batch, O observation, A action.
"""

from __future__ import annotations

import tensorflow as tf

from diffusion_rl.core.ema import average_into
from diffusion_rl.core.keras import floatx, keras
from diffusion_rl.core.optimizers import AdamW, GradientSteps
from diffusion_rl.networks.iql import StateValue, TwinQ
from diffusion_rl.networks.layers import Array, copy_weights, variables_of

RATE = 3e-4
TARGET_DECAY = 0.995


class IQL(keras.layers.Layer):
    """Values, twin action values and their target.

    Args:
        tau: expectile; discount: per step.
        target_updates: of the target after every update of Q. The reference's scripts make two.
    """

    def __init__(
        self,
        obs_dim: int,
        act_dim: int,
        tau: float = 0.7,
        discount: float = 0.99,
        hidden_dim: int = 256,
        target_updates: int = 2,
    ):
        super().__init__(dtype=floatx())
        self.tau, self.discount, self.target_updates = tau, discount, target_updates
        self.Q, self.Q_targ = TwinQ(obs_dim, act_dim, hidden_dim), TwinQ(obs_dim, act_dim, hidden_dim)
        self.V = StateValue(obs_dim, hidden_dim)
        copy_weights(self.Q, self.Q_targ)

    def value_loss(self, obs: Array, act: Array) -> Array:
        """Regresses V by expectiles on the target's smaller value (equation 5); obs [B,O], act [B,A]."""
        advantage = self.Q_targ(obs, act) - self.V(obs)
        weight = tf.abs(self.tau - tf.cast(advantage < 0, advantage.dtype))
        return tf.reduce_mean(weight * tf.square(advantage))

    def action_value_loss(self, obs: Array, act: Array, reward: Array, following: Array, done: Array) -> Array:
        """Returns both action values against r + discount V(s') (equation 6); reward and done [B,1]."""
        target = tf.stop_gradient(reward + self.discount * (1 - done) * self.V(following))
        q1, q2 = self.Q.both(obs, act)
        return tf.reduce_mean(tf.square(q1 - target) + tf.square(q2 - target))


class IQLTrainer:
    """Adam on both losses, one after the other, and a moving target."""

    def __init__(self, iql: IQL):
        self.iql = iql
        self.optimizers = {"V": AdamW(variables_of(iql.V), RATE), "Q": AdamW(variables_of(iql.Q), RATE)}
        self.step = GradientSteps(self.optimizers)
        self.compiled = tf.function(self.update, autograph=False, reduce_retracing=True)

    def update(self, obs: Array, act: Array, reward: Array, following: Array, done: Array) -> tuple[Array, Array]:
        """Updates V, Q and the target on obs [B,O], act [B,A], …; returns the two losses. Graph-safe."""
        iql = self.iql
        loss_v = self.step("V", lambda: iql.value_loss(obs, act))
        loss_q = self.step("Q", lambda: iql.action_value_loss(obs, act, reward, following, done))
        for _ in range(iql.target_updates):
            average_into(variables_of(iql.Q_targ), variables_of(iql.Q), TARGET_DECAY)
        return loss_v, loss_q
