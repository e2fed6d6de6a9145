"""Flow-matching policies: an action chunk is where an ordinary differential equation brings noise.

    FlowPolicy           straight paths from noise to data (rectified flow, Liu et al. 2022, arXiv:2209.03003)
    ShortcutFlowPolicy   the same with steps of every size, held to agree with each other (Frans et al. 2024,
                         arXiv:2410.12557), so that one large step does what many small ones do

Time runs from 0 (noise x_0) to 1 (data x_1), against the denoising steps of diffusion. Shapes as in
`policies.diffusion`; N steps of Euler's method. Everything random is an argument.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import tensorflow as tf

from diffusion_rl.core.errors import UserError
from diffusion_rl.core.keras import floatx, keras
from diffusion_rl.core.typing import Rng
from diffusion_rl.networks.layers import Array, variables_of
from diffusion_rl.policies.diffusion import Cond, Sample

TIMES = ("uniform", "logitnormal", "beta")
#: Where Euler's N steps look: closed is linspace(0, 1, N), whose last is 1; left is 0, 1/N, ..., 1 - 1/N.
GRIDS = ("closed", "left")
BETA_SHARPNESS, BETA_END = 1.5, 0.999  # times 0.999 (1 - Beta(1.5, 1)), denser near the noise


def time_grid(grid: str, steps: int) -> np.ndarray:
    """Returns the times [N] at which N steps of Euler's method evaluate the velocity."""
    return np.linspace(0, 1, steps) if grid == "closed" else np.linspace(0, 1 - 1 / steps, steps)


def draw_times(rng: Rng, kind: str, shape: tuple[int, ...]) -> np.ndarray:
    """Draws times of training, [...] in [0, 1): uniform, logit-normal, or denser near the noise (beta)."""
    if kind == "logitnormal":
        return (1 / (1 + np.exp(-rng.normal(shape, np.float64)))).astype(floatx())
    uniform = rng.uniform(shape)
    if kind == "beta":  # the quantile function of Beta(1.5, 1) is u^(1/1.5)
        uniform = BETA_END * (1 - uniform ** (1 / BETA_SHARPNESS))
    return uniform.astype(floatx())


class FlowPolicy:
    """A policy that carries noise to an action chunk along a learned velocity.

    Args:
        network: maps (x [B,H,A], time [B], cond) to the velocity [B,H,A].
        horizon_steps, obs_dim, action_dim: H, O, A.
        act_min, act_max: bounds of actions; samples are kept within them at every step.
        inference_steps: N.
        max_denoising_steps: most steps that will ever be asked for (the reference's name).
        sample_t_type: distribution of the times of training: uniform, logitnormal or beta.
        time_grid: closed or left, see `GRIDS`.
        network_path, device, seed: accepted for the reference's configurations.
    """

    KIND = "flow_policy"  # of checkpoints of pre-training
    fast = False

    def __init__(
        self,
        network: keras.layers.Layer,
        horizon_steps: int,
        obs_dim: int,
        action_dim: int,
        act_min: float = -1.0,
        act_max: float = 1.0,
        inference_steps: int = 4,
        max_denoising_steps: int = 20,
        sample_t_type: str = "uniform",
        time_grid: str = "closed",
        network_path: str | None = None,
        device: str | None = None,
        seed: int | None = None,
    ):
        for name, value, known in (("sample_t_type", sample_t_type, TIMES), ("time_grid", time_grid, GRIDS)):
            if value not in known:
                raise UserError(f"model.{name}={value}: take one of {', '.join(known)}")
        if not 1 <= inference_steps <= max_denoising_steps:
            raise UserError(f"model.inference_steps={inference_steps}: 1 to max_denoising_steps={max_denoising_steps}")
        self.network = network
        self.horizon_steps, self.obs_dim, self.action_dim = horizon_steps, obs_dim, action_dim
        self.act_min, self.act_max = float(act_min), float(act_max)
        self.inference_steps, self.max_denoising_steps = int(inference_steps), int(max_denoising_steps)
        self.sample_t_type, self.time_grid = sample_t_type, time_grid

    @property
    def dtype(self) -> tf.DType:
        """Returns the precision of the weights, and so of all results."""
        return variables_of(self.network)[0].dtype

    def noise_shape(self, batch: Any) -> tuple[Any, ...]:
        """Returns the shape of the noise of a sample: [B,H,A]."""
        return (batch, self.horizon_steps, self.action_dim)

    def draw_training(self, rng: Rng, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
        """Draws what the loss of chunks of that shape takes: times [...] and noise [...,H,A]."""
        times = draw_times(rng, self.sample_t_type, shape)
        return times, rng.normal((*shape, self.horizon_steps, self.action_dim), floatx())

    def velocity(self, x: Array, time: Array, cond: Cond, step: float) -> Array:
        """Returns the velocity [B,H,A] at x [B,H,A] and time [B]; `step` is the size of the step that will be made."""
        return self.network(x, time, cond)

    def sample(self, cond: Cond, noise: Array, steps: int | None = None, clip_each: bool = True) -> Sample:
        """Samples action chunks by Euler's method.

        Args:
            cond: {"state": [B,To,O]};  noise: [B,H,A].
            steps: N; default: `inference_steps`.
            clip_each: keep every step within the bounds of actions, not only the last.

        Returns:
            trajectories [B,H,A].
        """
        n, x = steps or self.inference_steps, noise
        for i, time in enumerate(time_grid(self.time_grid, n)):
            x = x + self.velocity(x, tf.fill([tf.shape(x)[0]], tf.constant(time, x.dtype)), cond, 1 / n) / n
            if clip_each or i == n - 1:
                x = tf.clip_by_value(x, self.act_min, self.act_max)
        return Sample(x)

    def between(self, x1: Array, time: Array, noise: Array) -> tuple[Array, Array]:
        """Returns the points at time [B] on straight paths from noise to x1 [B,H,A], and their velocity [B,H,A]."""
        t = time[:, None, None]
        return t * x1 + (1 - t) * noise, x1 - noise

    def velocity_loss(self, x: Array, time: Array, cond: Cond, target: Array) -> Array:
        """Returns the mean squared error of the velocity at x [B,H,A] and time [B] against `target` [B,H,A]."""
        return tf.reduce_mean(tf.square(self.network(x, time, cond) - target))

    def loss(self, x1: Array, cond: Cond, time: Array, noise: Array) -> Array:
        """Returns the conditional flow-matching loss (Lipman et al. 2022, arXiv:2210.02747), a scalar.

        Args:
            x1: action chunks [B,H,A];  cond: {"state": [B,To,O]};  time: [B];  noise: [B,H,A].
        """
        x, target = self.between(x1, time, noise)
        return self.velocity_loss(x, time, cond, target)


class ShortcutFlowPolicy(FlowPolicy):
    """A flow whose network knows the size of its step.

    The first rows of a batch learn that one step of size d does what two of size d/2 do; the others learn the flow
    itself, with d = 0.

    Args:
        self_consistency_k: share of the rows that learn from smaller steps.
        delta: the noise keeps that share of itself at time 1.
        kwargs: of `FlowPolicy`; the time grid is "left" alone.
    """

    KIND = "shortcut_flow_policy"

    def __init__(
        self, network: keras.layers.Layer, *, self_consistency_k: float = 0.25, delta: float = 1e-5, **kwargs: Any
    ):
        super().__init__(network, **{"time_grid": "left", **kwargs})
        self.self_consistency_k, self.delta = float(self_consistency_k), float(delta)

    def n_consistent(self, batch: int) -> int:
        """Returns how many rows of a batch learn from smaller steps."""
        return int(batch * self.self_consistency_k)

    def draw_training(self, rng: Rng, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
        """Draws times [...,2] and noise [...,H,A]. Of a time's two numbers the second one is the step's size; the first
        rows of each batch begin at multiples of theirs, 2^-e."""
        *_, batch = shape
        k = self.n_consistent(batch)
        times, steps = rng.uniform(shape), np.zeros(shape)
        exponents = rng.integers(0, self.max_denoising_steps - 1, (*shape[:-1], k))
        sections = np.exp2(exponents)
        times[..., :k], steps[..., :k] = np.floor(times[..., :k] * sections) / sections, 1 / sections
        noise = rng.normal((*shape, self.horizon_steps, self.action_dim), floatx())
        return np.stack([times, steps], axis=-1).astype(floatx()), noise

    def velocity(self, x: Array, time: Array, cond: Cond, step: float) -> Array:
        return self.network(x, time, cond, tf.fill([tf.shape(x)[0]], tf.constant(step, x.dtype)))

    def loss(self, x1: Array, cond: Cond, time: Array, noise: Array) -> Array:
        """Returns the mean squared error of both kinds of rows, a scalar.

        Args:
            x1: action chunks [B,H,A];  cond: {"state": [B,To,O]};  time: [B,2], with the size of the step;
                noise: [B,H,A].
        """
        time, step = time[:, 0], time[:, 1]
        t, k = time[:, None, None], self.n_consistent(x1.shape[0])
        x = (1 - (1 - self.delta) * t) * noise + t * x1
        target = x1 - (1 - self.delta) * noise
        if k:
            seen = {name: array[:k] for name, array in cond.items()}
            target = tf.concat([self._two_steps(x[:k], time[:k], seen, step[:k] / 2), target[k:]], axis=0)
        return tf.reduce_mean(tf.square(self.network(x, time, cond, step) - target))

    def _two_steps(self, x: Array, time: Array, cond: Cond, half: Array) -> Array:
        """Returns the mean velocity [k,H,A] of two steps of size `half` [k]; nothing is learned from its gradient."""
        first = self.network(x, time, cond, half)
        second = self.network(x + first * half[:, None, None], time + half, cond, half)
        return tf.stop_gradient((first + second) / 2)
