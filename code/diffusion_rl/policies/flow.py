"""Flow-matching policies: an action chunk is where an ordinary differential equation brings noise.

    FlowPolicy           straight paths from noise to data (rectified flow, Liu et al. 2022, arXiv:2209.03003)
    ShortcutFlowPolicy   the same with steps of every size, held to agree with each other (Frans et al. 2024,
                         arXiv:2410.12557), so that one large step does what many small ones do

Time runs from 0 (noise x_0) to 1 (data x_1), against the denoising steps of diffusion. Shapes as in
`policies.diffusion`; N steps of Euler's method, which are called K where they are fine-tuned. Everything random is an
argument.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import numpy as np
import tensorflow as tf

from diffusion_rl.core.errors import UserError
from diffusion_rl.core.keras import floatx, keras
from diffusion_rl.core.typing import Rng
from diffusion_rl.diffusion.gaussian import normal_log_prob
from diffusion_rl.networks.flow import NoisyFlow
from diffusion_rl.networks.layers import Array, clone, dtype_of
from diffusion_rl.networks.mlp import folding
from diffusion_rl.policies.acting import Decision
from diffusion_rl.policies.diffusion import Cond, Sample, encoded

TIMES = ("uniform", "logitnormal", "beta")
#: Where Euler's N steps look: closed is linspace(0, 1, N), whose last is 1; left is 0, 1/N, ..., 1 - 1/N.
GRIDS = ("closed", "left")
#: Constructor arguments that decide, beside the weights, which action a flow takes.
SAMPLING = ("inference_steps", "time_grid", "act_min", "act_max")
HALF_LOG_2PI_E = 0.5 * math.log(2 * math.pi * math.e)
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


class FlowActor:
    """Decides for all environments at once with a flow, in one compiled program.

    policy: has `noise_shape` and `decide` (cond, noise, deterministic) -> actions [E,H,A] or (actions, chains
        [E,K+1,H,A], log-probabilities [E]).
    """

    def __init__(self, policy: Any):
        self.policy = policy
        sees = hasattr(policy.network, "encode")  # convolutions are slower when they are compiled
        self._decide = tf.function(folding()(policy.decide), jit_compile=not sees, autograph=False)

    def weights_changed(self) -> None:
        """Must be called after every change of the weights; nothing is kept between decisions here."""

    def draw(self, rng: Rng, n_envs: int) -> np.ndarray:
        """Draws the noise of one decision, of the policy's `noise_shape`."""
        return rng.normal(self.policy.noise_shape(n_envs), floatx())

    def act(self, state: np.ndarray, noise: np.ndarray, deterministic: bool, rgb: np.ndarray | None = None) -> Decision:
        """Decides for all environments.

        Args:
            state: [E,To,O];  noise: of `draw`;  deterministic: evaluate instead of explore.
            rgb: [E,To,C,Hi,Wi] pixels, where the network sees images.
        """
        dtype = self.policy.dtype
        cond = {"state": tf.constant(state, dtype)} | ({} if rgb is None else {"rgb": tf.constant(rgb)})
        actions, *chain = (x.numpy() for x in self._decide(cond, tf.constant(noise, dtype), deterministic))
        chains, log_probs = chain or (None, np.zeros(len(actions), actions.dtype))
        return Decision(actions, chains, log_probs)


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
    SAMPLING: ClassVar[tuple[str, ...]] = SAMPLING
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
        return dtype_of(self.network)

    def noise_shape(self, batch: Any) -> tuple[Any, ...]:
        """Returns the shape of the noise of a sample: [B,H,A]."""
        return (batch, self.horizon_steps, self.action_dim)

    def draw_training(self, rng: Rng, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
        """Draws what the loss of chunks of that shape takes: times [...] and noise [...,H,A]."""
        times = draw_times(rng, self.sample_t_type, shape)
        return times, rng.normal((*shape, self.horizon_steps, self.action_dim), floatx())

    def take_weights(self, weights: Mapping[str, np.ndarray], load: Callable[[Any, Any], Any]) -> None:
        """Takes the velocity of a pre-trained or fine-tuned flow, under the reference's names; `load` (module, weights)
        fills a module."""
        start = "network." if any(name.startswith("network.") for name in weights) else "actor_ft.policy."
        own = {k.removeprefix(start): v for k, v in weights.items() if k.startswith(start)}
        load(self.network, own)

    def make_actor(self) -> FlowActor:
        """Builds what decides for a vector of environments."""
        return FlowActor(self)

    def decide(self, cond: Cond, noise: Array, deterministic: bool) -> tuple[Array, ...]:
        """Returns action chunks [B,H,A] from noise [B,H,A], of which alone they are a function."""
        return (self.sample(cond, noise).trajectories,)

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
        n, x, cond = steps or self.inference_steps, noise, encoded(self.network, cond)
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
        kwargs: of `FlowPolicy`; the time grid is "left" unless it is named.
    """

    KIND = "shortcut_flow_policy"
    DEALT: ClassVar[bool] = False  # a batch is not dealt to the cores: its first rows learn otherwise

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
        t = time[:, None, None]
        x = (1 - (1 - self.delta) * t) * noise + t * x1
        target = x1 - (1 - self.delta) * noise
        cond = encoded(self.network, cond)
        if self.self_consistency_k:
            k = tf.cast(tf.cast(tf.shape(x1)[0], tf.float64) * self.self_consistency_k, tf.int32)
            seen = {name: array[:k] for name, array in cond.items()}
            target = tf.concat([self._two_steps(x[:k], time[:k], seen, step[:k] / 2), target[k:]], axis=0)
        return tf.reduce_mean(tf.square(self.network(x, time, cond, step) - target))

    def _two_steps(self, x: Array, time: Array, cond: Cond, half: Array) -> Array:
        """Returns the mean velocity [k,H,A] of two steps of size `half` [k]; nothing is learned from its gradient."""
        first = self.network(x, time, cond, half)
        second = self.network(x + first * half[:, None, None], time + half, cond, half)
        return tf.stop_gradient((first + second) / 2)


class Counting(NamedTuple):
    """How the log-probability of a chain is counted: with that of x_0, per term, per element of the chunk."""

    initial: bool
    per_step: bool
    per_element: bool


FULL = Counting(True, True, True)


class ChainSample(NamedTuple):
    """Action chunks and the chains that led to them."""

    trajectories: Array  # [B,H,A]
    chains: Array  # [B,K+1,H,A], from noise to action
    log_probs: Array  # [B]


class FineTunedFlowPolicy:
    """A flow under training whose steps have noise, its critic, and a frozen copy of how it began.

    The chain of a sample (ReinFlow, Zhang et al. 2025, arXiv:2505.22094) is

        x_0 ~ N(0, I),    x_{i+1} ~ N(clip(x_i + v(x_i, t_i, o) / K), std_i(o, t_i)^2)

    Args:
        policy: the velocity's network; `actor_ft` adds the noise, `actor_old` is the copy.
        critic: state value, cond -> [B,1].
        act_dim, horizon_steps, obs_dim, cond_steps: A, H, O, To.
        act_min, act_max: bounds of the chain's last sample.
        inference_steps, ft_denoising_steps: K, and how many of the last steps have learned noise.
        noise_scheduler_type, learn_explore_time_embedding, time_dim_explore, use_time_independent_noise,
            noise_hidden_dims, explore_net_activation_type, min_logprob_denoising_std, max_logprob_denoising_std: of
            the noise, see `NoisyFlow`.
        min_sampling_denoising_std: floor of the noise when sampling.
        randn_clip_value: bound on the noise of each step, in standard deviations.
        denoised_clip_value: bound on the mean of each step.
        time_grid: closed or left (see `GRIDS`), where steps look when sampling and in the log-probability alike.
            "upstream": closed when sampling, left in the log-probability, as the reference has it by mistake.
        actor_policy_path, network_path, device, logprob_debug_sample, logprob_debug_recalculate, clip_ploss_coef_base,
            clip_ploss_coef_rate: accepted for the reference's configurations.
    """

    GRID = "closed"
    SAMPLING = SAMPLING

    def __init__(
        self,
        policy: Any,
        critic: Any,
        act_dim: int,
        horizon_steps: int,
        obs_dim: int,
        noise_scheduler_type: str,
        inference_steps: int,
        ft_denoising_steps: int,
        min_logprob_denoising_std: float,
        max_logprob_denoising_std: float,
        min_sampling_denoising_std: float,
        cond_steps: int = 1,
        act_min: float = -1.0,
        act_max: float = 1.0,
        randn_clip_value: float = 3.0,
        denoised_clip_value: float = 1.0,
        time_grid: str | None = None,
        explore_net_activation_type: str = "Tanh",
        learn_explore_time_embedding: bool = False,
        time_dim_explore: int = 0,
        use_time_independent_noise: bool = False,
        noise_hidden_dims: Sequence[int] | None = None,
        network_path: str | None = None,
        device: str | None = None,
        **unused: Any,
    ):
        self.time_grid = self.GRID if time_grid is None else time_grid
        if self.time_grid not in (*GRIDS, "upstream"):
            raise UserError(f"model.time_grid={time_grid}: take one of {', '.join((*GRIDS, 'upstream'))}")
        if not 0 <= ft_denoising_steps <= inference_steps:
            raise UserError(f"model.ft_denoising_steps={ft_denoising_steps}: 0 to inference_steps={inference_steps}")
        self.horizon_steps, self.obs_dim, self.action_dim = horizon_steps, obs_dim, act_dim
        self.inference_steps, self.act_min, self.act_max = int(inference_steps), float(act_min), float(act_max)
        self.min_sampling_denoising_std = float(min_sampling_denoising_std)
        self.randn_clip_value, self.denoised_clip_value = float(randn_clip_value), float(denoised_clip_value)
        self.counting = FULL
        self.actor_old, self.critic = policy, critic
        self.actor_ft = NoisyFlow(
            clone(policy),
            self.inference_steps,
            self.inference_steps - int(ft_denoising_steps),
            noise_scheduler_type,
            min_logprob_denoising_std,
            max_logprob_denoising_std,
            learn_explore_time_embedding,
            time_dim_explore,
            use_time_independent_noise,
            noise_hidden_dims,
            explore_net_activation_type,
        )

    @property
    def dtype(self) -> tf.DType:
        """Returns the precision of the weights, and so of all results."""
        return dtype_of(self.actor_old)

    def noise_shape(self, batch: Any) -> tuple[Any, ...]:
        """Returns the shape of the noise of a sample: [K+1,B,H,A]."""
        return (self.inference_steps + 1, batch, self.horizon_steps, self.action_dim)

    @property
    def network(self) -> Any:
        """Returns the velocity's network that is being trained."""
        return self.actor_ft.policy

    def take_weights(self, weights: Mapping[str, np.ndarray], load: Callable[[Any, Any], Any]) -> None:
        """Takes the velocity of a pre-trained flow, or everything of a fine-tuned one; arguments as of
        `FlowPolicy.take_weights`."""
        velocity = {k.removeprefix("network."): v for k, v in weights.items() if k.startswith("network.")}
        if velocity:
            load(self.actor_old, velocity)
            load(self.network, velocity)
        else:
            load(self, weights)

    def make_actor(self) -> FlowActor:
        """Builds what decides for a vector of environments."""
        return FlowActor(self)

    def decide(self, cond: Cond, noise: Array, deterministic: bool) -> tuple[Array, ...]:
        """Returns action chunks [B,H,A], their chains [B,K+1,H,A] and log-probabilities [B]; arguments of `sample`."""
        return self.sample(cond, noise, deterministic)

    # ---------- the chain ----------

    def _grid(self, sampling: bool) -> list[float]:
        upstream = "closed" if sampling else "left"
        return time_grid(upstream if self.time_grid == "upstream" else self.time_grid, self.inference_steps).tolist()

    def size(self, batch: Array, dtype: tf.DType) -> tuple[Array, ...]:
        """Returns what the velocity's network takes beside the time: nothing; of shortcut models a step's size [B]."""
        return ()

    def step(self, i: int, time: float, x: Array, cond: Cond) -> tuple[Array, Array]:
        """Returns mean and standard deviation [B,H,A] of what follows x [B,H,A] in step i, which begins at `time`."""
        batch = tf.shape(x)[0]
        now = tf.fill([batch], tf.constant(time, x.dtype))
        velocity, std = self.actor_ft(x, now, cond, i, *self.size(batch, x.dtype))
        bound = self.denoised_clip_value
        return tf.clip_by_value(x + velocity / self.inference_steps, -bound, bound), tf.reshape(std, tf.shape(x))

    def sample(
        self, cond: Cond, noise: Array, deterministic: bool = False, counting: Counting | None = None
    ) -> ChainSample:
        """Samples action chunks [B,H,A] with their chains [B,K+1,H,A] and log-probabilities [B].

        The log-probability is that of the samples as they are after clipping, by the densities from before.

        Args:
            cond: {"state": [B,To,O]};  noise: [K+1,B,H,A];  deterministic: no noise but the first.
            counting: of the log-probability; the policy's own (`self.counting`) where it is not given.
        """
        counting = counting or self.counting
        x, cond = noise[0], encoded(self.network, cond)
        chain, terms = [x], [normal_log_prob(x, tf.zeros_like(x), tf.ones_like(x))] if counting.initial else []
        for i, time in enumerate(self._grid(sampling=True)):
            mean, std = self.step(i, time, x, cond)
            std = tf.maximum(std, self.min_sampling_denoising_std)
            reach = self.randn_clip_value * std
            x = mean if deterministic else tf.clip_by_value(mean + std * noise[i + 1], mean - reach, mean + reach)
            if i == self.inference_steps - 1:
                x = tf.clip_by_value(x, self.act_min, self.act_max)
            chain.append(x)
            terms.append(normal_log_prob(x, mean, std))
        return ChainSample(x, tf.stack(chain, axis=1), self._counted(terms, counting))

    def log_probs(self, cond: Cond, chains: Array, counting: Counting | None = None) -> tuple[Array, Array, Array]:
        """Returns the log-probability [B] of chains [B,K+1,H,A], the entropy [B] of their steps, and the mean [B] of
        their standard deviations; counting as in `sample`."""
        counting = counting or self.counting
        x, cond = tf.unstack(chains, axis=1), encoded(self.network, cond)
        terms = [normal_log_prob(x[0], tf.zeros_like(x[0]), tf.ones_like(x[0]))] if counting.initial else []
        entropies, stds = [tf.fill(tf.shape(x[0]), tf.constant(HALF_LOG_2PI_E, x[0].dtype))] * len(terms), []
        for i, time in enumerate(self._grid(sampling=False)):
            mean, std = self.step(i, time, x[i], cond)
            terms.append(normal_log_prob(x[i + 1], mean, std))
            entropies.append(HALF_LOG_2PI_E + tf.math.log(std))
            stds.append(std)
        entropy = self._counted(entropies, counting._replace(per_step=True))
        return self._counted(terms, counting), entropy, tf.reduce_mean(tf.stack(stds), axis=[0, 2, 3])

    @staticmethod
    def _counted(terms: list[Array], counting: Counting) -> Array:
        """Sums terms [B,H,A] of the steps to [B]."""
        # one sum over all: `add_n` begins with whichever term's memory is free, so its rounding depends on timing
        total = tf.reduce_sum(tf.stack(terms, axis=1), axis=[1, 2, 3])
        elements = int(terms[0].shape[1]) * int(terms[0].shape[2])
        return total / ((len(terms) if counting.per_step else 1) * (elements if counting.per_element else 1))


class FineTunedShortcutPolicy(FineTunedFlowPolicy):
    """A shortcut model under training: its velocity knows the size of the step. Arguments of `FineTunedFlowPolicy`."""

    GRID = "left"

    def size(self, batch: Array, dtype: tf.DType) -> tuple[Array, ...]:
        return (tf.fill([batch], tf.constant(1 / self.inference_steps, dtype)),)
