"""PPO with a diffusion policy whose likelihood is integrated along its probability-flow ODE.

The action chunk is one decision, as in PPO for Gaussian policies; its log-probability is that of
`diffusion.exact_likelihood`, in bits per element of the chunk.

Shapes: B rows of a minibatch, P probes of a row; To, H, A, K, F as in `policies.diffusion`.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import tensorflow as tf

from diffusion_rl.core.errors import UserError
from diffusion_rl.core.keras import keras
from diffusion_rl.diffusion.exact_likelihood import (
    VPSDE,
    integrate,
    require_method,
    standard_normal_log_prob,
    time_grid,
)
from diffusion_rl.methods.on_policy.ppo import ClippedPPO
from diffusion_rl.networks.layers import Array
from diffusion_rl.policies.diffusion import Cond, FineTunedDiffusionPolicy


class ExactLoss(NamedTuple):
    """The parts of the loss and what is watched beside them; all scalars."""

    pg_loss: Array
    v_loss: Array
    clipfrac: Array
    approx_kl: Array
    ratio: Array
    bc_loss: Array


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
        """Log-probability [B] of action chunks, in bits per element.

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

    def loss(  # type: ignore[override]  # another loss than pre-training's
        self,
        obs: Cond,
        samples: Array,
        returns: Array,
        oldvalues: Array,
        advantages: Array,
        oldlogprobs: Array,
        probes: Array,
    ) -> ExactLoss:
        """The loss of one minibatch.

        Args:
            obs: {"state": [B,To,O]};  samples: [B,H,A];  returns, oldvalues, advantages: [B]
            oldlogprobs: [B] of `exact_log_probs` with other probes, of the policy that collected the data.
            probes: [B*P,H,A]
        """
        log_prob = self.exact_log_probs(obs, samples, probes)
        per_row = self.policy_loss(log_prob, oldlogprobs, self.normalised(advantages))
        pg_loss, ratio, approx_kl, clipfrac = (tf.reduce_mean(value) for value in per_row)
        values = tf.reshape(self.critic(obs), [-1])
        v_loss = tf.reduce_mean(self.value_loss(values, returns, oldvalues))
        return ExactLoss(pg_loss, v_loss, clipfrac, approx_kl, tf.stop_gradient(ratio), tf.zeros([], self.dtype))
