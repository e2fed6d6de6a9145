"""What the PPO algorithms share: Proximal Policy Optimization (Schulman et al. 2017, arXiv:1707.06347).

B rows of a minibatch; everything here is [B] unless said otherwise.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import tensorflow as tf

from diffusion_rl.networks.layers import Array

LOG_PROB_RANGE = (-5.0, 2.0)  # old and new alike; what is outside gets no gradient


class PPOTerms(NamedTuple):
    """The parts of the loss and what is watched beside them; all scalars."""

    pg_loss: Array
    entropy_loss: Array
    v_loss: Array
    clipfrac: Array
    approx_kl: Array
    ratio: Array
    bc_loss: Array
    std: Array


class ClippedPPO:
    """Advantages and the loss of the value, for policies with a `critic`.

    Attributes:
        norm_adv: normalise advantages within the minibatch.
        clip_ploss_coef: clip range of the ratio.
        clip_vloss_coef: clip range of the change of the value (None: not clipped).
    """

    norm_adv: bool
    clip_ploss_coef: float
    clip_vloss_coef: float | None
    critic: Any

    def normalised(self, advantages: Array) -> Array:
        """Advantages with mean 0 and deviation 1, where that is asked for."""
        if not self.norm_adv:
            return advantages
        centred = advantages - tf.reduce_mean(advantages)
        # unbiased deviation (N - 1), as torch.std
        n = tf.cast(tf.size(advantages), advantages.dtype)
        std = tf.sqrt(tf.reduce_sum(tf.square(centred)) / (n - 1))
        return centred / (std + 1e-8)

    def value_loss(self, values: Array, returns: Array, oldvalues: Array) -> Array:
        """Half the squared error, optionally with the change of the value clipped."""
        loss = tf.square(values - returns)
        if self.clip_vloss_coef is not None:
            bound = self.clip_vloss_coef
            clipped = oldvalues + tf.clip_by_value(values - oldvalues, -bound, bound)
            loss = tf.maximum(loss, tf.square(clipped - returns))
        return 0.5 * loss

    def terms(
        self,
        obs: dict[str, Array],
        log_prob: Array,
        old_log_prob: Array,
        advantages: Array,
        returns: Array,
        oldvalues: Array,
        entropy: Array,
        std: Array,
        bc_loss: Array | None = None,
    ) -> PPOTerms:
        """All parts of the loss of a policy whose actions are single decisions.

        Args:
            obs: {"state": [B,To,O]}
            log_prob, old_log_prob: [B] of the actions, now and when they were taken; clamped here.
            entropy, std: scalars.
        """
        pg_loss, ratio, approx_kl, clipfrac = clipped_policy_loss(
            tf.clip_by_value(log_prob, *LOG_PROB_RANGE),
            tf.clip_by_value(old_log_prob, *LOG_PROB_RANGE),
            self.normalised(advantages),
            tf.constant(self.clip_ploss_coef, log_prob.dtype),
        )
        values = tf.reshape(self.critic(obs), [-1])
        return PPOTerms(
            pg_loss=tf.reduce_mean(pg_loss),
            entropy_loss=-entropy,
            v_loss=tf.reduce_mean(self.value_loss(values, returns, oldvalues)),
            clipfrac=tf.reduce_mean(clipfrac),
            approx_kl=tf.reduce_mean(approx_kl),
            ratio=tf.reduce_mean(tf.stop_gradient(ratio)),
            bc_loss=tf.zeros([], log_prob.dtype) if bc_loss is None else bc_loss,
            std=tf.stop_gradient(std),
        )


def clipped_policy_loss(
    log_prob: Array, old_log_prob: Array, advantages: Array, clip_range: Array
) -> tuple[Array, Array, Array, Array]:
    """PPO's clipped loss per row (Schulman et al. 2017, eq. 7), all arguments [B]; the clip range may be a scalar.

    Returns:
        loss, ratio, approximate KL ((r - 1) - log r), and whether the ratio left the clip range.
    """
    log_ratio = log_prob - old_log_prob
    ratio = tf.exp(log_ratio)
    clipped = tf.clip_by_value(ratio, 1 - clip_range, 1 + clip_range)
    loss = tf.maximum(-advantages * ratio, -advantages * clipped)
    approx_kl = tf.stop_gradient((ratio - 1) - log_ratio)
    outside = tf.cast(tf.abs(ratio - 1) > clip_range, ratio.dtype)
    return loss, ratio, approx_kl, outside
