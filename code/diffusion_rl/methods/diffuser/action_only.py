"""Action-only Diffuser: denoise the next H actions, given the current observation, and act by many samples at once.

There is no value to guide it: it imitates. Of B independent samples the executed action is their mean, whose variance
about the mean of the learned distribution is 1 / B of a sample's (its standard deviation 1 / sqrt(B)). Where that
distribution has several modes the mean may lie between them; the median, the medoid or the first sample may not.

Shape letters as in `methods.diffuser.model`; F features of the observation.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import tensorflow as tf

from diffusion_rl.core.batching import side_by_side
from diffusion_rl.core.errors import UserError
from diffusion_rl.diffusion.inpainting import Conditions, Known
from diffusion_rl.methods.diffuser.model import MIN_PART, Losses, TrajectoryDiffusion
from diffusion_rl.networks.layers import Array


class ActionDiffusion(TrajectoryDiffusion):
    """The model of actions; `model` maps (x [B,H,A], t [B], features [B,F]) to [B,H,A] and has `encode`.

    Arguments: `NoisyTrajectories`, without `loss_weights`, which are of observations.
    """

    KIND = "action_diffuser"  # of checkpoints

    def __init__(self, *args: Any, loss_weights: Any = None, **kwargs: Any):
        if loss_weights:
            raise UserError("loss_weights are weights of observations, and this model has actions only: leave them out")
        super().__init__(*args, **kwargs)

    @property
    def transition_dim(self) -> int:
        """Returns A."""
        return self.action_dim

    def loss(self, x: Array, conditions: Conditions, t: Array, noise: Array) -> Losses:
        """Returns the error of the noise or the clean actions; x, noise [B,H,A], t [B], conditions {0: [B,O]}."""
        output = side_by_side(self.output, MIN_PART, self.q_sample(x, t, noise), t, self.context(conditions))
        return self.weighted(output, noise if self.predict_epsilon else x)

    def context(self, conditions: Conditions) -> Array:
        """Returns the features [B,F]: they do not depend on the denoising step."""
        return self.model.encode(conditions[0])

    def seen(self, conditions: Conditions) -> Any:
        """Returns features [B,F] in the place of observations, which are encoded once for all samples."""
        return {0: {"features": self.context(conditions)}}

    def output(self, x: Array, t: Array, context: Array) -> Array:
        """Maps x [B,H,A], t [B], features of the observation [B,F] to [B,H,A]."""
        return self.model(x, t, context)

    def known(self, conditions: Conditions, like: Array) -> Known:
        """Says that no entry of the actions [B,H,A] is known."""
        return Known(np.zeros(like.shape[1:], bool), tf.zeros_like(like))


def aggregate(actions: np.ndarray, how: str) -> np.ndarray:
    """Makes one plan out of B: actions [E,B,H,A] -> [E,H,A].

    Args:
        how: "first" (the best, where plans were guided); "mean"; "median" of every entry; "medoid": the sample that is
            nearest to all others.
    """
    if how == "first":
        return actions[:, 0]
    if how == "mean":
        return actions.mean(axis=1)
    if how == "median":
        return np.median(actions, axis=1)
    if how == "medoid":
        flat = actions.reshape(*actions.shape[:2], -1)
        distances = np.linalg.norm(flat[:, :, None] - flat[:, None], axis=-1).sum(axis=2)
        return actions[np.arange(len(actions)), distances.argmin(axis=1)]
    raise UserError(f"--aggregate {how}: choose mean, median, medoid or first")
