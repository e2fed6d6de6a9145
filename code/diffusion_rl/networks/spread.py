"""Standard deviations of Gaussian policies: fixed, learned per action dimension, or predicted.

Shape letters: B batch, H horizon, A action, M mixture components.
"""

from __future__ import annotations

import numpy as np
import tensorflow as tf

from diffusion_rl.core.keras import floatx
from diffusion_rl.core.typing import Array
from diffusion_rl.networks.layers import Network


class SpreadOwner(Network):
    """A network with a range for its standard deviation and, where it is fixed but learned, the variable for it."""

    def init_spread(
        self,
        size: int,
        /,
        fixed_std: float | None = None,
        learn_fixed_std: bool = False,
        std_min: float = 0.01,
        std_max: float = 1.0,
    ) -> None:
        """Creates the variables under the reference's names.

        Args:
            size: how many standard deviations are learned with `learn_fixed_std`: A, or M * A.
            fixed_std: standard deviation of every element; None: the network predicts it.
            learn_fixed_std: with fixed_std, learn one for each action dimension (and mode), starting there.
            std_min, std_max: range of a learned or predicted one.
        """
        self.fixed_std, self.learn_fixed_std = fixed_std, learn_fixed_std and fixed_std is not None
        if fixed_std is not None and learn_fixed_std:
            self.logvar = tf.Variable(np.full(size, np.log(fixed_std**2), floatx()), name="logvar")
        # Not trained, but part of the reference's state_dict.
        self.logvar_min = tf.Variable(np.log(np.asarray(std_min**2, floatx())), trainable=False, name="logvar_min")
        self.logvar_max = tf.Variable(np.log(np.asarray(std_max**2, floatx())), trainable=False, name="logvar_max")

    def clamped_std(self, logvar: Array) -> Array:
        """Returns exp(logvar / 2) in the range, [...]; outside of it there is no gradient."""
        return tf.exp(0.5 * tf.clip_by_value(logvar, self.logvar_min, self.logvar_max))

    def squashed_std(self, raw: Array) -> Array:
        """Reaches the range's logarithms by tanh, [...] -> [...]: raw 0 is the geometric middle."""
        low, high = self.logvar_min, self.logvar_max
        return tf.exp(0.5 * (low + 0.5 * (high - low) * (tf.tanh(raw) + 1)))

    def constant_std(self, mean: Array, horizon_steps: int) -> Array:
        """Returns the fixed standard deviation in the shape of the mean, [B,H*A] or [B,M,H*A], the same at every
        step."""
        if not self.learn_fixed_std:
            return tf.ones_like(mean) * self.fixed_std
        per_action = tf.reshape(self.clamped_std(self.logvar), [*mean.shape[1:-1], -1])
        repeats = [*[1] * (len(mean.shape) - 2), horizon_steps]
        return tf.ones_like(mean) * tf.tile(per_action, repeats)[None]
