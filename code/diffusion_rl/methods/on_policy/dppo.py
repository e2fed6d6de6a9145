"""DPPO: Diffusion Policy Policy Optimization (Ren et al. 2024).

PPO on the two-layer decision process in which every denoising step of an action chunk is an action of its own:

    state    (o, x_t)           action   x_{t-1}           policy   N(x_{t-1}; mu(x_t, t, o), sigma_t^2)

    eq. 4.2   advantage of a denoising step = gamma_denoising^(steps still to come) * A(o, a)
    eq. 4.3   PPO's clipped ratio, with a clip range that grows from the noisy steps to the clean ones

Shapes: B rows of a minibatch, F fine-tuned denoising steps, To, H, O, A as in `policies.diffusion`.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import tensorflow as tf

from diffusion_rl.methods.on_policy.ppo import LOG_PROB_RANGE, ClippedPPO, clipped_policy_loss
from diffusion_rl.networks.layers import Array
from diffusion_rl.policies.diffusion import Cond, FineTunedDiffusionPolicy


class PPOLoss(NamedTuple):
    """The parts of the loss and what is watched beside them; all scalars."""

    pg_loss: Array
    entropy_loss: Array
    v_loss: Array
    clipfrac: Array
    approx_kl: Array
    ratio: Array
    bc_loss: Array
    eta: Array


class Minibatch(NamedTuple):
    """B rows (sample, denoising step) of a rollout."""

    obs: Cond
    chains_prev: Array  # [B,H,A]
    chains_next: Array  # [B,H,A]
    denoising_inds: Array  # [B]
    returns: Array  # [B]
    oldvalues: Array  # [B]
    advantages: Array  # [B]
    old_log_prob: Array  # [B], averaged over the chunk


class DPPO(ClippedPPO, FineTunedDiffusionPolicy):
    """The policy with DPPO's loss.

    Args:
        gamma_denoising: discount over denoising steps.
        clip_ploss_coef_base: clip range of the ratio at the first (noisiest) fine-tuned step; `clip_ploss_coef` is
            that at the last.
        clip_ploss_coef_rate: exponential rate of the interpolation between them.
        clip_advantage_lower_quantile, clip_advantage_upper_quantile: advantages are clamped to these quantiles.
        kwargs: of `ClippedPPO` and the policy.
    """

    KIND = "dppo"

    def __init__(
        self,
        gamma_denoising: float,
        clip_ploss_coef_base: float = 1e-3,
        clip_ploss_coef_rate: float = 3,
        clip_advantage_lower_quantile: float = 0,
        clip_advantage_upper_quantile: float = 1,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        self.gamma_denoising = gamma_denoising
        self.clip_ploss_coef_base, self.clip_ploss_coef_rate = clip_ploss_coef_base, clip_ploss_coef_rate
        self.advantage_quantiles = (clip_advantage_lower_quantile, clip_advantage_upper_quantile)

    def loss(  # type: ignore[override]  # another loss than pre-training's
        self,
        obs: Cond,
        chains_prev: Array,
        chains_next: Array,
        denoising_inds: Array,
        returns: Array,
        oldvalues: Array,
        advantages: Array,
        oldlogprobs: Array,
        use_bc_loss: bool = False,
        reward_horizon: int = 4,
        bc_noise: Array | None = None,
    ) -> PPOLoss:
        """The loss of one minibatch, straight from the definition.

        Args:
            obs: {"state": [B,To,O]}
            chains_prev, chains_next: [B,H,A] before and after the denoising step.
            denoising_inds: [B] in [0, F), 0 = noisiest fine-tuned step.
            returns, oldvalues, advantages: [B]
            oldlogprobs: [B,H,A] per element, of the policy that collected the data.
            use_bc_loss, bc_noise: add the log-probability of the pre-trained policy's own chains; bc_noise
                [sampling_steps + 1, B, H, A] is what they are drawn with.
            reward_horizon: only the first so many actions of a chunk count.
        """
        old_log_prob = chunk_log_prob(oldlogprobs, reward_horizon)
        batch = Minibatch(obs, chains_prev, chains_next, denoising_inds, returns, oldvalues, advantages, old_log_prob)
        return self.minibatch_loss(batch, reward_horizon, bc_noise if use_bc_loss else None)

    def minibatch_loss(self, batch: Minibatch, reward_horizon: int, bc_noise: Array | None = None) -> PPOLoss:
        """The loss from old log-probabilities already averaged over the chunk."""
        new, eta = self.log_probs_subsample(batch.obs, batch.chains_prev, batch.chains_next, batch.denoising_inds)
        pg_loss, ratio, approx_kl, clipfrac = self.step_policy_loss(
            chunk_log_prob(new, reward_horizon),
            batch.old_log_prob,
            self.step_advantages(batch.advantages, batch.denoising_inds),
            batch.denoising_inds,
        )
        newvalues = tf.reshape(self.critic(batch.obs), [-1])
        return PPOLoss(
            pg_loss=tf.reduce_mean(pg_loss),
            entropy_loss=-tf.reduce_mean(eta),
            v_loss=tf.reduce_mean(self.value_loss(newvalues, batch.returns, batch.oldvalues)),
            clipfrac=tf.reduce_mean(clipfrac),
            approx_kl=tf.reduce_mean(approx_kl),
            ratio=tf.reduce_mean(tf.stop_gradient(ratio)),
            bc_loss=tf.zeros([], self.dtype) if bc_noise is None else self.bc_loss(batch.obs, bc_noise),
            eta=tf.reduce_mean(tf.stop_gradient(eta)),
        )

    # ---------- the pieces ----------

    def step_policy_loss(
        self, log_prob: Array, old_log_prob: Array, advantages: Array, denoising_inds: Array
    ) -> tuple[Array, Array, Array, Array]:
        """`clipped_policy_loss` of denoising steps, all arguments [B]; advantages are those of `step_advantages`."""
        return clipped_policy_loss(log_prob, old_log_prob, advantages, self.clip_range(denoising_inds))

    def step_advantages(self, advantages: Array, denoising_inds: Array) -> Array:
        """Normalise [B], clamp to the quantiles, then discount by the denoising steps still to come."""
        advantages = self.normalised(advantages)
        low, high = self.advantage_quantiles
        if (low, high) != (0, 1):
            ordered = tf.sort(advantages)
            advantages = tf.clip_by_value(advantages, quantile(ordered, low), quantile(ordered, high))
        f = self.ft_denoising_steps
        discounts = tf.constant([self.gamma_denoising ** (f - i - 1) for i in range(f)], advantages.dtype)
        return advantages * tf.gather(discounts, denoising_inds)

    def clip_range(self, denoising_inds: Array) -> Array:
        """PPO's clip range [B]: base + (coef - base) (e^(rate i/(F-1)) - 1) / (e^rate - 1).

        With a single fine-tuned step the range is `clip_ploss_coef` (the reference divides zero by zero there).
        """
        f, rate = self.ft_denoising_steps, self.clip_ploss_coef_rate
        if f == 1:
            return tf.fill(tf.shape(denoising_inds), tf.constant(self.clip_ploss_coef, self.dtype))
        t = tf.cast(denoising_inds, self.dtype) / (f - 1)
        growth = (tf.exp(rate * t) - 1) / (math.exp(rate) - 1)
        return self.clip_ploss_coef_base + (self.clip_ploss_coef - self.clip_ploss_coef_base) * growth

    def bc_loss(self, obs: Cond, noise: Array) -> Array:
        """Minus the mean log-probability, under the fine-tuned policy, of chains that the pre-trained one draws.

        (Torne et al. 2024, eq. 2.) Not restricted to the reward horizon.
        """
        chains = tf.stop_gradient(self.sample(obs, noise, deterministic=False, use_base_policy=True).chains)
        log_prob, _ = self.log_probs(obs, chains)
        return -tf.reduce_mean(chunk_log_prob(log_prob, self.horizon_steps))


def chunk_log_prob(log_prob: Array, reward_horizon: int) -> Array:
    """[B,H,A] -> [B]: clamp each element, keep the first `reward_horizon` actions, average."""
    return tf.reduce_mean(tf.clip_by_value(log_prob, *LOG_PROB_RANGE)[:, :reward_horizon], axis=[1, 2])


def quantile(ordered: Array, q: float) -> Array:
    """Quantile of sorted values [N] with linear interpolation, as torch.quantile."""
    position = tf.constant(q, ordered.dtype) * tf.cast(tf.size(ordered) - 1, ordered.dtype)
    below = tf.cast(tf.floor(position), tf.int32)
    above = tf.minimum(below + 1, tf.size(ordered) - 1)
    low, high = tf.gather(ordered, below), tf.gather(ordered, above)
    return low + (high - low) * (position - tf.cast(below, ordered.dtype))
