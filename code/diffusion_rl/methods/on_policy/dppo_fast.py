"""DPPO's minibatch gradients, restructured for speed; the mathematics is `methods.on_policy.dppo`'s.

What is different from the plain path, all of it exact:

* networks are folded (`networks.folded`);
* gradients are accumulated over chunks of about a thousand rows (`methods.on_policy.chunked`);
* the critic sees each observation of the rollout once per minibatch, weighted by how often it was drawn.

Shapes as in `policies.diffusion`; N samples of a rollout, B rows of a minibatch, X = H*A, O = To*obs_dim.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import tensorflow as tf

from diffusion_rl.diffusion.gaussian import normal_log_prob
from diffusion_rl.methods.on_policy.chunked import accumulate, chunks
from diffusion_rl.methods.on_policy.ppo import Gradients, Losses, chunk_log_prob
from diffusion_rl.networks import folded
from diffusion_rl.networks.layers import Array, variables_of

if TYPE_CHECKING:
    from diffusion_rl.methods.on_policy.dppo import DPPO

CHUNK = 1000  # rows; between 250 and 2000 the time is the same within 3%


def applicable(policy: DPPO) -> bool:
    """Say whether the fast path covers this policy (residual MLPs without LayerNorm; eta not learned)."""
    p = policy
    return folded.can_fold(p.actor_ft) and folded.can_fold(p.critic) and not p.learn_eta and p.ft_denoising_steps > 0


# ---------- gradients of one minibatch ----------


def gradients(
    policy: DPPO, reward_horizon: int, coefficients: Mapping[str, float]
) -> Callable[[Array, dict[str, Array]], tuple[Losses, Gradients]]:
    """Build a compiled function: (rows [B], rollout) -> (losses, gradients of actor and critic)."""
    p = policy
    actor_variables, critic_variables = variables_of(p.actor_ft), variables_of(p.critic)
    timesteps, positions = p.fine_tuned_timesteps()

    @tf.function
    def compute(rows: Array, data: dict[str, Array]) -> tuple[tuple[Array, ...], list[Array], list[Array]]:
        actor_losses, actor_grads = policy_gradients(rows, data)
        v_loss, critic_grads = value_gradients(rows // p.ft_denoising_steps, data)
        return (*actor_losses, v_loss), actor_grads, critic_grads

    def policy_gradients(rows: Array, data: dict[str, Array]) -> tuple[list[Array], list[Array]]:
        f, b = p.ft_denoising_steps, rows.shape[0]
        sample, step = rows // f, rows % f
        advantages = p.step_advantages(tf.gather(data["advantages"], sample), step)
        old_log_prob = tf.gather(tf.reshape(data["old_log_prob"], [-1]), rows)
        n_chunks, size, padding = chunks(b, CHUNK)
        per_row = [tf.pad(v, [[0, padding]]) for v in (sample, step, advantages, old_log_prob, tf.ones([b], p.dtype))]
        states = tf.reshape(data["state"], [data["state"].shape[0], -1])
        x_dim = p.horizon_steps * p.action_dim
        links = tf.reshape(data["chains"], [-1, x_dim])
        with tf.GradientTape() as outer:
            weights = folded.fold_actor(p.actor_ft, timesteps)
        constants = [tf.stop_gradient(w) for w in weights]

        def one_chunk(start: Array) -> tuple[list[Array], Array]:
            sample_c, step_c, advantages_c, old_c, weight_c = (tf.slice(v, [start], [size]) for v in per_row)
            link = sample_c * (f + 1) + step_c
            previous, following = tf.gather(links, link), tf.gather(links, link + 1)
            inputs = tf.concat([previous, tf.gather(states, sample_c), tf.one_hot(step_c, f, dtype=p.dtype)], axis=1)
            shape = [size, p.horizon_steps, p.action_dim]
            previous, following = tf.reshape(previous, shape), tf.reshape(following, shape)
            cond = {"state": tf.gather(data["state"], sample_c)}
            with tf.GradientTape() as tape:
                tape.watch(constants)
                output = tf.reshape(folded.actor_output(p.actor_ft, constants, inputs), shape)
                t, index = tf.gather(timesteps, step_c), tf.gather(positions, step_c)
                mean, logvar, eta = p.mean_var_eta(previous, t, cond, index, output, deterministic=False)
                log_prob = normal_log_prob(following, mean, p.log_prob_std(logvar))
                loss, ratio, approx_kl, outside = p.step_policy_loss(
                    chunk_log_prob(log_prob, reward_horizon), old_c, advantages_c, step_c
                )
                total = tf.reduce_sum(weight_c * loss)
            watched = [loss, outside, approx_kl, ratio, tf.reduce_mean(eta + tf.zeros_like(mean), axis=[1, 2])]
            sums = tf.stack([tf.reduce_sum(weight_c * v) for v in watched])
            return tape.gradient(total, constants, unconnected_gradients=tf.UnconnectedGradients.ZERO), sums

        sums, statistics = accumulate(one_chunk, n_chunks, size, constants, 5, p.dtype)
        scaled = [s / b for s in sums]
        grads = outer.gradient(weights, actor_variables, output_gradients=scaled)
        return tf.unstack(statistics / b), grads

    def value_gradients(sample: Array, data: dict[str, Array]) -> tuple[Array, list[Array]]:
        n, b = data["state"].shape[0], sample.shape[0]
        states = tf.reshape(data["state"], [n, -1])
        if n <= b:  # each observation once, weighted by how often it was drawn
            counts = tf.math.unsorted_segment_sum(tf.ones([b], p.dtype), sample, n)
            per_row = [states, data["returns"], data["values"], counts]
        else:
            per_row = [tf.gather(v, sample) for v in (states, data["returns"], data["values"])]
            per_row.append(tf.ones([b], p.dtype))
        n_chunks, size, padding = chunks(min(n, b), CHUNK)
        per_row = [tf.pad(v, [[0, padding]] + [[0, 0]] * (len(v.shape) - 1)) for v in per_row]
        with tf.GradientTape() as outer:
            weights = folded.fold_critic(p.critic)
        constants = [tf.stop_gradient(w) for w in weights]

        def one_chunk(start: Array) -> tuple[list[Array], Array]:
            states_c = tf.slice(per_row[0], [start, 0], [size, per_row[0].shape[1]])
            return value_chunk(states_c, *(tf.slice(v, [start], [size]) for v in per_row[1:]), constants)

        sums, total = accumulate(one_chunk, n_chunks, size, constants, 1, p.dtype)
        factor = coefficients["v_loss"] / b
        return total[0] / b, outer.gradient(weights, critic_variables, output_gradients=[s * factor for s in sums])

    # The critic's activation is a dozen passes over memory unless they are fused; its matrices are small.
    @tf.function(jit_compile=True)
    def value_chunk(
        states: Array, returns: Array, oldvalues: Array, weights: Array, constants: list[Array]
    ) -> tuple[list[Array], Array]:
        with tf.GradientTape() as tape:
            tape.watch(constants)
            values = folded.critic_output(p.critic, constants, states)
            total = tf.reduce_sum(weights * p.value_loss(values, returns, oldvalues))
        return tape.gradient(total, constants), total[None]

    def losses_and_gradients(rows: Array, data: dict[str, Array]) -> tuple[Losses, Gradients]:
        (pg_loss, clipfrac, approx_kl, ratio, eta, v_loss), actor_grads, critic_grads = compute(rows, data)
        losses = {
            "pg_loss": pg_loss,
            "v_loss": v_loss,
            "clipfrac": clipfrac,
            "approx_kl": approx_kl,
            "ratio": ratio,
            "entropy_loss": -eta,
            "bc_loss": tf.zeros([], p.dtype),
            "eta": eta,
        }
        return losses, {"actor": actor_grads, "critic": critic_grads}

    return losses_and_gradients
