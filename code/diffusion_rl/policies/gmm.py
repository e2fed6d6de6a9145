"""Gaussian mixture policies: a pre-trained one, and one that is being fine-tuned.

Shape letters: B batch, To observation history, O observation, H chunk, A action, M modes; cond = {"state": [B,To,O]}.
Draws are arguments: the mode of each row (or a uniform draw that picks it), and standard normal noise for every mode.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from diffusion_rl.core.keras import distributions, keras
from diffusion_rl.core.typing import Array, Rng
from diffusion_rl.networks.layers import dtype_of
from diffusion_rl.policies.diffusion import Cond
from diffusion_rl.policies.gaussian import DETERMINISTIC_STD

tfd = distributions()


class GMMPolicy:
    """A policy that is a mixture of Gaussians over whole chunks.

    Args:
        network: cond -> (means [B,M,H*A], stds [B,M,H*A], logits [B,M]).
        horizon_steps: H.
        network_path, device, unused: accepted for the reference's configurations; weights are loaded by the loops.
    """

    KIND = "gmm_policy"  # of checkpoints of pre-training

    def __init__(
        self,
        network: keras.layers.Layer,
        horizon_steps: int,
        network_path: str | None = None,
        device: str | None = None,
        **unused: Any,
    ):
        self.network, self.horizon_steps = network, horizon_steps

    @property
    def dtype(self) -> tf.DType:
        """Returns the precision of the weights, and so of all results."""
        return dtype_of(self.network)

    def noise_shape(self, batch: Any) -> tuple[Any, ...]:
        """Returns the shape of the noise of a sample: [B,M,H*A]."""
        return (batch, self.network.num_modes, self.horizon_steps * self.network.action_dim)

    def draw_noise(self, rng: Rng, batch: int, dtype: Any) -> dict[str, np.ndarray]:
        """Draws what `sample` takes beside the observation: what picks the modes, [B], and the noise [B,M,H*A]."""
        return {"uniform": rng.uniform((batch,), dtype=dtype), "noise": rng.normal(self.noise_shape(batch), dtype)}

    def distribution(self, cond: Cond, deterministic: bool = False, keep_masks: Sequence[Array] = ()) -> Any:
        """Returns the mixture over [H*A]; `deterministic` shrinks all standard deviations to 1e-4; `keep_masks`:
        dropout's."""
        means, stds, logits = self.network(cond, **({"keep_masks": keep_masks} if keep_masks else {}))
        if deterministic:
            stds = tf.ones_like(means) * DETERMINISTIC_STD
        return tfd.MixtureSameFamily(
            tfd.Categorical(logits=logits), tfd.Independent(tfd.Normal(means, stds), reinterpreted_batch_ndims=1)
        )

    def log_probs(self, cond: Cond, actions: Array, keep_masks: Sequence[Array] = ()) -> tuple[Array, Array, Array]:
        """Returns the joint log-probability [B] of actions [B,H,A], approximate entropy, mean standard deviation.

        The entropy is that of the modes' Gaussians, weighted by the modes and averaged over the batch: without the
        mixing itself.
        """
        mixture = self.distribution(cond, keep_masks=keep_masks)
        gaussians = mixture.components_distribution
        stds = gaussians.distribution.scale
        weights = tf.nn.softmax(mixture.mixture_distribution.logits)
        entropy = tf.reduce_sum(weights * gaussians.entropy(), axis=-1)
        std = tf.reduce_sum(weights * tf.reduce_mean(stds, axis=-1), axis=-1)
        log_prob = mixture.log_prob(tf.reshape(actions, [-1, stds.shape[-1]]))
        return log_prob, tf.reduce_mean(entropy), tf.reduce_mean(std)

    def loss(self, actions: Array, cond: Cond, keep_masks: Sequence[Array] = (), **unused: Any) -> tuple[Array, Array]:
        """Returns the supervised loss, minus the joint log-probability of actions [B,H,A], averaged over the batch; and
        the entropy.

        `keep_masks`: dropout's, of networks that have it, when training.
        """
        log_prob, entropy, _ = self.log_probs(cond, actions, keep_masks)
        return -tf.reduce_mean(log_prob), entropy

    def sample(
        self,
        cond: Cond,
        noise: Array,
        uniform: Array | None = None,
        deterministic: bool = False,
        modes: Array | None = None,
    ) -> Array:
        """Samples actions [B,H,A].

        Args:
            noise: [B,M,H*A] standard normal; the chosen mode's is used.
            uniform: [B] in [0,1): the mode is where it falls in the cumulated weights.
            modes: [B] integers, instead of `uniform`.
        """
        mixture = self.distribution(cond, deterministic)
        gaussians = mixture.components_distribution.distribution
        if modes is None:
            cumulated = tf.cumsum(tf.nn.softmax(mixture.mixture_distribution.logits), axis=-1)
            below = tf.cast(cumulated[:, :-1] <= tf.cast(uniform, cumulated.dtype)[:, None], tf.int32)
            modes = tf.reduce_sum(below, axis=-1)
        actions = tf.gather(gaussians.loc + gaussians.scale * noise, modes, axis=1, batch_dims=1)
        return tf.reshape(actions, [-1, self.horizon_steps, actions.shape[-1] // self.horizon_steps])


class FineTunedGMMPolicy(GMMPolicy):
    """A mixture policy under training, with its critic.

    Args:
        actor: the network, also known as `network` and `actor_ft`.
        critic: state value, cond -> [B,1].
    """

    def __init__(self, actor: keras.layers.Layer, critic: keras.layers.Layer, **kwargs: Any):
        super().__init__(network=actor, **kwargs)
        self.actor_ft, self.critic = actor, critic
