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
    """Advantages and the loss of actor and critic, for policies with a `critic`; stands before the policy's class.

    Args:
        clip_ploss_coef: clip range of the ratio.
        clip_vloss_coef: clip range of the change of the value (None: not clipped).
        norm_adv: normalise advantages within the minibatch.
        kwargs: of the policy.
    """

    critic: Any

    def __init__(
        self, clip_ploss_coef: float, clip_vloss_coef: float | None = None, norm_adv: bool = True, **kwargs: Any
    ):
        super().__init__(**kwargs)
        self.clip_ploss_coef, self.clip_vloss_coef, self.norm_adv = clip_ploss_coef, clip_vloss_coef, norm_adv

    def normalised(self, advantages: Array) -> Array:
        """Advantages with mean 0 and deviation 1, where that is asked for."""
        if not self.norm_adv:
            return advantages
        centred = advantages - tf.reduce_mean(advantages)
        # unbiased deviation (N - 1), as torch.std
        n = tf.cast(tf.size(advantages), advantages.dtype)
        std = tf.sqrt(tf.reduce_sum(tf.square(centred)) / (n - 1))
        return centred / (std + 1e-8)

    def policy_loss(self, log_prob: Array, old_log_prob: Array, advantages: Array) -> tuple[Array, Array, Array, Array]:
        """`clipped_policy_loss` of chunks that are single decisions: log-probabilities [B] are clamped here."""
        return clipped_policy_loss(
            tf.clip_by_value(log_prob, *LOG_PROB_RANGE),
            tf.clip_by_value(old_log_prob, *LOG_PROB_RANGE),
            advantages,
            tf.constant(self.clip_ploss_coef, log_prob.dtype),
        )

    def value_loss(self, values: Array, returns: Array, oldvalues: Array) -> Array:
        """Half the squared error, optionally with the change of the value clipped."""
        loss = tf.square(values - returns)
        if self.clip_vloss_coef is not None:
            bound = self.clip_vloss_coef
            clipped = oldvalues + tf.clip_by_value(values - oldvalues, -bound, bound)
            loss = tf.maximum(loss, tf.square(clipped - returns))
        return 0.5 * loss


class ChunkPPO(ClippedPPO):
    """PPO for Gaussian and mixture policies: the action chunk is one decision."""

    log_probs: Any  # of the policy: observation, actions -> log-probabilities [B], entropy, standard deviation

    def loss(
        self,
        obs: dict[str, Array],
        actions: Array,
        returns: Array,
        oldvalues: Array,
        advantages: Array,
        oldlogprobs: Array,
        use_bc_loss: bool = False,
        bc_noise: Array | None = None,
    ) -> PPOTerms:
        """The loss of one minibatch.

        Args:
            obs: {"state": [B,To,O]};  actions: [B,H,A];  returns, oldvalues, advantages: [B]
            oldlogprobs: [B], in the policy's way of counting, of the policy that collected the data.
            use_bc_loss, bc_noise: add `bc_loss`, drawn with bc_noise.
        """
        log_prob, entropy, std = self.log_probs(obs, actions)
        pg_loss, ratio, approx_kl, clipfrac = self.policy_loss(log_prob, oldlogprobs, self.normalised(advantages))
        values = tf.reshape(self.critic(obs), [-1])
        return PPOTerms(
            pg_loss=tf.reduce_mean(pg_loss),
            entropy_loss=-entropy,
            v_loss=tf.reduce_mean(self.value_loss(values, returns, oldvalues)),
            clipfrac=tf.reduce_mean(clipfrac),
            approx_kl=tf.reduce_mean(approx_kl),
            ratio=tf.reduce_mean(tf.stop_gradient(ratio)),
            bc_loss=self.bc_loss(obs, bc_noise) if use_bc_loss else tf.zeros([], log_prob.dtype),
            std=tf.stop_gradient(std),
        )

    def bc_noise_shape(self, rows: int) -> tuple[int, ...] | None:
        """Of the noise of `bc_loss`; None: the algorithm has no such loss."""
        return None

    def bc_loss(self, obs: dict[str, Array], noise: Array | None) -> Array:
        """What imitation of the pre-trained policy adds: nothing unless the algorithm has such a loss."""
        return tf.zeros([], obs["state"].dtype)


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
