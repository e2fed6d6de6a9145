"""PPO with a diffusion policy whose likelihood is integrated along its probability-flow ODE.

The action chunk is one decision, as in PPO for Gaussian policies; its log-probability is that of
`diffusion.exact_likelihood`, in bits per element of the chunk.

The likelihood of a chunk takes some twenty steps of the ODE, each with derivatives of the network; their intermediate
results fit into memory for some hundred rows only. The plain update is `ExactDPPO.loss`; the fast one accumulates its
gradient over chunks of rows (a test holds the two together).

Shapes: B rows of a minibatch, P probes of a row; To, H, A, K, F as in `policies.diffusion`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import tensorflow as tf

from diffusion_rl.core.errors import UserError
from diffusion_rl.core.keras import floatx, keras
from diffusion_rl.core.typing import Rng
from diffusion_rl.diffusion.exact_likelihood import (
    VPSDE,
    integrate,
    require_method,
    standard_normal_log_prob,
    time_grid,
)
from diffusion_rl.methods.on_policy.chunked import accumulate, chunks, mapped, padded
from diffusion_rl.methods.on_policy.ppo import ClippedPPO, Gradients, Losses, PPOTrainer
from diffusion_rl.networks.layers import Array
from diffusion_rl.policies.diffusion import Cond, FineTunedDiffusionPolicy

CHUNK = 250  # rows


class ExactDPPO(ClippedPPO, FineTunedDiffusionPolicy):
    """The policy with PPO's loss.

    Args:
        sde: whose flow is integrated.
        sde_hutchinson_type: distribution of the probes of the divergence, Rademacher or Gaussian.
        sde_num_epsilon: P.
        sde_method, sde_step_size: integrator and its step; time runs from `sde_eps` to 1.
        sde_min_beta: floor of the flow's beta.
        sde_probability_flow: False integrates the drift of the reverse SDE instead (twice the score).
        sde_rtol, sde_atol, sde_continuous: accepted for the reference's configurations; steps are fixed.
        kwargs: of `ClippedPPO` and the policy.
    """

    KIND = "dppo_exact"
    LABEL = "DPPO (exact)"

    def __init__(
        self,
        sde: VPSDE,
        sde_hutchinson_type: str = "Rademacher",
        sde_rtol: float = 1e-4,
        sde_atol: float = 1e-4,
        sde_eps: float = 1e-4,
        sde_step_size: float = 1e-3,
        sde_method: str = "euler",
        sde_continuous: bool = False,
        sde_probability_flow: bool = False,
        sde_num_epsilon: int = 1,
        sde_min_beta: float = 1e-2,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        require_method(sde_method)
        if sde_hutchinson_type not in ("Rademacher", "Gaussian"):
            raise UserError(f"model.sde_hutchinson_type={sde_hutchinson_type}: take Rademacher or Gaussian")
        self.sde, self.sde_min_beta, self.sde_method = sde, sde_min_beta, sde_method
        self.hutchinson_type, self.n_probes = sde_hutchinson_type, int(sde_num_epsilon)
        self.probability_flow = sde_probability_flow
        self.time_grid = time_grid(sde_eps, sde_step_size)

    def exact_log_probs(self, cond: Cond, samples: Array, probes: Array) -> Array:
        """Returns the log-probability [B] of action chunks, in bits per element.

        The divergence is that of the pre-trained network throughout. (The reference does so; the gradient reaches
        the fine-tuned one through the path of the flow alone.)

        Args:
            cond: {"state": [B,To,O]};  samples: [B,H,A];  probes: [B*P,H,A], those of a row one after the other.
        """
        tables = self.sde.tables(self.schedule, self.sde_min_beta)
        probes = tf.reshape(probes, tf.concat([[-1, self.n_probes], tf.shape(samples)[1:]], axis=0))

        def velocity(network: keras.layers.Layer, x: Array, step: int) -> Array:
            beta, root_alpha, std = (tf.constant(float(table[step]), self.dtype) for table in tables)
            output = network(x, tf.fill([tf.shape(x)[0]], step), cond)
            score = -output / std if self.predict_epsilon else -(x - output * root_alpha) / beta
            return -0.5 * beta * x - (0.5 if self.probability_flow else 1.0) * beta * score

        def derivative(time: float, state: list[Array]) -> list[Array]:
            x, _ = state
            rounded = round(time * self.denoising_steps)
            step = min(rounded, self.denoising_steps - 1)  # the reference looks beyond the table's end, and raises
            with tf.GradientTape(persistent=True) as tape:
                tape.watch(x)
                base = velocity(self.actor, x, step)
            divergence = [
                tf.reduce_sum(tape.gradient(base, x, output_gradients=probe) * probe, axis=[1, 2])
                for probe in tf.unstack(probes, axis=1)
            ]
            moved = velocity(self.actor_ft, x, step) if rounded <= self.ft_denoising_steps else base
            return [moved, tf.add_n(divergence) / self.n_probes]

        start = [samples, tf.zeros_like(samples[:, 0, 0])]
        end, gained = integrate(derivative, start, self.time_grid, self.sde_method)
        n_elements = self.horizon_steps * self.action_dim
        return (standard_normal_log_prob(end) + gained) / (math.log(2) * n_elements)

    def loss(  # type: ignore[override]  # supervised in the policy, PPO's here, under the reference's name
        self,
        obs: Cond,
        samples: Array,
        returns: Array,
        oldvalues: Array,
        advantages: Array,
        oldlogprobs: Array,
        probes: Array,
    ) -> Losses:
        """Returns the loss of one minibatch.

        Args:
            obs: {"state": [B,To,O]};  samples: [B,H,A];  returns, oldvalues, advantages: [B]
            oldlogprobs: [B] of `exact_log_probs` with other probes, of the policy that collected the data.
            probes: [B*P,H,A]
        """
        log_prob = self.exact_log_probs(obs, samples, probes)
        per_row = self.policy_loss(log_prob, oldlogprobs, self.normalised(advantages))
        return {**self.mean_losses(per_row, obs, returns, oldvalues), "bc_loss": tf.zeros([], self.dtype)}

    def make_trainer(self, settings: Mapping[str, Any], reward_horizon: int) -> ExactDPPOTrainer:
        """Builds what updates this policy; arguments of `PPOTrainer`."""
        return ExactDPPOTrainer(self, settings, reward_horizon)


# ---------- the update ----------


class ExactDPPOTrainer(PPOTrainer):
    """Updates an `ExactDPPO` policy; arguments as of `PPOTrainer`."""

    def __init__(self, policy: Any, settings: Mapping[str, Any], reward_horizon: int):
        if settings.get("use_bc_loss", False):
            raise UserError("train.use_bc_loss=true: PPO with exact likelihood has no behaviour-cloning loss")
        super().__init__(policy, settings, reward_horizon)

    def compile(self) -> None:
        super().compile()
        self._exact = tf.function(self._exact_log_probs, autograph=False)

    # ---------- log-probabilities ----------

    def draw(self, rng: Rng, rows: int) -> np.ndarray:
        """Draws probes of the divergence [B*P,H,A]."""
        p = self.policy
        shape = (rows * p.n_probes, p.horizon_steps, p.action_dim)
        if p.hutchinson_type == "Gaussian":
            return rng.normal(shape, floatx())
        return (2 * rng.integers(0, 2, shape) - 1).astype(floatx())

    def old_log_probs(
        self, state: np.ndarray, decisions: Mapping[str, np.ndarray], rng: Rng, rgb: np.ndarray | None = None
    ) -> np.ndarray:
        """Integrates the log-probabilities [N] now, with the weights that collected."""
        arrays = (state, decisions["actions"], self.draw(rng, len(state)))
        return self._exact(*(tf.constant(x, self.policy.dtype) for x in arrays)).numpy()

    def _exact_log_probs(self, state: Array, samples: Array, probes: Array) -> Array:
        n_chunks, size, padding = chunks(state.shape[0], CHUNK)
        per_row = [padded(x, padding) for x in (state, samples, self._by_row(probes))]

        def one_chunk(start: Array) -> Array:
            state_c, samples_c, probes_c = (x[start : start + size] for x in per_row)
            return self._chunk_log_probs(state_c, samples_c, probes_c, size)

        return mapped(one_chunk, n_chunks, size, self.policy.dtype)[: state.shape[0]]

    def _chunk_log_probs(self, state: Array, samples: Array, probes: Array, size: int) -> Array:
        p = self.policy
        shape = [p.horizon_steps, p.action_dim]
        samples, probes = tf.reshape(samples, [size, *shape]), tf.reshape(probes, [size * p.n_probes, *shape])
        return p.exact_log_probs({"state": tf.ensure_shape(state, [size, *state.shape[1:]])}, samples, probes)

    def _by_row(self, probes: Array) -> Array:
        p = self.policy
        return tf.reshape(probes, [-1, p.n_probes, p.horizon_steps, p.action_dim])

    # ---------- updating ----------

    def losses(self, rows: Array, data: dict[str, Array], draws: Any) -> Losses:
        """Returns the parts of the loss of rows [B]."""
        names = ("state", "actions", "returns", "values", "advantages", "old_log_prob")
        state, *rest = (tf.gather(data[name], rows) for name in names)
        return self.policy.loss({"state": state}, *rest, probes=draws)

    def gradients(self, rows: Array, data: dict[str, Array], draws: Any) -> tuple[Losses, Gradients]:
        """Returns the parts of the loss of rows [B] and the gradients by name; the fast path goes chunk by chunk."""
        if not self.fast:
            return super().gradients(rows, data, draws)
        p, b, names = self.policy, rows.shape[0], ("state", "actions", "old_log_prob", "advantages")
        state, samples, old, advantages = (tf.gather(data[name], rows) for name in names)
        n_chunks, size, padding = chunks(b, CHUNK)
        arrays = (state, samples, self._by_row(draws), old, p.normalised(advantages), tf.ones([b], p.dtype))
        per_row = [padded(x, padding) for x in arrays]
        actor, critic = self.trained["actor"], self.trained["critic"]

        def one_chunk(start: Array) -> tuple[list[Array], Array]:
            state_c, samples_c, probes_c, old_c, advantages_c, weight_c = (x[start : start + size] for x in per_row)
            with tf.GradientTape() as tape:
                log_prob = self._chunk_log_probs(state_c, samples_c, probes_c, size)
                watched = p.policy_loss(log_prob, old_c, advantages_c)
                total = tf.reduce_sum(weight_c * watched[0])
            grads = tape.gradient(total, actor, unconnected_gradients=tf.UnconnectedGradients.ZERO)
            return grads, tf.stack([tf.reduce_sum(weight_c * value) for value in watched])

        sums, statistics = accumulate(one_chunk, n_chunks, size, actor, 4, p.dtype)
        pg_loss, ratio, approx_kl, clipfrac = tf.unstack(statistics / b)
        with tf.GradientTape() as tape:
            values = tf.reshape(p.critic({"state": state}), [-1])
            per_value = p.value_loss(values, tf.gather(data["returns"], rows), tf.gather(data["values"], rows))
            v_loss = tf.reduce_mean(per_value)
            weighted = self.coefficients["v_loss"] * v_loss
        losses = {
            "pg_loss": pg_loss,
            "v_loss": v_loss,
            "clipfrac": clipfrac,
            "approx_kl": approx_kl,
            "ratio": ratio,
            "bc_loss": tf.zeros([], p.dtype),
        }
        return losses, {"actor": [s / b for s in sums], "critic": tape.gradient(weighted, critic)}

    def watched(self) -> dict[str, float]:
        return {"min_sampling_std": self.policy.min_sampling_denoising_std}
