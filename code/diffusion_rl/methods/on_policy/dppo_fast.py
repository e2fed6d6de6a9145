"""DPPO's minibatch gradients, restructured for speed; the mathematics is `methods.on_policy.dppo`'s.

What is different from the plain path, all of it exact:

* networks are folded (`networks.folded`);
* gradients are accumulated over chunks of about a thousand rows (`methods.on_policy.chunked`);
* the critic sees each observation of the rollout once per minibatch, weighted by how often it was drawn.

Shapes as in `policies.diffusion`; N samples of a rollout, B rows of a minibatch, X = H*A, O = To*obs_dim.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import tensorflow as tf

from diffusion_rl.diffusion.gaussian import normal_log_prob
from diffusion_rl.methods.on_policy.chunked import accumulate, chunks, padded
from diffusion_rl.methods.on_policy.ppo import Gradients, Losses, chunk_log_prob
from diffusion_rl.networks import folded
from diffusion_rl.networks.layers import Array, variables_of

if TYPE_CHECKING:
    from diffusion_rl.methods.on_policy.dppo import DPPO

CHUNK = 1000  # rows; between 250 and 2000 the time is the same within 3%


def applicable(policy: DPPO) -> bool:
    """Says whether the fast path covers this policy (residual MLPs without LayerNorm; eta not learned)."""
    folds = folded.can_fold(policy.actor_ft) and folded.can_fold(policy.critic)
    return folds and not policy.learn_eta and policy.ft_denoising_steps > 0


class FastGradients:
    """Losses and gradients of one minibatch, compiled: (rows [B], rollout) -> (losses, gradients of actor and critic).

    Args:
        policy: whose present number of fine-tuned steps is built in.
        reward_horizon: actions of a chunk that count.
        v_loss_coefficient: factor of the value loss.
    """

    def __init__(self, policy: DPPO, reward_horizon: int, v_loss_coefficient: float):
        self.policy, self.reward_horizon, self.v_loss_coefficient = policy, reward_horizon, v_loss_coefficient
        self.actor_variables, self.critic_variables = variables_of(policy.actor_ft), variables_of(policy.critic)
        self.timesteps, self.positions = policy.fine_tuned_timesteps()
        self._compute = tf.function(self._both, autograph=False)  # no tensor decides a branch: traced sooner
        # The critic's activation is a dozen passes over memory unless they are fused; its matrices are small.
        self._value_chunk = tf.function(self._value_sums, jit_compile=True, autograph=False)

    def __call__(self, rows: Array, data: dict[str, Array]) -> tuple[Losses, Gradients]:
        (pg_loss, clipfrac, approx_kl, ratio, eta, v_loss), actor_grads, critic_grads = self._compute(rows, data)
        losses = {
            "pg_loss": pg_loss,
            "v_loss": v_loss,
            "clipfrac": clipfrac,
            "approx_kl": approx_kl,
            "ratio": ratio,
            "entropy_loss": -eta,
            "bc_loss": tf.zeros([], self.policy.dtype),
            "eta": eta,
        }
        return losses, {"actor": actor_grads, "critic": critic_grads}

    def _both(self, rows: Array, data: dict[str, Array]) -> tuple[tuple[Array, ...], list[Array], list[Array]]:
        actor_losses, actor_grads = self._policy_gradients(rows, data)
        v_loss, critic_grads = self._value_gradients(rows // self.policy.ft_denoising_steps, data)
        return (*actor_losses, v_loss), actor_grads, critic_grads

    # ---------- the actor ----------

    def _policy_gradients(self, rows: Array, data: dict[str, Array]) -> tuple[list[Array], list[Array]]:
        """Returns [pg_loss, clipfrac, approx_kl, ratio, eta], and the gradients of the actor's variables."""
        p, b = self.policy, rows.shape[0]
        sample, step = rows // p.ft_denoising_steps, rows % p.ft_denoising_steps
        advantages = p.step_advantages(tf.gather(data["advantages"], sample), step)
        old_log_prob = tf.gather(tf.reshape(data["old_log_prob"], [-1]), rows)
        n_chunks, size, padding = chunks(b, CHUNK)
        per_row = [padded(v, padding) for v in (sample, step, advantages, old_log_prob, tf.ones([b], p.dtype))]
        with tf.GradientTape() as outer:
            weights = folded.fold_actor(p.actor_ft, self.timesteps)
        constants = [tf.stop_gradient(w) for w in weights]

        def one_chunk(start: Array) -> tuple[list[Array], Array]:
            cut = [tf.slice(v, [start], [size]) for v in per_row]
            return self._policy_sums(cut, data, constants)

        sums, statistics = accumulate(one_chunk, n_chunks, size, constants, 5, p.dtype)
        scaled = [s / b for s in sums]
        grads = outer.gradient(weights, self.actor_variables, output_gradients=scaled)
        return tf.unstack(statistics / b), grads

    def _policy_sums(
        self, per_row: list[Array], data: dict[str, Array], weights: list[Array]
    ) -> tuple[list[Array], Array]:
        """Returns the gradients of the summed loss of a chunk of rows by the folded weights, and the sums watched [5].

        per_row: sample, denoising step, advantage, old log-probability and weight (0 for padding) of each row.
        """
        p, (sample, step, advantages, old_log_prob, weight) = self.policy, per_row
        f, size = p.ft_denoising_steps, sample.shape[0]
        states = tf.reshape(data["state"], [data["state"].shape[0], -1])
        links = tf.reshape(data["chains"], [-1, p.horizon_steps * p.action_dim])
        link = sample * (f + 1) + step
        previous, following = tf.gather(links, link), tf.gather(links, link + 1)
        inputs = tf.concat([previous, tf.gather(states, sample), tf.one_hot(step, f, dtype=p.dtype)], axis=1)
        shape = [size, p.horizon_steps, p.action_dim]
        previous, following = tf.reshape(previous, shape), tf.reshape(following, shape)
        cond = {"state": tf.gather(data["state"], sample)}
        with tf.GradientTape() as tape:
            tape.watch(weights)
            output = tf.reshape(folded.actor_output(p.actor_ft, weights, inputs), shape)
            t, index = tf.gather(self.timesteps, step), tf.gather(self.positions, step)
            mean, logvar, eta = p.mean_var_eta(previous, t, cond, index, output, deterministic=False)
            log_prob = chunk_log_prob(normal_log_prob(following, mean, p.log_prob_std(logvar)), self.reward_horizon)
            loss, ratio, approx_kl, outside = p.step_policy_loss(log_prob, old_log_prob, advantages, step)
            total = tf.reduce_sum(weight * loss)
        watched = [loss, outside, approx_kl, ratio, tf.reduce_mean(eta + tf.zeros_like(mean), axis=[1, 2])]
        sums = tf.stack([tf.reduce_sum(weight * v) for v in watched])
        return tape.gradient(total, weights, unconnected_gradients=tf.UnconnectedGradients.ZERO), sums

    # ---------- the critic ----------

    def _value_gradients(self, sample: Array, data: dict[str, Array]) -> tuple[Array, list[Array]]:
        """Returns v_loss, and the gradients of the critic's variables."""
        p, n, b = self.policy, data["state"].shape[0], sample.shape[0]
        states = tf.reshape(data["state"], [n, -1])
        if n <= b:  # each observation once, weighted by how often it was drawn
            counts = tf.math.unsorted_segment_sum(tf.ones([b], p.dtype), sample, n)
            per_row = [states, data["returns"], data["values"], counts]
        else:
            per_row = [tf.gather(v, sample) for v in (states, data["returns"], data["values"])]
            per_row.append(tf.ones([b], p.dtype))
        n_chunks, size, padding = chunks(min(n, b), CHUNK)
        per_row = [padded(v, padding) for v in per_row]
        with tf.GradientTape() as outer:
            weights = folded.fold_critic(p.critic)
        constants = [tf.stop_gradient(w) for w in weights]

        def one_chunk(start: Array) -> tuple[list[Array], Array]:
            states_c = tf.slice(per_row[0], [start, 0], [size, per_row[0].shape[1]])
            return self._value_chunk(states_c, *(tf.slice(v, [start], [size]) for v in per_row[1:]), constants)

        sums, total = accumulate(one_chunk, n_chunks, size, constants, 1, p.dtype)
        factor = self.v_loss_coefficient / b
        grads = outer.gradient(weights, self.critic_variables, output_gradients=[s * factor for s in sums])
        return total[0] / b, grads

    def _value_sums(
        self, states: Array, returns: Array, oldvalues: Array, counts: Array, weights: list[Array]
    ) -> tuple[list[Array], Array]:
        """Returns the gradients of the summed value loss of a chunk by the folded weights, and that sum [1]."""
        with tf.GradientTape() as tape:
            tape.watch(weights)
            values = folded.critic_output(self.policy.critic, weights, states)
            total = tf.reduce_sum(counts * self.policy.value_loss(values, returns, oldvalues))
        return tape.gradient(total, weights), total[None]
