"""PPO for Gaussian mixture policies (Schulman et al. 2017): the action chunk is one decision.

The log-probability is the joint one of the chunk, clamped like an average: with many action dimensions most of it is
outside the range and gets no gradient, as in the reference. Imitation of the pre-trained policy adds nothing either.
"""

from __future__ import annotations

from diffusion_rl.methods.on_policy.ppo import ChunkPPO
from diffusion_rl.policies.gmm import FineTunedGMMPolicy


class GMMPPO(ChunkPPO, FineTunedGMMPolicy):  # type: ignore[misc]  # another loss
    """A mixture policy with PPO's loss."""

    KIND = "gmm_ppo"
