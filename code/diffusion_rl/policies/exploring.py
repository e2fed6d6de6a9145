"""The policies of the off-policy algorithms: how they sample, and what they draw to act.

A diffusion policy of which every denoising step is trained, and a Gaussian one. Shape letters as in
`policies.diffusion`; `settings` is the `train` node of the configuration.
"""

from __future__ import annotations

from typing import Any

import tensorflow as tf

from diffusion_rl.core.errors import UserError
from diffusion_rl.core.keras import keras
from diffusion_rl.core.typing import Array, Rng
from diffusion_rl.diffusion import process
from diffusion_rl.diffusion.gaussian import clip
from diffusion_rl.networks.folded import FoldedActor
from diffusion_rl.networks.layers import flatten_state, variables_of
from diffusion_rl.policies.diffusion import Cond, DiffusionPolicy
from diffusion_rl.policies.gaussian import GaussianPolicy


class ExploringDiffusionPolicy(DiffusionPolicy):
    """Samples with DDPM and, when exploring, with at least a given noise at every step.

    Args:
        actor: the network, then known as `network` and `actor`; or
        network: the network, known under this name alone.
        min_sampling_denoising_std: floor of the standard deviation when exploring.
    """

    SIDE_BY_SIDE = True  # its updates are large products, for one core each

    def __init__(
        self,
        actor: keras.layers.Layer | None = None,
        network: keras.layers.Layer | None = None,
        min_sampling_denoising_std: float = 0.1,
        use_ddim: bool = False,
        **kwargs: Any,
    ):
        if use_ddim:
            raise UserError("model.use_ddim=true: this algorithm samples with DDPM only")
        super().__init__(network=actor if actor is not None else network, **kwargs)
        if actor is not None:
            self.actor = self.network
        self.min_sampling_denoising_std = float(min_sampling_denoising_std)

    def sample(
        self,
        cond: Cond,
        noise: Array,
        deterministic: bool = False,
        network: keras.layers.Layer | None = None,
        final_clip: float | None = None,
    ) -> Array:
        """Denoises from noise[0]; differentiable.

        Args:
            noise: `noise_shape`, standard normal.
            deterministic: DDPM's own noise (at least 1e-3) and none at the last step, instead of the exploration floor.
            network: another network than the policy's own.
            final_clip: bound on the sample, instead of `final_action_clip_value`.

        Returns:
            action chunks [B,H,A].
        """
        noise = tf.cast(noise, self.dtype)
        predict = self.predictor(self.network if network is None else network)
        x, batch = noise[0], tf.shape(noise)[1]
        floor = 1e-3 if deterministic else self.min_sampling_denoising_std
        bound = self.final_action_clip_value if final_clip is None else final_clip
        if isinstance(predict, FoldedActor) and predict.chains:
            return clip(self._denoised(predict, cond, noise, floor, deterministic), bound)
        for i, t in enumerate(self.sampling_timesteps()):
            t_batch = tf.fill([batch], int(t))
            mean = self.denoised_mean(x, t_batch, None, predict(x, t_batch, cond), None)
            logvar = process.posterior_log_variance(self.schedule, t_batch, self.dtype)
            x = self.noisy(int(t), mean, logvar, noise[i + 1], floor, zero_at_end=deterministic)
        return clip(x, bound)

    def _denoised(self, predict: FoldedActor, cond: Cond, noise: Array, floor: float, deterministic: bool) -> Array:
        """Returns the chunks [B,H,A] of `sample`, not clipped yet, by the network's chain over flat chunks [B,H*A]."""
        steps, s = self.sampling_timesteps(), self.schedule
        flat = tf.reshape(noise, [len(steps) + 1, -1, self.horizon_steps * self.action_dim])
        std = tf.exp(0.5 * tf.constant(s.ddpm_logvar_clipped[steps], self.dtype))
        std = tf.maximum(std, tf.constant(floor, self.dtype))
        if deterministic:
            std *= tf.constant(steps != 0, self.dtype)
        shifts = std[:, None, None] * clip(flat[1:], self.randn_clip_value)

        def step(t: int, x: Array, output: Array, shift: Array) -> Array:
            t_batch = tf.fill([1], t)
            return self.denoised_mean(x[None], t_batch, None, output[None], None)[0] + shift

        x = predict.chain(flat[0], flatten_state(cond), tf.einsum("sbx->bsx", shifts), steps, step)
        return tf.reshape(x, tf.shape(noise[0]))

    # ---------- acting ----------

    def draw_action(self, rng: Rng, batch: int, deterministic: bool, settings: Any) -> dict[str, Array]:
        """Returns the draws that `act` takes, by name."""
        return {"noise": rng.normal(self.noise_shape(batch), self.dtype.as_numpy_dtype)}

    def act(self, cond: Cond, draws: dict[str, Array], deterministic: bool, settings: Any) -> Any:
        """Returns action chunks [B,H,A]; or candidates [B,N,H,A] and the weights [B,N] to choose one of them by."""
        return self.sample(cond, draws["noise"], deterministic)


class ExploringGaussianPolicy(GaussianPolicy):
    """A Gaussian policy that explores by its own spread; arguments as in `GaussianPolicy`."""

    def trainable(self) -> list[tf.Variable]:
        """Returns the network's weights that are trained."""
        return [v for v in variables_of(self.network) if v.trainable]

    def draw_action(self, rng: Rng, batch: int, deterministic: bool, settings: Any) -> dict[str, Any]:
        """Returns the draws that `act` takes, by name."""
        return self.draw_noise(rng, batch, self.dtype.as_numpy_dtype)

    def act(self, cond: Cond, draws: dict[str, Array], deterministic: bool, settings: Any) -> Any:
        """Returns action chunks [B,H,A]; or candidates [B,N,H,A] and the weights [B,N] to choose one of them by."""
        return self.sample(cond, draws["noise"], deterministic)[0]
