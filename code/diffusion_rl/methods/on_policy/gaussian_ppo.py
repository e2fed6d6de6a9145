"""PPO for Gaussian policies (Schulman et al. 2017): the action chunk is one decision.

Its log-probability is the average over the elements of the chunk, so that the clip range means the same for any
number of them.
"""

from __future__ import annotations

import tensorflow as tf

from diffusion_rl.methods.on_policy.ppo import LOG_PROB_RANGE, ChunkPPO
from diffusion_rl.networks.layers import Array
from diffusion_rl.policies.diffusion import Cond
from diffusion_rl.policies.gaussian import FineTunedGaussianPolicy


class GaussianPPO(ChunkPPO, FineTunedGaussianPolicy):  # type: ignore[misc]  # `loss` is PPO's
    """A Gaussian policy with PPO's loss."""

    KIND = "gaussian_ppo"
    LABEL = "Gaussian PPO"

    def bc_noise_shape(self, rows: int) -> tuple[int, ...]:
        return rows, self.horizon_steps * self.network.action_dim

    def bc_loss(self, obs: Cond, noise: Array | None) -> Array:
        """Returns minus the mean log-probability of what the pre-trained policy would do (Torne et al. 2024, eq. 2).

        Args:
            noise: [B,H*A], what its actions are drawn with.
        """
        actions = tf.stop_gradient(self.sample(obs, noise, network=self.actor)[0])
        log_prob, _, _ = self.log_probs(obs, actions)
        return -tf.reduce_mean(tf.clip_by_value(log_prob, *LOG_PROB_RANGE))
