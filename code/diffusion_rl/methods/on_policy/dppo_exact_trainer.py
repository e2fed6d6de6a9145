"""What exact-likelihood PPO does with a rollout.

The likelihood of a chunk takes some twenty steps of the ODE, each with derivatives of the network; their intermediate
results fit into memory for some hundred rows only. The plain update is `ExactDPPO.loss`; the fast one is the same,
accumulated over chunks of rows (a test holds the two together).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import tensorflow as tf

from diffusion_rl.core.errors import UserError
from diffusion_rl.core.keras import floatx
from diffusion_rl.methods.on_policy.chunked import accumulate, chunks, mapped
from diffusion_rl.methods.on_policy.dppo_exact import ExactLoss
from diffusion_rl.methods.on_policy.ppo_trainer import PPOTrainer
from diffusion_rl.networks.layers import Array

CHUNK = 250  # rows


class ExactDPPOTrainer(PPOTrainer):
    """Samples, values and updates of an `ExactDPPO` policy; arguments as of `PPOTrainer`."""

    def __init__(self, algorithm: Any, train: Mapping[str, Any], reward_horizon: int):
        if train.get("use_bc_loss", False):
            raise UserError("train.use_bc_loss=true: PPO with exact likelihood has no behaviour-cloning loss")
        super().__init__(algorithm, train, reward_horizon)

    def compile(self) -> None:
        super().compile()
        self.fast = bool(self.train.get("fast", True))
        self._exact = tf.function(self._exact_log_probs)

    # ---------- log-probabilities ----------

    def draw(self, noise: Any, rows: int) -> np.ndarray:
        """Probes of the divergence [B*P,H,A]."""
        a = self.algorithm
        shape = (rows * a.n_probes, a.horizon_steps, a.action_dim)
        if a.hutchinson_type == "Gaussian":
            return noise.normal(shape, floatx())
        return (2 * noise.integers(0, 2, shape) - 1).astype(floatx())

    def old_log_probs(
        self, state: np.ndarray, decisions: Mapping[str, np.ndarray], noise: Any, rgb: np.ndarray | None = None
    ) -> np.ndarray:
        """[N], integrated now, with the weights that collected."""
        arrays = (state, decisions["actions"], self.draw(noise, len(state)))
        return self._exact(*(tf.constant(x, self.algorithm.dtype) for x in arrays)).numpy()

    def _exact_log_probs(self, state: Array, samples: Array, probes: Array) -> Array:
        n_chunks, size, padding = chunks(state.shape[0], CHUNK)
        per_row = [self._padded(x, padding) for x in (state, samples, self._by_row(probes))]

        def one_chunk(start: Array) -> Array:
            state_c, samples_c, probes_c = (x[start : start + size] for x in per_row)
            return self._chunk_log_probs(state_c, samples_c, probes_c, size)

        return mapped(one_chunk, n_chunks, size, self.algorithm.dtype)[: state.shape[0]]

    def _chunk_log_probs(self, state: Array, samples: Array, probes: Array, size: int) -> Array:
        a = self.algorithm
        shape = [a.horizon_steps, a.action_dim]
        samples, probes = tf.reshape(samples, [size, *shape]), tf.reshape(probes, [size * a.n_probes, *shape])
        return a.exact_log_probs({"state": tf.ensure_shape(state, [size, *state.shape[1:]])}, samples, probes)

    def _by_row(self, probes: Array) -> Array:
        a = self.algorithm
        return tf.reshape(probes, [-1, a.n_probes, a.horizon_steps, a.action_dim])

    @staticmethod
    def _padded(x: Array, padding: int) -> Array:
        return tf.pad(x, [[0, padding]] + [[0, 0]] * (len(x.shape) - 1))

    # ---------- updating ----------

    def losses(self, rows: Array, data: dict[str, Array], draws: Any) -> ExactLoss:
        names = ("state", "actions", "returns", "values", "advantages", "old_log_prob")
        state, *rest = (tf.gather(data[name], rows) for name in names)
        return self.algorithm.loss({"state": state}, *rest, probes=draws)

    def gradients(self, rows: Array, data: dict[str, Array], draws: Any) -> tuple[Any, dict[str, list[Array]]]:
        if not self.fast:
            return super().gradients(rows, data, draws)
        a, b, names = self.algorithm, rows.shape[0], ("state", "actions", "old_log_prob", "advantages")
        state, samples, old, advantages = (tf.gather(data[name], rows) for name in names)
        n_chunks, size, padding = chunks(b, CHUNK)
        arrays = (state, samples, self._by_row(draws), old, a.normalised(advantages), tf.ones([b], a.dtype))
        per_row = [self._padded(x, padding) for x in arrays]
        actor, critic = self.trained["actor"], self.trained["critic"]

        def one_chunk(start: Array) -> tuple[list[Array], Array]:
            state_c, samples_c, probes_c, old_c, advantages_c, weight_c = (x[start : start + size] for x in per_row)
            with tf.GradientTape() as tape:
                log_prob = self._chunk_log_probs(state_c, samples_c, probes_c, size)
                watched = a.policy_loss(log_prob, old_c, advantages_c)
                total = tf.reduce_sum(weight_c * watched[0])
            grads = tape.gradient(total, actor, unconnected_gradients=tf.UnconnectedGradients.ZERO)
            return grads, tf.stack([tf.reduce_sum(weight_c * value) for value in watched])

        sums, statistics = accumulate(one_chunk, n_chunks, size, actor, 4, a.dtype)
        pg_loss, ratio, approx_kl, clipfrac = tf.unstack(statistics / b)
        with tf.GradientTape() as tape:
            values = tf.reshape(a.critic({"state": state}), [-1])
            per_value = a.value_loss(values, tf.gather(data["returns"], rows), tf.gather(data["values"], rows))
            v_loss = tf.reduce_mean(per_value)
            weighted = self.coefficients["v_loss"] * v_loss
        losses = ExactLoss(pg_loss, v_loss, clipfrac, approx_kl, ratio, tf.zeros([], a.dtype))
        return losses, {"actor": [s / b for s in sums], "critic": tape.gradient(weighted, critic)}

    def watched(self) -> dict[str, float]:
        return {"min_sampling_std": self.algorithm.min_sampling_denoising_std}
