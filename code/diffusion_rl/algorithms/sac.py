"""Soft Actor-Critic (Haarnoja et al. 2018, https://arxiv.org/abs/1812.05905) with a learned temperature.

The losses are pure functions of (networks, batch, noise); `SAC` joins them into one compiled update that takes many
gradient steps per call. Noise is an argument everywhere.

Shape letters: B batch, U gradient steps per call, To observation history, Ta executed actions, O observation, A action.
Networks: actor(cond) -> (mean, scale) [B,Ta*A]; critic(cond, action [B,Ta,A]) -> (q1, q2) [B]; cond = {"state": [B,To,O]}.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

Cond = dict[str, tf.Tensor]
Actor = Callable[[Cond], tuple[tf.Tensor, tf.Tensor]]
Critic = Callable[[Cond, tf.Tensor], tuple[tf.Tensor, tf.Tensor]]

_HALF_LOG_2PI = 0.5 * float(np.log(2.0 * np.pi))


class Batch(NamedTuple):
    """Transitions: obs, next_obs [B,To,O], actions [B,Ta,A] in [-1,1], rewards [B], terminated [B] (1.0 = no future)."""

    obs: tf.Tensor
    next_obs: tf.Tensor
    actions: tf.Tensor
    rewards: tf.Tensor
    terminated: tf.Tensor


def squashed_sample(
    mean: tf.Tensor, scale: tf.Tensor, noise: tf.Tensor, clip: float = 10.0
) -> tuple[tf.Tensor, tf.Tensor]:
    """a = tanh(mean + scale * clip(noise)) and its log-density.

    mean, scale, noise [B,D] -> action [B,D], log_prob [B]. Eq. 21 of the paper; the log-density is taken at the clipped
    sample, and 1e-6 keeps the logarithm finite where tanh saturates.
    """
    z = tf.clip_by_value(noise, -clip, clip)
    action = tf.tanh(mean + scale * z)
    log_prob = -0.5 * tf.square(z) - tf.math.log(scale) - _HALF_LOG_2PI
    log_prob -= tf.math.log(1.0 - tf.square(action) + 1e-6)
    return action, tf.reduce_sum(log_prob, axis=-1)


def critic_loss(
    actor: Actor,
    critic: Critic,
    target_critic: Critic,
    batch: Batch,
    noise: tf.Tensor,
    gamma: float,
    alpha: tf.Tensor,
    clip: float = 10.0,
) -> tf.Tensor:
    """Sum of the two squared Bellman errors (eqs. 5 and 6), the target without gradient. noise [B,Ta*A]."""
    next_cond = {"state": batch.next_obs}
    next_action, next_log_prob = squashed_sample(*actor(next_cond), noise, clip)
    next_q1, next_q2 = target_critic(next_cond, tf.reshape(next_action, tf.shape(batch.actions)))
    next_value = tf.minimum(next_q1, next_q2) - alpha * next_log_prob
    target = tf.stop_gradient(batch.rewards + gamma * next_value * (1.0 - batch.terminated))
    q1, q2 = critic({"state": batch.obs}, batch.actions)
    return tf.reduce_mean(tf.square(q1 - target)) + tf.reduce_mean(tf.square(q2 - target))


def actor_loss(
    actor: Actor, critic: Critic, obs: tf.Tensor, noise: tf.Tensor, alpha: tf.Tensor, action_dim: int, clip: float = 10.0
) -> tf.Tensor:
    """Mean of alpha * log pi - min Q at reparametrised actions (eq. 9). noise [B,Ta*A]."""
    cond = {"state": obs}
    action, log_prob = squashed_sample(*actor(cond), noise, clip)
    q1, q2 = critic(cond, tf.reshape(action, [tf.shape(action)[0], -1, action_dim]))
    return tf.reduce_mean(alpha * log_prob - tf.minimum(q1, q2))


def temperature_loss(
    actor: Actor, obs: tf.Tensor, noise: tf.Tensor, alpha: tf.Tensor, target_entropy: float, clip: float = 10.0
) -> tf.Tensor:
    """-mean(alpha * (log pi + target entropy)) (eq. 18); the gradient reaches alpha only. noise [B,Ta*A]."""
    _, log_prob = squashed_sample(*actor({"state": obs}), noise, clip)
    return -tf.reduce_mean(alpha * tf.stop_gradient(log_prob + target_entropy))


def update_target(target: Sequence[tf.Variable], source: Sequence[tf.Variable], tau: float) -> None:
    """target <- (1 - tau) target + tau source, in place."""
    for t, s in zip(target, source, strict=True):
        t.assign(t * (1.0 - tau) + s * tau)


class _Adam:
    """torch.optim.Adam: epsilon is added after the bias correction."""

    def __init__(self, variables: Sequence[tf.Variable], lr: float, betas=(0.9, 0.999), eps: float = 1e-8):
        self.variables, self.lr, self.betas, self.eps = list(variables), lr, betas, eps
        self.t = tf.Variable(0.0)
        self.m = [tf.Variable(tf.zeros_like(v)) for v in self.variables]
        self.v = [tf.Variable(tf.zeros_like(v)) for v in self.variables]

    def step(self, grads: Sequence[tf.Tensor]) -> None:
        b1, b2 = self.betas
        t = self.t.assign_add(1.0)
        c1, c2 = 1.0 - tf.pow(b1, t), tf.sqrt(1.0 - tf.pow(b2, t))
        for p, g, m, v in zip(self.variables, grads, self.m, self.v, strict=True):
            m_new = m.assign(b1 * m + (1.0 - b1) * g)
            v_new = v.assign(b2 * v + (1.0 - b2) * tf.square(g))
            p.assign_sub((self.lr / c1) * m_new / (tf.sqrt(v_new) / c2 + self.eps))


class SAC:
    """Owns the optimizers and the temperature; `update` takes U gradient steps in one compiled call."""

    def __init__(
        self,
        actor: Any,
        critic: Any,
        target_critic: Any,
        *,
        action_dim: int,
        target_entropy: float,
        gamma: float = 0.99,
        actor_lr: float = 3e-4,
        critic_lr: float = 1e-3,
        tau: float = 0.005,
        init_temperature: float = 1.0,
        randn_clip_value: float = 10.0,
    ):
        self.actor, self.critic, self.target_critic = actor, critic, target_critic
        self.action_dim, self.target_entropy, self.gamma, self.tau = action_dim, target_entropy, gamma, tau
        self.clip = randn_clip_value
        self.log_alpha = tf.Variable(float(np.log(init_temperature)), dtype=tf.float32)
        update_target(target_critic.trainable_variables, critic.trainable_variables, 1.0)
        self.actor_optimizer = _Adam(actor.trainable_variables, actor_lr)
        self.critic_optimizer = _Adam(critic.trainable_variables, critic_lr)
        self.alpha_optimizer = _Adam([self.log_alpha], critic_lr)
        self.update = tf.function(self._update, jit_compile=True)
        self.act = tf.function(self._act, reduce_retracing=True)

    def _act(self, obs: tf.Tensor, noise: tf.Tensor) -> tf.Tensor:
        """obs [E,To,O], noise [E,Ta*A] -> actions [E,Ta,A] in [-1,1]; noise 0 gives the mode before squashing."""
        action, _ = squashed_sample(*self.actor({"state": obs}), noise, self.clip)
        return tf.reshape(action, [tf.shape(obs)[0], -1, self.action_dim])

    def gradient_step(self, batch: Batch, noise: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """One step of critic, target critic, actor and temperature, in that order. noise [3,B,Ta*A] (one draw each)."""
        alpha = tf.exp(self.log_alpha)
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(self.critic.trainable_variables)
            loss_q = critic_loss(
                self.actor, self.critic, self.target_critic, batch, noise[0], self.gamma, alpha, self.clip
            )
        self.critic_optimizer.step(tape.gradient(loss_q, self.critic_optimizer.variables))
        update_target(self.target_critic.trainable_variables, self.critic.trainable_variables, self.tau)
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(self.actor.trainable_variables)
            loss_pi = actor_loss(self.actor, self.critic, batch.obs, noise[1], alpha, self.action_dim, self.clip)
        self.actor_optimizer.step(tape.gradient(loss_pi, self.actor_optimizer.variables))
        with tf.GradientTape() as tape:
            loss_t = temperature_loss(
                self.actor, batch.obs, noise[2], tf.exp(self.log_alpha), self.target_entropy, self.clip
            )
        self.alpha_optimizer.step(tape.gradient(loss_t, [self.log_alpha]))
        return loss_q, loss_pi

    def _update(self, batches: Batch, noise: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """batches with a leading U, noise [U,3,B,Ta*A] -> mean critic and actor loss over the U steps."""
        steps = noise.shape[0]
        total_q, total_pi = tf.constant(0.0), tf.constant(0.0)
        for i in tf.range(steps):
            loss_q, loss_pi = self.gradient_step(Batch(*(x[i] for x in batches)), noise[i])
            total_q, total_pi = total_q + loss_q, total_pi + loss_pi
        return total_q / steps, total_pi / steps
