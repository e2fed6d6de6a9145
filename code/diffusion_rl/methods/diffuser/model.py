"""Diffuser (Janner et al. 2022, arXiv:2205.09991): plan by denoising whole trajectories, guided by a value.

A trajectory is H transitions of D = A + O numbers, actions first, normalised. Entries that are known (the current
observation, a goal) are put back after every step. The best of many samples by value is acted on.

Shape letters: B batch, T denoising steps, H horizon, A action, O observation, D = A + O. Everything random is an
argument: `noise[0]` is x_T and `noise[1 + i]` belongs to the i-th step, the last one's being multiplied by zero.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from diffusion_rl.core.batching import parts, side_by_side
from diffusion_rl.core.errors import UserError
from diffusion_rl.core.keras import keras
from diffusion_rl.core.typing import Rng
from diffusion_rl.diffusion import process
from diffusion_rl.diffusion.gaussian import clip
from diffusion_rl.diffusion.guidance import Guide, best_first
from diffusion_rl.diffusion.inpainting import Conditions, Known, apply_conditions
from diffusion_rl.diffusion.schedules import DDPMSchedule, ddpm_schedule
from diffusion_rl.networks.convolution import shared_matrices
from diffusion_rl.networks.layers import Array, dtype_of

MIN_PART = 8  # trajectories that are denoised together
LOSSES = {"l1": tf.abs, "l2": tf.square, "value_l1": tf.abs, "value_l2": tf.square}
Losses = tuple[Array, dict[str, Array]]  # the loss, and what else is worth logging


class Plans(NamedTuple):
    """A batch of sampled trajectories, the best first where they were guided."""

    trajectories: Array  # [B,H,D]
    values: Array  # [B], zero without guidance
    chains: Array | None = None  # [B,T+1,H,D], noisiest first, in the order of the noise


class NoisyTrajectories:
    """The forward process on trajectories: what the diffusion model and the value model have in common.

    Args:
        model: the network.
        horizon, observation_dim, action_dim: H, O, A.
        n_timesteps: T.
        loss_type: "l1" or "l2", "value_l1" or "value_l2".
        clip_denoised: bound the estimate of the clean trajectory by +-1.
        predict_epsilon: the network gives the noise; otherwise the clean trajectory.
        action_weight: of the first action's error.
        loss_discount: weight of errors by time, scaled to a mean of one.
        loss_weights: {index of an observation entry: weight of its error}.
    """

    KIND: str  # of checkpoints
    loss: Any  # (windows, conditions, t, noise, …) -> Losses, of each subclass

    def __init__(
        self,
        model: keras.layers.Layer,
        horizon: int,
        observation_dim: int,
        action_dim: int,
        n_timesteps: int = 1000,
        loss_type: str = "l1",
        clip_denoised: bool = False,
        predict_epsilon: bool = True,
        action_weight: float = 1.0,
        loss_discount: float = 1.0,
        loss_weights: Mapping[int, float] | None = None,
    ):
        if loss_type not in LOSSES:
            raise UserError(f"loss_type={loss_type!r}: choose one of {', '.join(LOSSES)}")
        self.model, self.horizon, self.n_timesteps = model, horizon, n_timesteps
        self.observation_dim, self.action_dim = observation_dim, action_dim
        self.error, self.clip_denoised, self.predict_epsilon = LOSSES[loss_type], clip_denoised, predict_epsilon
        self.schedule: DDPMSchedule = ddpm_schedule(n_timesteps)
        self.loss_weights = self.weights_of(action_weight, loss_discount, loss_weights)

    @property
    def transition_dim(self) -> int:
        """Returns D."""
        return self.action_dim + self.observation_dim

    @property
    def dtype(self) -> tf.DType:
        """Returns the type of the weights, and so of everything computed with them."""
        return dtype_of(self.model)

    def q_sample(self, x_start: Array, t: Array, noise: Array) -> Array:
        """Returns x_t of clean trajectories [B,H,D] at steps t [B]."""
        return process.q_sample(self.schedule, x_start, t, noise)

    def weights_of(
        self, action_weight: float, loss_discount: float, loss_weights: Mapping[int, float] | None
    ) -> np.ndarray:
        """Returns the weights of the loss [H,D], float32."""
        discounts = np.float32(loss_discount) ** np.arange(self.horizon, dtype=np.float32)
        by_entry = np.ones(self.transition_dim, np.float32)
        for index, weight in (loss_weights or {}).items():
            by_entry[self.action_dim + int(index)] *= weight
        weights = np.outer(discounts / discounts.mean(), by_entry)
        weights[0, : self.action_dim] = action_weight
        return weights


class TrajectoryDiffusion(NoisyTrajectories):
    """The model of trajectories; `model` maps (x [B,H,D], t [B]) to [B,H,D]. Arguments: `NoisyTrajectories`."""

    KIND = "diffuser"  # of checkpoints

    # ---------- training ----------

    def loss(self, x: Array, conditions: Conditions, t: Array, noise: Array) -> Losses:
        """Returns the error of the noise or the clean trajectory; x, noise [B,H,D], t [B] integers.

        The known entries of the clean trajectory are exact by construction, so their error is zero. Predicted noise
        counts in all of its entries, none of which is known (the reference overwrites them with observations).
        """
        noisy = apply_conditions(self.q_sample(x, t, noise), conditions, self.action_dim)
        output = side_by_side(self.model, MIN_PART, noisy, t)
        if self.predict_epsilon:
            return self.weighted(output, noise)
        return self.weighted(apply_conditions(output, conditions, self.action_dim), x)

    def weighted(self, output: Array, target: Array) -> Losses:
        """Averages the weighted error [B,H,D]; `a0_loss` is the first action's, as the reference prints it: divided by
        its weight; `a0_error` is the plain one."""
        errors, weights = self.error(output - target), tf.constant(self.loss_weights, output.dtype)
        first = errors[:, 0, : self.action_dim]
        infos = {"a0_loss": tf.reduce_mean(first / weights[0, : self.action_dim]), "a0_error": tf.reduce_mean(first)}
        return tf.reduce_mean(errors * weights), infos

    # ---------- sampling ----------

    def predict_x0(self, x: Array, t: Array, output: Array) -> Array:
        """Returns the clean trajectory by the network's output [B,H,D]."""
        return process.predict_x0(self.schedule, x, t, output) if self.predict_epsilon else output

    def posterior(self, x0: Array, x: Array, t: Array) -> tuple[Array, Array, Array]:
        """Returns the mean [B,H,D], variance and log-variance [B,1,1] of x_{t-1} given x_t and the clean trajectory."""
        s = self.schedule
        variance, log_variance = process.entries(s.ddpm_var, t, x.dtype), process.posterior_log_variance(s, t, x.dtype)
        return process.posterior_mean(s, x, t, x0), variance, log_variance

    def context(self, conditions: Conditions) -> Any:
        """Returns what the network sees of the conditions besides the trajectory itself; here nothing."""
        return None

    def seen(self, conditions: Conditions) -> Any:
        """Returns the conditions [E,O] as samples are given them: computed once for all samples of an environment."""
        return conditions

    def output(self, x: Array, t: Array, context: Any) -> Array:
        """Returns the network's output [B,H,D]."""
        return self.model(x, t)

    def known(self, conditions: Conditions, like: Array) -> Known:
        """Returns the entries of trajectories [B,H,D] that the conditions fix."""
        return Known.of(conditions, like.shape[1], self.action_dim, like)

    def p_mean_variance(self, x: Array, t: Array, context: Any = None) -> tuple[Array, Array, Array]:
        """Returns the mean [B,H,D], variance and log-variance [B,1,1] of x_{t-1} given x_t alone."""
        x0 = self.predict_x0(x, t, self.output(x, t, context))
        return self.posterior(clip(x0, 1.0 if self.clip_denoised else None), x, t)

    def step(
        self, x: Array, t: Array, noise: Array, known: Known, guide: Guide | None, context: Any = None
    ) -> tuple[Array, Array]:
        """Returns x_{t-1} [B,H,D] without the known entries in place, and the values [B] that led to it."""
        values = tf.zeros(tf.shape(x)[:1], x.dtype)
        if guide is not None:
            x, values = guide.ascend(x, t, self.variance(t, x.dtype), known.put)
        mean, _, log_variance = self.p_mean_variance(x, t, context)
        drawn = tf.cast(t > 0, x.dtype)[:, None, None] * noise
        return mean + tf.exp(0.5 * log_variance) * drawn, values

    def sample(
        self,
        conditions: Conditions,
        noise: Array,
        guide: Guide | None = None,
        with_chain: bool = False,
        groups: int = 1,
    ) -> Plans:
        """Denoises trajectories, in one part per core. Graph-safe: a loop of T steps for each part.

        Args:
            conditions: known observations [B,O], or [1,O] for all samples, by time index.
            noise: [T+1,B,H,D]; H may differ from the horizon of training if there is no guide.
            with_chain: return every intermediate trajectory.
            groups: of samples that are sorted by value each by itself.
        """
        with shared_matrices():
            samples = []
            for cut in parts(noise.shape[1], MIN_PART):  # side by side
                known = tf.nest.map_structure(lambda o, cut=cut: o if o.shape[0] == 1 else o[cut], dict(conditions))
                samples.append(self._denoise(known, noise[:, cut], guide, with_chain))
        x, values, chain = (tf.concat(column, axis=0) for column in zip(*samples, strict=True))
        if guide is not None:
            values, x = best_first(values, x, groups)
        return Plans(x, values, chain if with_chain else None)

    def _denoise(
        self, conditions: Conditions, noise: Array, guide: Guide | None, with_chain: bool
    ) -> tuple[Array, Array, Array]:
        """Returns trajectories [B,H,D] in the order of the noise, values [B], chains [B,T+1,H,D] (or no entries)."""
        known, context = self.known(conditions, noise[0]), self.context(conditions)
        steps, first = self.n_timesteps, tf.zeros([1], tf.int32)
        chain = tf.TensorArray(noise.dtype, size=steps + 1 if with_chain else 0, element_shape=noise.shape[1:])

        def body(i: Array, x: Array, before: Array, values: Array, chain: tf.TensorArray) -> tuple[Array, ...]:
            t = tf.fill([1], steps - 1 - i)
            if guide is not None:
                x, values = guide.where_allowed(x, t, self.variance(t, x.dtype), known.put, values)
            before, (x, _) = x, self.step(x, t, noise[i + 1], known, None, context)
            x = tf.ensure_shape(known.put(x), noise.shape[1:])  # a batch of one loses its shape on the way
            return i + 1, x, before, values, chain.write(i + 1, x) if with_chain else chain

        x = known.put(noise[0])
        start = (0, x, x, tf.zeros(tf.shape(x)[:1], x.dtype), chain.write(0, x) if with_chain else chain)
        _, x, before, values, chain = tf.while_loop(lambda i, *_: i < steps, body, start, maximum_iterations=steps)
        if guide is not None and guide.t_stopgrad > 0:
            values = guide.value(before, first)
        return x, values, tf.transpose(chain.stack(), [1, 0, 2, 3]) if with_chain else x[:, :0]

    def variance(self, t: Array, dtype: tf.DType) -> Array:
        """Returns the variance of the denoising step at t [B], as [B,1,1]; a guide scales its gradient by it."""
        return tf.exp(process.posterior_log_variance(self.schedule, t, dtype))


class ValueDiffusion(NoisyTrajectories):
    """The return of noisy trajectories; `model` maps (x [B,H,D], t [B]) to [B,1]. Arguments: `NoisyTrajectories`."""

    KIND = "diffuser_values"  # of checkpoints

    def value(self, x: Array, t: Array) -> Array:
        """Returns the values [B] of trajectories [B,H,D]."""
        return self.model(x, t)[:, 0]

    def loss(self, x: Array, conditions: Conditions, t: Array, noise: Array, target: Array) -> Losses:
        """Returns the error of the predicted returns; x, noise [B,H,D], t [B] integers, target [B,1]."""
        noisy = apply_conditions(self.q_sample(x, t, noise), conditions, self.action_dim)
        return self.regression(side_by_side(self.model, MIN_PART, noisy, t), target)

    def regression(self, prediction: Array, target: Array) -> Losses:
        """Averages the error of predictions [B,1]; with means, extremes and Pearson's correlation (NaN for one row)."""
        infos: dict[str, Array] = {}
        for name, reduce in (("mean", tf.reduce_mean), ("min", tf.reduce_min), ("max", tf.reduce_max)):
            infos |= {f"{name}_pred": reduce(prediction), f"{name}_targ": reduce(target)}
        p, y = prediction - infos["mean_pred"], target - infos["mean_targ"]
        spread = tf.sqrt(tf.reduce_sum(p * p) * tf.reduce_sum(y * y))
        return tf.reduce_mean(self.error(prediction - target)), infos | {"corr": tf.reduce_sum(p * y) / spread}


class Decision(NamedTuple):
    """B plans for each of E environments, in the environment's units, the best first where they were guided."""

    actions: np.ndarray  # [E,B,H,A]
    observations: np.ndarray  # [E,B,H,O], or no entries where actions alone are planned
    values: np.ndarray  # [E,B]


class Diffuser:
    """Plans from the current observation.

    Args:
        diffusion: the model of trajectories.
        normalizers: of "observations" and "actions".
        guide: None: plans are not guided.
        batch_size: B.
        horizon: of the plans, where it is to differ from training's (not with a guide).
    """

    def __init__(
        self,
        diffusion: TrajectoryDiffusion,
        normalizers: Mapping[str, Any],
        guide: Guide | None = None,
        batch_size: int = 64,
        horizon: int | None = None,
    ):
        if guide is not None and diffusion.transition_dim == diffusion.action_dim:
            raise UserError(
                "guided planning needs a model of states and actions, and this one has actions only, of which no "
                "value is known: use python scripts/plan_unguided.py, or train with --diffusion_type states_actions"
            )
        self.diffusion, self.normalizers, self.guide = diffusion, normalizers, guide
        self.batch_size, self.horizon = batch_size, horizon or diffusion.horizon
        self._sample = tf.function(self._plans, autograph=False)

    def draw(self, rng: Rng, n_envs: int) -> np.ndarray:
        """Draws what one decision needs, [T+1,E*B,H,D]."""
        rows = n_envs * self.batch_size
        return rng.normal((self.diffusion.n_timesteps + 1, rows, self.horizon, self.diffusion.transition_dim))

    def act(self, conditions: Mapping[int, Any], noise: np.ndarray) -> Decision:
        """Plans in E environments.

        Args:
            conditions: observations [E,O] by time index (0: the current ones), in the environment's units; with
                pictures {"state": [E,O], "rgb": [E,C,Hi,Wi]}.
            noise: of `draw`.
        """
        n_envs, dtype = noise.shape[1] // self.batch_size, self.diffusion.dtype
        known = {t: self._normalised(o) for t, o in conditions.items()}
        trajectories, values = (tensor.numpy() for tensor in self._sample(known, tf.constant(noise, dtype), n_envs))
        plans = trajectories.reshape(n_envs, self.batch_size, *trajectories.shape[1:])
        actions = self.normalizers["actions"].unnormalize(plans[..., : self.diffusion.action_dim])
        observations = plans[..., self.diffusion.action_dim :]
        if observations.shape[-1]:
            observations = self.normalizers["observations"].unnormalize(observations)
        return Decision(actions, observations, values.reshape(n_envs, self.batch_size))

    def _normalised(self, observation: Any) -> Any:
        if isinstance(observation, Mapping):
            return {"state": self._normalised(observation["state"]), "rgb": tf.constant(observation["rgb"])}
        return tf.constant(self.normalizers["observations"].normalize(observation), self.diffusion.dtype)

    def _plans(self, conditions: Conditions, noise: Array, groups: int) -> tuple[Array, Array]:
        def for_all(o: Array) -> Array:
            return tf.reshape(tf.repeat(o, self.batch_size, axis=0), [noise.shape[1], *o.shape[1:]])

        known = tf.nest.map_structure(for_all, self.diffusion.seen(conditions))
        return self.diffusion.sample(known, noise, self.guide, groups=groups)[:2]
