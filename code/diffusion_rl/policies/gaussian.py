"""Gaussian policies: a pre-trained one, and one that is being fine-tuned.

Shape letters: B batch, To observation history, O observation, H chunk, A action; cond = {"state": [B,To,O]}. Noise,
[B,H*A] standard normal, is an argument.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from diffusion_rl.core.keras import bijectors, distributions, keras
from diffusion_rl.core.typing import Array, Rng
from diffusion_rl.networks.layers import clone, dtype_of
from diffusion_rl.policies.diffusion import Cond

tfd, tfb = distributions(), bijectors()
DETERMINISTIC_STD = 1e-4  # "deterministic" samples still have a little noise


class SquashingTanh(tfb.Tanh):  # type: ignore[name-defined]  # a class of a module that is imported late
    """Tanh whose log-determinant has 1e-6 in the logarithm, which keeps it finite where tanh saturates."""

    def _forward_log_det_jacobian(self, x: Array) -> Array:
        return tf.math.log(1.0 - tf.square(tf.tanh(x)) + 1e-6)


def gaussian_sample(mean: Array, std: Array, noise: Array, clip: float, squash: bool) -> tuple[Array, Array]:
    """Returns a sample with its log-density: x = mean + std * clip(noise), and tanh(x) with `squash`.

    mean, std, noise [B,D] -> sample [B,D], log_prob [B]. The density (Haarnoja et al. 2018, appendix C, eq. 26) is
    taken at the clipped x.
    """
    z = tf.clip_by_value(noise, -clip, clip)
    bijector = tfb.Chain([*([SquashingTanh()] if squash else []), tfb.Shift(mean), tfb.Scale(std)])
    log_prob = tfd.Normal(tf.zeros([], z.dtype), 1).log_prob(z) - bijector.forward_log_det_jacobian(z, event_ndims=0)
    return bijector.forward(z), tf.reduce_sum(log_prob, axis=-1)


class GaussianPolicy:
    """A policy that is a Gaussian, independent in every element of the chunk.

    Args:
        network: cond -> (mean, std), both [B,H*A].
        horizon_steps: H.
        randn_clip_value: bound on the noise.
        tanh_output: squash samples (SAC and its kin; their networks do not squash the mean).
        network_path, device: accepted for the reference's configurations; weights are loaded by the loops.
    """

    KIND = "gaussian_policy"  # of checkpoints of pre-training

    def __init__(
        self,
        network: keras.layers.Layer,
        horizon_steps: int,
        randn_clip_value: float = 10,
        tanh_output: bool = False,
        network_path: str | None = None,
        device: str | None = None,
    ):
        self.network = network
        self.horizon_steps, self.randn_clip_value, self.tanh_output = horizon_steps, randn_clip_value, tanh_output

    @property
    def dtype(self) -> tf.DType:
        """Returns the precision of the weights, and so of all results."""
        return dtype_of(self.network)

    def noise_shape(self, batch: Any) -> tuple[Any, ...]:
        """Returns the shape of the noise of a sample: [B,H*A]."""
        return (batch, self.horizon_steps * self.network.action_dim)

    def draw_noise(self, rng: Rng, batch: int, dtype: Any) -> dict[str, np.ndarray]:
        """Draws what `sample` takes beside the observation: the noise [B,H*A]."""
        return {"noise": rng.normal(self.noise_shape(batch), dtype)}

    def mean_std(
        self,
        cond: Cond,
        deterministic: bool = False,
        network: keras.layers.Layer | None = None,
        keep_masks: Sequence[Array] = (),
    ) -> tuple[Array, Array]:
        """Returns the mean and standard deviation [B,H*A], of another network if one is given; `keep_masks`:
        dropout's."""
        mean, std = (network or self.network)(cond, **({"keep_masks": keep_masks} if keep_masks else {}))
        return mean, tf.ones_like(mean) * DETERMINISTIC_STD if deterministic else std

    def distribution(
        self, cond: Cond, network: keras.layers.Layer | None = None, keep_masks: Sequence[Array] = ()
    ) -> Any:
        """Returns TensorFlow Probability's Gaussian of every element, before squashing, as batch [B,H*A]."""
        return tfd.Normal(*self.mean_std(cond, network=network, keep_masks=keep_masks))

    def sample(
        self,
        cond: Cond,
        noise: Array,
        deterministic: bool = False,
        network: keras.layers.Layer | None = None,
        keep_masks: Sequence[Array] = (),
    ) -> tuple[Array, Array]:
        """Samples actions [B,H,A], reparametrised; returns them and their log_prob [B], summed over the chunk.

        `deterministic` shrinks the standard deviation to 1e-4; `network`, `keep_masks` as in `mean_std`.
        """
        return self.sample_of(*self.mean_std(cond, deterministic, network, keep_masks), noise)

    def sample_of(self, mean: Array, std: Array, noise: Array) -> tuple[Array, Array]:
        """Samples as `sample` does, from this mean and standard deviation [B,H*A]."""
        action, log_prob = gaussian_sample(mean, std, noise, self.randn_clip_value, self.tanh_output)
        return tf.reshape(action, [-1, self.horizon_steps, action.shape[-1] // self.horizon_steps]), log_prob

    def log_probs(self, cond: Cond, actions: Array) -> tuple[Array, Array, Array]:
        """Returns the log-probability [B] of actions [B,H,A], averaged over their elements; mean entropy; mean std."""
        return self._log_probs(cond, actions, self.network)

    def _log_probs(self, cond: Cond, actions: Array, network: keras.layers.Layer) -> tuple[Array, Array, Array]:
        normal = self.distribution(cond, network)
        log_prob = normal.log_prob(tf.reshape(actions, tf.shape(normal.loc)))
        return tf.reduce_mean(log_prob, axis=-1), tf.reduce_mean(normal.entropy()), tf.reduce_mean(normal.scale)

    def loss(
        self, actions: Array, cond: Cond, ent_coef: float, keep_masks: Sequence[Array] = ()
    ) -> tuple[Array, Array]:
        """Returns the supervised loss, minus the log-probability of actions [B,H,A], less `ent_coef` times the entropy.

        Both are means over batch and elements (of the Gaussian before squashing). `keep_masks`: dropout's, of networks
        that have it, when training. Returns the loss and the entropy.
        """
        normal = self.distribution(cond, keep_masks=keep_masks)
        log_prob = normal.log_prob(tf.reshape(actions, tf.shape(normal.loc)))
        entropy = tf.reduce_mean(normal.entropy())
        return -tf.reduce_mean(log_prob) - ent_coef * entropy, entropy


class FineTunedGaussianPolicy(GaussianPolicy):
    """A Gaussian policy under training, with its critic and a frozen copy of how it began.

    Args:
        actor: the network, also known as `network` and `actor_ft`; `actor` is the copy.
        critic: state value, cond -> [B,1].
    """

    def __init__(self, actor: keras.layers.Layer, critic: keras.layers.Layer, **kwargs: Any):
        super().__init__(network=actor, **kwargs)
        self.critic = critic
        self.actor_ft, self.actor = actor, clone(actor)

    def base(self, use_base_policy: bool) -> keras.layers.Layer:
        """Returns the frozen network, or the one under training."""
        return self.actor if use_base_policy else self.actor_ft

    def log_probs(self, cond: Cond, actions: Array, use_base_policy: bool = False) -> tuple[Array, Array, Array]:
        """Returns the log-probability [B] of actions [B,H,A], averaged over elements, of either network; mean entropy;
        mean std."""
        return self._log_probs(cond, actions, self.base(use_base_policy))
