"""Diffusion policies: a pre-trained one, and one whose last denoising steps are being fine-tuned.

Shapes: B batch, K denoising steps, F fine-tuned ones, To observation history, H horizon, O observation, A action.
Everything random is an argument: `noise[0]` is x_T and `noise[1 + i]` belongs to step i, both before clamping.

An observation `cond` is {"state": [B,To,O]}, with "rgb" [B,To,C,Hi,Wi] where the networks see images. Their features do
not depend on the denoising step: samples and log-probabilities of chains encode every observation once (`encoded`).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from diffusion_rl.core.errors import UserError
from diffusion_rl.core.keras import floatx, keras
from diffusion_rl.core.typing import Rng
from diffusion_rl.diffusion import ddim, process
from diffusion_rl.diffusion.gaussian import clip, normal_log_prob
from diffusion_rl.diffusion.schedules import ddim_schedule, ddpm_schedule
from diffusion_rl.networks.folded import FoldedActor, can_fold
from diffusion_rl.networks.layers import Array, clone, copy_weights, dtype_of

Cond = dict[str, Array]


class Sample(NamedTuple):
    """A batch of action chunks and, where asked for, the denoising chain that led to them."""

    trajectories: Array  # [B,H,A]
    chains: Array | None = None  # [B,F+1,H,A], noisiest first
    log_probs: Array | None = None  # [B,F,H,A] of the steps of the chain, if asked for


def encoded(network: keras.layers.Layer, cond: Cond) -> Cond:
    """Returns the observation as this network takes it without looking at the images again; others get it as it is."""
    return network.encode(cond) if hasattr(network, "encode") else cond


class DiffusionPolicy:
    """A policy p(a | o) that denoises an action chunk (DDPM, or DDIM for fewer steps).

    Args:
        network: maps (x [B,H,A], t [B], cond) to the noise, or to x_0 if not `predict_epsilon`.
        horizon_steps, obs_dim, action_dim: H, O, A.
        denoised_clip_value: bound on the estimate of x_0 (None: no clamp).
        randn_clip_value: bound on the noise of each step, so that a sample stays near its mean.
        final_action_clip_value: bound on the last sample.
        eps_clip_value: bound on the noise estimate; DDIM only.
        denoising_steps: K.
        use_ddim, ddim_steps, ddim_discretize: DDIM sampling with that many steps.
        network_path, device: accepted for the reference's configurations; weights are loaded by the loops.

    Attributes:
        fast: evaluate networks that can be folded in that form; the same numbers up to rounding.
        dealt: deal their rows to the cores, which work side by side in a plain graph.
    """

    KIND = "diffusion_policy"  # of checkpoints of pre-training
    fast = False
    dealt = False

    def __init__(
        self,
        network: keras.layers.Layer,
        horizon_steps: int,
        obs_dim: int,
        action_dim: int,
        network_path: str | None = None,
        device: str | None = None,
        denoised_clip_value: float | None = 1.0,
        randn_clip_value: float = 10,
        final_action_clip_value: float | None = None,
        eps_clip_value: float | None = None,
        denoising_steps: int = 100,
        predict_epsilon: bool = True,
        use_ddim: bool = False,
        ddim_discretize: str = "uniform",
        ddim_steps: int | None = None,
        **unused: Any,
    ):
        if use_ddim and not predict_epsilon:
            raise UserError("DDIM needs predict_epsilon=true")
        self.network = network
        self.horizon_steps, self.obs_dim, self.action_dim = horizon_steps, obs_dim, action_dim
        self.denoised_clip_value, self.randn_clip_value = denoised_clip_value, randn_clip_value
        self.final_action_clip_value, self.eps_clip_value = final_action_clip_value, eps_clip_value
        self.denoising_steps, self.predict_epsilon = int(denoising_steps), predict_epsilon
        self.use_ddim, self.ddim_steps, self.ddim_discretize = use_ddim, ddim_steps, ddim_discretize
        self.schedule = ddpm_schedule(self.denoising_steps)
        self.ddim_schedule = ddim_schedule(self.schedule, ddim_steps or 0, ddim_discretize) if use_ddim else None

    # ---------- what every part needs ----------

    @property
    def dtype(self) -> tf.DType:
        """Returns the precision of the weights, and so of all results."""
        return dtype_of(self.network)

    @property
    def sampling_steps(self) -> int:
        """Returns the number of denoising steps that one sample takes: K, or the number of DDIM steps."""
        return len(self.ddim_schedule.ddim_t) if self.ddim_schedule else self.denoising_steps

    def sampling_timesteps(self) -> np.ndarray:
        """Returns the t of each step of a sample, noisiest first, [sampling_steps]."""
        return self.ddim_schedule.ddim_t if self.ddim_schedule else np.arange(self.denoising_steps)[::-1]

    def noise_shape(self, batch: Any) -> tuple[Any, ...]:
        """Returns the shape of the noise that a sample takes: [sampling_steps+1,B,H,A]."""
        return (self.sampling_steps + 1, batch, self.horizon_steps, self.action_dim)

    def draw_training(self, rng: Rng, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
        """Draws what the loss of chunks of that shape takes: denoising steps [...] and noise [...,H,A]."""
        t = rng.integers(0, self.denoising_steps, shape)
        return t, rng.normal((*shape, self.horizon_steps, self.action_dim), floatx())

    def table(self, values: np.ndarray, index: Array) -> Array:
        """Returns entries of a schedule's table for a batch of indices, as [B,1,1]."""
        return process.entries(values, index, self.dtype)

    # ---------- sampling ----------

    def predict_noise(self, x: Array, t: Array, cond: Cond, index: Array | None, base: bool) -> Array:
        """Returns the network's output [B,H,A] for x [B,H,A], t [B]; subclasses choose the network per row."""
        return self.network(x, t, cond)

    def denoised_mean(self, x: Array, t: Array, index: Array | None, output: Array, sigma: Array | None) -> Array:
        """Returns the mean [B,H,A] of the next sample from x [B,H,A] and the network's output (shared by all samplers).

        DDIM clamps x_0, recomputes the noise from the clamped x_0 and only then clamps the noise, while the mean uses
        the x_0 from before that last clamp; the order matters and is the reference's.
        """
        s, d = self.schedule, self.ddim_schedule
        if d is None:
            x0 = process.predict_x0(s, x, t, output) if self.predict_epsilon else output
            x0 = clip(x0, self.denoised_clip_value)
            return process.posterior_mean(s, x, t, x0)
        alpha, alpha_prev = self.table(d.ddim_alphas, index), self.table(d.ddim_alphas_prev, index)
        sqrt_one_minus_alpha = self.table(d.ddim_sqrt_one_minus_alphas, index)
        x0, eps = ddim.predict_x0(x, output, alpha, sqrt_one_minus_alpha), output
        if self.denoised_clip_value is not None:
            x0 = clip(x0, self.denoised_clip_value)
            eps = ddim.noise_from_x0(x, x0, alpha, sqrt_one_minus_alpha)
        eps = clip(eps, self.eps_clip_value)
        if sigma is None:
            direction = tf.sqrt(1 - alpha_prev)
        else:
            direction = tf.sqrt(tf.maximum(1 - alpha_prev - tf.square(sigma), 0))
        return ddim.step_mean(x0, eps, alpha_prev, direction)

    def p_mean_var(self, x: Array, t: Array, cond: Cond, index: Array | None = None) -> tuple[Array, ...]:
        """Returns the mean [B,H,A] and log-variance [B,1,1] of p(x_{t-1} | x_t); `index` [B] is the step's position in
        DDIM.

        DDIM without eta has no noise: its log-variance is -inf.
        """
        mean = self.denoised_mean(x, t, index, self.network(x, t, cond), None)
        if self.ddim_schedule is not None:
            return mean, tf.math.log(tf.square(self.table(self.ddim_schedule.ddim_sigmas, index)))
        return mean, process.posterior_log_variance(self.schedule, t, self.dtype)

    def sample(self, cond: Cond, noise: Array, deterministic: bool = True) -> Sample:
        """Denoises from noise[0].

        Args:
            cond: {"state": [B,To,O]}
            noise: [sampling_steps + 1, B, H, A] standard normal.
            deterministic: kept for symmetry; a pre-trained policy always samples with DDPM's own noise, floored at
                1e-3 and zero at the last step (DDIM: zero throughout).
        """
        noise = tf.cast(noise, self.dtype)
        x, batch, cond = noise[0], tf.shape(noise)[1], encoded(self.network, cond)
        for i, t in enumerate(self.sampling_timesteps()):
            mean, logvar = self.p_mean_var(x, tf.fill([batch], int(t)), cond, tf.fill([batch], i))
            x = self.next_sample(i, int(t), mean, logvar, noise[i + 1], floor=1e-3, zero_at_end=True)
        return Sample(x)

    def next_sample(
        self, i: int, t: int, mean: Array, logvar: Array, noise: Array, floor: float | Array, zero_at_end: bool
    ) -> Array:
        """Returns mean + std * clamped noise [B,H,A], with the floor of the standard deviation, and the final clamp."""
        x = self.noisy(t, mean, logvar, noise, floor, zero_at_end)
        return clip(x, self.final_action_clip_value) if i == self.sampling_steps - 1 else x

    def noisy(self, t: int, mean: Array, logvar: Array, noise: Array, floor: float | Array, zero_at_end: bool) -> Array:
        """Returns mean + std * clamped noise, [B,H,A]; logvar [B,1,1]."""
        if zero_at_end and (self.use_ddim or t == 0):
            return mean
        std = tf.maximum(tf.exp(0.5 * logvar), tf.convert_to_tensor(floor, mean.dtype))
        return mean + std * clip(noise, self.randn_clip_value)

    # ---------- supervised training ----------

    def q_sample(self, x_start: Array, t: Array, noise: Array) -> Array:
        """Returns x_t given x_0 = x_start [B,H,A], t [B] and noise [B,H,A]."""
        return process.q_sample(self.schedule, x_start, t, noise)

    def loss(self, x: Array, cond: Cond, t: Array, noise: Array) -> Array:
        """Returns the mean squared error of the predicted noise (or of x_0), over all elements (Ho et al. 2020, eq.
        14).

        Args:
            x: [B,H,A] clean chunks;  t: [B] in [0, K);  noise: [B,H,A].
            cond: the observation, or what the network's `encode` made of it with the draws of augmentation and dropout.
        """
        return tf.reduce_mean(self.errors(x, cond, t, noise))

    def errors(self, x: Array, cond: Cond, t: Array, noise: Array) -> Array:
        """Returns the squared errors [B,H,A] of which `loss` is the mean."""
        output = self.predictor(self.network)(self.q_sample(x, t, noise), t, cond)
        return tf.square(output - (noise if self.predict_epsilon else x))

    def predictor(self, network: keras.layers.Layer) -> Any:
        """Returns what is called in a network's place: where `fast` is set and it can be folded, its folded form."""
        folds = self.fast and can_fold(network)
        return FoldedActor(network, self.denoising_steps, self.dealt) if folds else network


class FineTunedDiffusionPolicy(DiffusionPolicy):
    """A diffusion policy whose last F denoising steps come from a fine-tuned copy of the pre-trained network.

    Steps t >= F are denoised by the frozen `actor` (also known as `network`), steps t < F by `actor_ft`. With DDIM,
    the last F of its steps are the fine-tuned ones.

    Args:
        actor: the pre-trained network; `actor_ft` becomes a copy of it.
        critic: state value, {"state"} -> [B,1]. None where the policy is only evaluated.
        ft_denoising_steps: F.
        ft_denoising_steps_d, ft_denoising_steps_t: lower F by `d` every `t` calls of `step` (0: never).
        train_after_annealing: go on training once F has been lowered. The reference then does not: its optimizer holds
            parameters that are no longer in the policy. That is the default, because results depend on it.
        min_sampling_denoising_std: floor of the standard deviation when exploring; a number, or an object that is
            called for the number and has `step()`.
        min_logprob_denoising_std: floor of the standard deviation in log-probabilities.
        eta, learn_eta: module of DDIM's eta, and whether it is trained.
    """

    def __init__(
        self,
        actor: keras.layers.Layer | None = None,
        critic: keras.layers.Layer | None = None,
        ft_denoising_steps: int = 0,
        ft_denoising_steps_d: int = 0,
        ft_denoising_steps_t: int = 0,
        train_after_annealing: bool = False,
        min_sampling_denoising_std: Any = 0.1,
        min_logprob_denoising_std: float = 0.1,
        eta: keras.layers.Layer | None = None,
        learn_eta: bool = False,
        network: keras.layers.Layer | None = None,
        **kwargs: Any,
    ):
        actor = actor if actor is not None else network
        super().__init__(network=actor, **kwargs)
        if ft_denoising_steps > self.sampling_steps:
            raise UserError(f"ft_denoising_steps={ft_denoising_steps}: a sample has {self.sampling_steps} steps")
        if learn_eta and not self.use_ddim:
            raise UserError("learn_eta needs use_ddim=true: DDPM has no eta")
        self.ft_denoising_steps = ft_denoising_steps
        self.ft_denoising_steps_d, self.ft_denoising_steps_t = ft_denoising_steps_d, ft_denoising_steps_t
        self.ft_denoising_steps_cnt, self.train_after_annealing = 0, train_after_annealing
        self._min_sampling_denoising_std = min_sampling_denoising_std
        self.min_logprob_denoising_std = min_logprob_denoising_std
        self.eta, self.learn_eta = eta, learn_eta
        self.actor = self.network
        self.actor_ft = clone(self.actor)
        self.critic: Any = critic

    # ---------- annealing ----------

    @property
    def min_sampling_denoising_std(self) -> float:
        """Returns the present floor of the exploration noise."""
        std = self._min_sampling_denoising_std
        return float(std() if callable(std) else std)

    def step(self) -> bool:
        """Advances the annealing of the exploration floor and of F by one iteration.

        Returns True if F was lowered: the fine-tuned network has then become the base one as well.
        """
        if hasattr(self._min_sampling_denoising_std, "step"):
            self._min_sampling_denoising_std.step()
        self.ft_denoising_steps_cnt += 1
        interval, size = self.ft_denoising_steps_t, self.ft_denoising_steps_d
        if not (size > 0 and interval > 0 and self.ft_denoising_steps_cnt % interval == 0):
            return False
        self.ft_denoising_steps = max(0, self.ft_denoising_steps - size)
        self.separate_actor()
        copy_weights(self.actor_ft, self.actor)
        return True

    @property
    def actor_is_frozen(self) -> bool:
        """Returns whether annealing has ended the actor's training (see `train_after_annealing`)."""
        return self.actor is not self.network and not self.train_after_annealing

    def separate_actor(self) -> None:
        """Lets `actor` differ from `network`, which keeps the pre-trained weights, as the reference's does."""
        if self.actor is self.network:
            self.actor = clone(self.network)

    # ---------- one denoising step ----------

    def fine_tuned_rows(self, t: Array, index: Array) -> Array:
        """Returns [B] bool: which rows belong to the fine-tuned network."""
        if self.ddim_schedule is not None:
            return index >= self.sampling_steps - self.ft_denoising_steps
        return t < self.ft_denoising_steps

    def predict_noise(self, x: Array, t: Array, cond: Cond, index: Array | None, base: bool) -> Array:
        """Returns the output [B,H,A] of each row's network: the fine-tuned one in its steps, unless `base`."""
        base_output = self.actor(x, t, cond)
        if base:
            return base_output
        rows = self.fine_tuned_rows(t, index)[:, None, None]
        return tf.where(rows, self.actor_ft(x, t, cond), tf.stop_gradient(base_output))

    def p_mean_var(
        self,
        x: Array,
        t: Array,
        cond: Cond,
        index: Array | None = None,
        use_base_policy: bool = False,
        deterministic: bool = False,
    ) -> tuple[Array, Array, Array]:
        """Returns the mean [B,H,A], log-variance and eta (both broadcastable to it) of p(x_{t-1} | x_t)."""
        output = self.predict_noise(x, t, cond, index, use_base_policy)
        return self.mean_var_eta(x, t, cond, index, output, deterministic)

    def mean_var_eta(
        self, x: Array, t: Array, cond: Cond, index: Array | None, output: Array, deterministic: bool
    ) -> tuple[Array, Array, Array]:
        """Returns what `p_mean_var` does, from the network's output [B,H,A]."""
        if self.ddim_schedule is None:
            mean = self.denoised_mean(x, t, index, output, None)
            return mean, process.posterior_log_variance(self.schedule, t, self.dtype), tf.ones_like(mean)
        d = self.ddim_schedule
        if deterministic:
            eta = tf.zeros([tf.shape(x)[0], 1, 1], self.dtype)
        elif self.eta is None:
            raise UserError("sampling with DDIM and noise needs model.eta")
        else:
            eta = self.eta(cond)[:, None, :]
            if not self.learn_eta:
                eta = tf.stop_gradient(eta)
        alpha, alpha_prev = self.table(d.ddim_alphas, index), self.table(d.ddim_alphas_prev, index)
        sigma = tf.maximum(ddim.sigma(eta, alpha, alpha_prev), tf.constant(1e-10, self.dtype))
        return self.denoised_mean(x, t, index, output, sigma), tf.math.log(tf.square(sigma)), eta

    # ---------- sampling ----------

    def sample(
        self,
        cond: Cond,
        noise: Array,
        deterministic: bool = False,
        use_base_policy: bool = False,
        with_log_probs: bool = False,
        std_floor: Array | None = None,
    ) -> Sample:
        """Denoises from noise[0] and keeps the chain of the fine-tuned steps.

        Args:
            cond: {"state": [B,To,O]}
            noise: [sampling_steps + 1, B, H, A] standard normal.
            deterministic: DDIM without noise; DDPM with its own noise (floored at 1e-3, none at the last step)
                instead of the exploration floor.
            use_base_policy: the pre-trained network for all steps.
            with_log_probs: also return what `log_probs` would give for the chain; the means are at hand here, so a
                second pass over the rollout is saved.
            std_floor: floor of the exploration noise as a tensor, where a compiled function must not hold it fixed.

        Returns:
            trajectories [B,H,A] and chains [B,F+1,H,A]: the chunk before the first fine-tuned step, then after each.
        """
        noise = tf.cast(noise, self.dtype)
        x, batch, n = noise[0], tf.shape(noise)[1], self.sampling_steps
        first = n - self.ft_denoising_steps  # position of the first fine-tuned step
        chain, log_probs = [x] if first == 0 else [], []
        floor = self.min_sampling_denoising_std if std_floor is None else std_floor
        floor = 1e-3 if deterministic else floor
        n_base = n if use_base_policy else first
        seen_by_base = encoded(self.actor, cond) if n_base else cond
        seen_by_tuned = encoded(self.actor_ft, cond) if n_base < n else cond
        for i, t in enumerate(self.sampling_timesteps()):
            t_batch, index = tf.fill([batch], int(t)), tf.fill([batch], i)
            network, seen = (self.actor, seen_by_base) if i < n_base else (self.actor_ft, seen_by_tuned)
            output = network(x, t_batch, seen)
            mean, logvar, _ = self.mean_var_eta(x, t_batch, cond, index, output, deterministic)
            x = self.next_sample(i, int(t), mean, logvar, noise[i + 1], floor, zero_at_end=deterministic)
            if i >= first - 1:
                chain.append(x)
            if with_log_probs and i >= first:
                log_probs.append(normal_log_prob(x, mean, self.log_prob_std(logvar)))
        return Sample(x, tf.stack(chain, axis=1), tf.stack(log_probs, axis=1) if log_probs else None)

    # ---------- log-probabilities of denoising steps ----------

    def fine_tuned_timesteps(self) -> tuple[np.ndarray, np.ndarray]:
        """Returns t and position [F] of the fine-tuned steps, noisiest first: `denoising_inds` count along these."""
        n, f = self.sampling_steps, self.ft_denoising_steps
        return self.sampling_timesteps()[n - f :].copy(), np.arange(n - f, n)

    def log_probs(self, cond: Cond, chains: Array, use_base_policy: bool = False) -> tuple[Array, Array]:
        """Returns the log-probabilities of whole chains.

        Args:
            cond: {"state": [B,To,O]};  chains: [B,F+1,H,A].

        Returns:
            log-probabilities [B*F,H,A] per element, sample-major, and eta.
        """
        f = self.ft_denoising_steps
        batch = tf.shape(chains)[0]
        cond = encoded(self.actor if use_base_policy else self.actor_ft, cond)
        repeated = {k: tf.repeat(v, f, axis=0) for k, v in cond.items()}
        inds = tf.tile(tf.range(f), [batch])
        previous = tf.reshape(chains[:, :-1], [-1, self.horizon_steps, self.action_dim])
        following = tf.reshape(chains[:, 1:], [-1, self.horizon_steps, self.action_dim])
        return self.log_probs_subsample(repeated, previous, following, inds, use_base_policy)

    def log_probs_subsample(
        self, cond: Cond, chains_prev: Array, chains_next: Array, denoising_inds: Array, use_base_policy: bool = False
    ) -> tuple[Array, Array]:
        """Returns the log-probabilities of single denoising steps.

        Args:
            cond: {"state": [B,To,O]}
            chains_prev, chains_next: [B,H,A] before and after the step.
            denoising_inds: [B] in [0, F), 0 = noisiest fine-tuned step.

        Returns:
            log-probabilities [B,H,A] per element, and eta.
        """
        t_table, index_table = self.fine_tuned_timesteps()
        t, index = tf.gather(t_table, denoising_inds), tf.gather(index_table, denoising_inds)
        # Every row is a fine-tuned step, so the other network need not run at all.
        output = (self.actor if use_base_policy else self.actor_ft)(chains_prev, t, cond)
        mean, logvar, eta = self.mean_var_eta(chains_prev, t, cond, index, output, deterministic=False)
        return normal_log_prob(chains_next, mean, self.log_prob_std(logvar)), eta

    def log_prob_std(self, logvar: Array) -> Array:
        """Returns the standard deviation in log-probabilities, [...] as logvar: that of the step, floored."""
        return tf.maximum(tf.exp(0.5 * logvar), tf.constant(self.min_logprob_denoising_std, logvar.dtype))

    def reinforce_loss(self, cond: Cond, chains: Array, reward: Array) -> tuple[Array, Array, Array]:
        """Returns the losses of REINFORCE with a value baseline, for F = K.

        Args:
            cond: {"state": [B,To,O]};  chains: [B,K+1,H,A];  reward: [B] returns.

        Returns:
            actor loss, critic loss, eta.
        """
        values = tf.squeeze(self.critic(cond), -1)
        advantages = tf.stop_gradient(reward - values)
        log_prob, eta = self.log_probs(cond, chains)
        log_prob = tf.reduce_sum(log_prob[:, :, : self.action_dim], axis=-1)
        log_prob = tf.reshape(log_prob, [-1, self.denoising_steps, self.horizon_steps])
        log_prob = tf.reduce_mean(tf.reduce_mean(log_prob, axis=-2), axis=-1)
        return tf.reduce_mean(-log_prob * advantages), tf.reduce_mean(tf.square(values - reward)), eta
