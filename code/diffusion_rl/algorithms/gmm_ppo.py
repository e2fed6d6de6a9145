"""PPO for Gaussian mixture policies (Schulman et al. 2017): the action chunk is one decision.

The log-probability is the joint one of the chunk, clamped like an average: with many action dimensions most of it is
outside the range and gets no gradient, as in the reference.
"""

from __future__ import annotations

from typing import Any

from diffusion_rl.algorithms.ppo import ClippedPPO, PPOTerms
from diffusion_rl.networks.layers import Array
from diffusion_rl.policies.diffusion import Cond
from diffusion_rl.policies.gmm import FineTunedGMMPolicy


class GMMPPO(ClippedPPO, FineTunedGMMPolicy):
    """A mixture policy with PPO's loss.

    Args:
        clip_ploss_coef, clip_vloss_coef, norm_adv: as in `GaussianPPO`.
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
        **unused: Any,
    ) -> PPOTerms:
        """The loss of one minibatch.

        Args:
            obs: {"state": [B,To,O]};  actions: [B,H,A];  returns, oldvalues, advantages: [B]
            oldlogprobs: [B] joint log-probabilities of the policy that collected the data.
        """
        log_prob, entropy, std = self.log_probs(obs, actions)
        return self.terms(obs, log_prob, oldlogprobs, advantages, returns, oldvalues, entropy, std)
