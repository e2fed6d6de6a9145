"""SAC: Soft Actor-Critic with a learned temperature (Haarnoja et al. 2018, arXiv:1812.05905).

    eq. 5, 6   the critics regress on  r + gamma (1 - terminated) (min_i Q_i'(o', a') - alpha log pi(a' | o'))
    eq. 9      the actor minimises     alpha log pi(a | o) - min_i Q_i(o, a)   with a = tanh(mean + std * noise)
    eq. 18     the temperature         alpha (log pi(a | o) + target entropy), see `SAC.loss_temperature` for the sign

Shapes: B batch, To observation history, H chunk, O observation, A action; cond = {"state": [B,To,O]}.
U cycles per compiled call, of C critic steps and P actor steps each. Noise, [B,H*A] standard normal, is an argument.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from diffusion_rl.core.ema import ema_update
from diffusion_rl.core.keras import keras
from diffusion_rl.core.optimizers import AdamW
from diffusion_rl.networks.layers import Array, variables_of
from diffusion_rl.policies.diffusion import clone
from diffusion_rl.policies.gaussian import GaussianPolicy


class Transitions(NamedTuple):
    """obs, next_obs [B,To,O], actions [B,H,A] in [-1,1], rewards [B], terminated [B] (1: nothing follows)."""

    obs: Array
    next_obs: Array
    actions: Array
    rewards: Array
    terminated: Array


class SAC(GaussianPolicy):
    """A Gaussian policy with double Q-learning and the three losses; they are functions of weights, batch and noise.

    Args:
        actor: network cond -> (mean, std) [B,H*A], without a squashed mean.
        critic: network (cond, action [B,H,A]) -> (q1 [B], q2 [B]); the target critic starts as its copy.
        horizon_steps: H.
        tanh_output: squash samples; the rest as in `GaussianPolicy`.
    """

    def __init__(
        self,
        actor: keras.layers.Layer,
        critic: keras.layers.Layer,
        horizon_steps: int,
        tanh_output: bool = True,
        **kwargs: Any,
    ):
        super().__init__(actor, horizon_steps, tanh_output=tanh_output, **kwargs)
        self.critic, self.target_critic = critic, clone(critic)

    def loss_critic(self, batch: Transitions, gamma: float, alpha: Array | float, noise: Array) -> Array:
        """Sum of both critics' mean squared Bellman errors; the target carries no gradient."""
        next_actions, next_log_prob = self.sample({"state": batch.next_obs}, noise)
        next_q = tf.minimum(*self.target_critic({"state": batch.next_obs}, next_actions))
        target = batch.rewards + gamma * (next_q - alpha * next_log_prob) * (1.0 - batch.terminated)
        target = tf.stop_gradient(target)
        q1, q2 = self.critic({"state": batch.obs}, batch.actions)
        return tf.reduce_mean(tf.square(q1 - target)) + tf.reduce_mean(tf.square(q2 - target))

    def loss_actor(self, obs: Array, alpha: Array | float, noise: Array) -> Array:
        """Mean of alpha log pi - min Q at reparametrised actions."""
        actions, log_prob = self.sample({"state": obs}, noise)
        return tf.reduce_mean(alpha * log_prob - tf.minimum(*self.critic({"state": obs}, actions)))

    def loss_temperature(self, obs: Array, alpha: Array, target_entropy: float, noise: Array) -> Array:
        """-mean(alpha (log pi + target entropy)): alpha grows while the entropy is below its target."""
        _, log_prob = self.sample({"state": obs}, noise)
        return -tf.reduce_mean(alpha * tf.stop_gradient(log_prob + target_entropy))

    def update_target_critic(self, tau: float) -> None:
        """target <- (1 - tau) target + tau critic."""
        for old, new in zip(variables_of(self.target_critic), variables_of(self.critic), strict=True):
            old.assign(ema_update(old, new, 1.0 - tau))


class SACUpdate:
    """The optimizers, the temperature, and many gradient steps in one compiled call.

    One cycle: C times a critic step and the target critic's, each on a batch of its own, then P times an actor and a
    temperature step on the last of these batches. The reference's usual ratios are C = P = 2.
    """

    def __init__(
        self,
        model: SAC,
        *,
        gamma: float,
        actor_lr: float,
        critic_lr: float,
        target_ema_rate: float,
        target_entropy: float,
        init_temperature: float = 1.0,
    ):
        self.model, self.gamma, self.tau, self.target_entropy = model, gamma, target_ema_rate, target_entropy
        self.actor_variables = [v for v in variables_of(model.network) if v.trainable]
        self.critic_variables = [v for v in variables_of(model.critic) if v.trainable]
        self.log_alpha = tf.Variable(np.log(init_temperature), dtype=tf.float64)
        self.actor_optimizer = AdamW(self.actor_variables, actor_lr)
        self.critic_optimizer = AdamW(self.critic_variables, critic_lr)
        self.alpha_optimizer = AdamW([self.log_alpha], critic_lr)
        self.run = tf.function(self._cycles, jit_compile=True)

    @property
    def alpha(self) -> Array:
        """The temperature in the precision of the weights."""
        return tf.cast(tf.exp(self.log_alpha), self.actor_variables[0].dtype)

    def critic_step(self, batch: Transitions, alpha: Array, noise: Array) -> Array:
        """One step of the critic, then of its target. noise [B,H*A]."""
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(self.critic_variables)
            loss = self.model.loss_critic(batch, self.gamma, alpha, noise)
        self.critic_optimizer.apply(tape.gradient(loss, self.critic_variables))
        self.model.update_target_critic(self.tau)
        return loss

    def actor_step(self, obs: Array, alpha: Array, noise: Array) -> Array:
        """One step of the actor, then of the temperature. noise [2,B,H*A]: a draw for each."""
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(self.actor_variables)
            loss = self.model.loss_actor(obs, alpha, noise[0])
        self.actor_optimizer.apply(tape.gradient(loss, self.actor_variables))
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(self.log_alpha)
            temperature_loss = self.model.loss_temperature(obs, self.alpha, self.target_entropy, noise[1])
        self.alpha_optimizer.apply(tape.gradient(temperature_loss, [self.log_alpha]))
        return loss

    def cycle(self, batches: Transitions, critic_noise: Array, actor_noise: Array) -> tuple[Array, Array]:
        """batches [C,B,...], critic_noise [C,B,H*A], actor_noise [P,2,B,H*A] -> mean losses of critic and actor."""
        critic_losses, actor_losses = [], []
        for c in range(critic_noise.shape[0]):
            alpha = self.alpha  # the value before this batch's temperature steps serves the whole batch
            batch = Transitions(*(x[c] for x in batches))
            critic_losses.append(self.critic_step(batch, alpha, critic_noise[c]))
        for p in range(actor_noise.shape[0]):
            actor_losses.append(self.actor_step(batch.obs, alpha, actor_noise[p]))
        return tf.add_n(critic_losses) / len(critic_losses), tf.add_n(actor_losses) / len(actor_losses)

    def _cycles(self, batches: Transitions, critic_noise: Array, actor_noise: Array) -> dict[str, Array]:
        """Everything with a leading U -> losses, means over the U cycles, and the temperature after them."""
        cycles = critic_noise.shape[0]
        critic_loss = actor_loss = tf.zeros([], self.actor_variables[0].dtype)
        for u in tf.range(cycles):
            q, pi = self.cycle(Transitions(*(x[u] for x in batches)), critic_noise[u], actor_noise[u])
            critic_loss, actor_loss = critic_loss + q / cycles, actor_loss + pi / cycles
        return {"loss_critic": critic_loss, "loss_actor": actor_loss, "alpha": self.alpha}
