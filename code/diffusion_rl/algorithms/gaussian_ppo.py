"""PPO for Gaussian policies (Schulman et al. 2017): the action chunk is one decision.

Shapes: B rows of a minibatch; To, O, H, A as in `policies.gaussian`.
"""

from __future__ import annotations

from typing import Any

import tensorflow as tf

from diffusion_rl.algorithms.ppo import LOG_PROB_RANGE, ClippedPPO, PPOTerms
from diffusion_rl.networks.layers import Array
from diffusion_rl.policies.diffusion import Cond
from diffusion_rl.policies.gaussian import FineTunedGaussianPolicy


class GaussianPPO(ClippedPPO, FineTunedGaussianPolicy):
    """A Gaussian policy with PPO's loss.

    Args:
        clip_ploss_coef: clip range of the ratio.
        clip_vloss_coef: clip range of the change of the value (None: not clipped).
        norm_adv: normalise advantages within the minibatch.
    """

    def __init__(
        self, clip_ploss_coef: float, clip_vloss_coef: float | None = None, norm_adv: bool = True, **kwargs: Any
    ):
        super().__init__(**kwargs)
        self.clip_ploss_coef, self.clip_vloss_coef, self.norm_adv = clip_ploss_coef, clip_vloss_coef, norm_adv

    def loss(  # type: ignore[override]
        self,
        obs: Cond,
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
            oldlogprobs: [B], averaged over the elements of the chunk, of the policy that collected the data.
            use_bc_loss, bc_noise: add the log-probability of the pre-trained policy's own actions; bc_noise [B,H*A]
                is what they are drawn with.
        """
        log_prob, entropy, std = self.log_probs(obs, actions)
        bc_loss = None
        if use_bc_loss:
            bc_loss = self.bc_loss(obs, bc_noise)
        return self.terms(obs, log_prob, oldlogprobs, advantages, returns, oldvalues, entropy, std, bc_loss)

    def bc_loss(self, obs: Cond, noise: Array) -> Array:
        """Minus the mean log-probability of what the pre-trained policy would do (Torne et al. 2024, eq. 2)."""
        actions = tf.stop_gradient(self.sample(obs, noise, network=self.actor)[0])
        log_prob, _, _ = self.log_probs(obs, actions)
        return -tf.reduce_mean(tf.clip_by_value(log_prob, *LOG_PROB_RANGE))
