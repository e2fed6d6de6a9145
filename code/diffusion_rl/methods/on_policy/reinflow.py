"""ReinFlow: PPO for flow policies whose steps get learned noise (Zhang et al. 2025, arXiv:2505.22094).

The steps of Euler's method become a Markov chain

    x_0 ~ N(0, I),    x_{i+1} ~ N(clip(x_i + v(x_i, t_i, o) / K), std_i(o, t_i)^2),    i = 0 .. K-1,

whose log-probability is a sum. It is divided by the number of its terms and of the chunk's elements, and the whole
chain is one decision.

Shapes: B rows, K steps; To, O, H, A as in `policies.diffusion`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import tensorflow as tf

from diffusion_rl.core.errors import UserError
from diffusion_rl.diffusion.gaussian import normal_log_prob
from diffusion_rl.methods.on_policy.ppo import ChunkPPO, Losses, PerRow, clipped_policy_loss
from diffusion_rl.networks.flow import NoisyFlow
from diffusion_rl.networks.layers import Array, clone, variables_of
from diffusion_rl.policies.diffusion import Cond
from diffusion_rl.policies.flow import GRIDS, time_grid

HALF_LOG_2PI_E = 0.5 * math.log(2 * math.pi * math.e)


#: How the log-probability of a chain is counted: with that of x_0, per term, per element of the chunk.
class Counting(NamedTuple):
    initial: bool
    per_step: bool
    per_element: bool


FULL = Counting(True, True, True)


class ChainSample(NamedTuple):
    """Action chunks and the chains that led to them."""

    trajectories: Array  # [B,H,A]
    chains: Array  # [B,K+1,H,A], from noise to action
    log_probs: Array  # [B]


class ReinFlow(ChunkPPO):
    """A flow policy under training, its critic, and a frozen copy of how it began.

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
        logprob_min, logprob_max: log-probabilities beyond them get no gradient.
        bc_loss_type: the distance of `bc_loss`; "W2" alone.
        time_grid: closed or left (see `policies.flow.GRIDS`), where steps look when sampling and in the log-probability
            alike. "upstream": closed when sampling, left in the log-probability, as the reference's code has it by
            mistake.
        clip_ploss_coef, clip_vloss_coef, norm_adv: of `ClippedPPO`.
        unused: accepted for the reference's configurations.
    """

    KIND = "reinflow"
    LABEL = "ReinFlow"
    GRID = "closed"

    def __init__(
        self,
        policy: Any,
        critic: Any,
        act_dim: int,
        horizon_steps: int,
        obs_dim: int,
        cond_steps: int,
        noise_scheduler_type: str,
        inference_steps: int,
        ft_denoising_steps: int,
        min_logprob_denoising_std: float,
        max_logprob_denoising_std: float,
        min_sampling_denoising_std: float,
        act_min: float = -1.0,
        act_max: float = 1.0,
        randn_clip_value: float = 3.0,
        denoised_clip_value: float = 1.0,
        logprob_min: float = -1.0,
        logprob_max: float = 1.0,
        clip_ploss_coef: float = 0.01,
        clip_vloss_coef: float | None = None,
        norm_adv: bool = True,
        bc_loss_type: str = "W2",
        time_grid: str | None = None,
        explore_net_activation_type: str = "Tanh",
        noise: Mapping[str, Any] | None = None,
        **unused: Any,
    ):
        noise_options = ("learn_explore_time_embedding", "time_dim_explore", "use_time_independent_noise")
        taken = {name: unused.pop(name) for name in (*noise_options, "noise_hidden_dims") if name in unused}
        self.clip_ploss_coef, self.clip_vloss_coef, self.norm_adv = clip_ploss_coef, clip_vloss_coef, norm_adv
        self.time_grid = self.GRID if time_grid is None else time_grid
        if self.time_grid not in (*GRIDS, "upstream"):
            raise UserError(f"model.time_grid={time_grid}: take one of {', '.join((*GRIDS, 'upstream'))}")
        if bc_loss_type != "W2":
            raise UserError(f"train.bc_loss_type={bc_loss_type}: W2 is the only one there is")
        self.horizon_steps, self.obs_dim, self.action_dim = horizon_steps, obs_dim, act_dim
        self.steps, self.act_min, self.act_max = int(inference_steps), float(act_min), float(act_max)
        self.min_sampling_denoising_std = float(min_sampling_denoising_std)
        self.randn_clip_value, self.denoised_clip_value = float(randn_clip_value), float(denoised_clip_value)
        self.log_prob_range = (float(logprob_min), float(logprob_max))
        self.actor_old, self.critic = policy, critic
        self.actor_ft = NoisyFlow(
            clone(policy),
            self.steps,
            self.steps - int(ft_denoising_steps),
            noise_scheduler_type,
            min_logprob_denoising_std,
            max_logprob_denoising_std,
            activation_type=explore_net_activation_type,
            **taken,
        )

    @property
    def dtype(self) -> tf.DType:
        """Returns the precision of the weights, and so of all results."""
        return variables_of(self.actor_old)[0].dtype

    def noise_shape(self, batch: Any) -> tuple[Any, ...]:
        """Returns the shape of the noise of a sample: [K+1,B,H,A]."""
        return (self.steps + 1, batch, self.horizon_steps, self.action_dim)

    # ---------- the chain ----------

    def _grid(self, sampling: bool) -> list[float]:
        upstream = "closed" if sampling else "left"
        return time_grid(upstream if self.time_grid == "upstream" else self.time_grid, self.steps).tolist()

    def size(self, batch: Array, dtype: tf.DType) -> tuple[Array, ...]:
        """Returns what the velocity's network takes beside the time: nothing; of shortcut models a step's size [B]."""
        return ()

    def step(self, i: int, time: float, x: Array, cond: Cond) -> tuple[Array, Array]:
        """Returns mean and standard deviation [B,H,A] of what follows x [B,H,A] in step i, which begins at `time`."""
        batch = tf.shape(x)[0]
        now = tf.fill([batch], tf.constant(time, x.dtype))
        velocity, std = self.actor_ft(x, now, cond, i, *self.size(batch, x.dtype))
        bound = self.denoised_clip_value
        return tf.clip_by_value(x + velocity / self.steps, -bound, bound), tf.reshape(std, tf.shape(x))

    def sample(self, cond: Cond, noise: Array, deterministic: bool = False, counting: Counting = FULL) -> ChainSample:
        """Samples action chunks [B,H,A] with their chains [B,K+1,H,A] and log-probabilities [B].

        The log-probability is that of the samples as they are after clipping, by the densities from before.

        Args:
            cond: {"state": [B,To,O]};  noise: [K+1,B,H,A];  deterministic: no noise but the first.
        """
        x = noise[0]
        chain, terms = [x], [normal_log_prob(x, tf.zeros_like(x), tf.ones_like(x))] if counting.initial else []
        for i, time in enumerate(self._grid(sampling=True)):
            mean, std = self.step(i, time, x, cond)
            std = tf.maximum(std, self.min_sampling_denoising_std)
            reach = self.randn_clip_value * std
            x = mean if deterministic else tf.clip_by_value(mean + std * noise[i + 1], mean - reach, mean + reach)
            if i == self.steps - 1:
                x = tf.clip_by_value(x, self.act_min, self.act_max)
            chain.append(x)
            terms.append(normal_log_prob(x, mean, std))
        return ChainSample(x, tf.stack(chain, axis=1), self._counted(terms, counting))

    def log_probs(self, cond: Cond, chains: Array, counting: Counting = FULL) -> tuple[Array, Array, Array]:
        """Returns the log-probability [B] of chains [B,K+1,H,A], the entropy [B] of their steps, and the noise's mean
        standard deviation."""
        x = tf.unstack(chains, axis=1)
        terms = [normal_log_prob(x[0], tf.zeros_like(x[0]), tf.ones_like(x[0]))] if counting.initial else []
        entropies, stds = [tf.fill(tf.shape(x[0]), tf.constant(HALF_LOG_2PI_E, x[0].dtype))] * len(terms), []
        for i, time in enumerate(self._grid(sampling=False)):
            mean, std = self.step(i, time, x[i], cond)
            terms.append(normal_log_prob(x[i + 1], mean, std))
            entropies.append(HALF_LOG_2PI_E + tf.math.log(std))
            stds.append(std)
        entropy = self._counted(entropies, counting._replace(per_step=True))
        return self._counted(terms, counting), entropy, tf.reduce_mean(tf.stack(stds))

    @staticmethod
    def _counted(terms: list[Array], counting: Counting) -> Array:
        """Sums terms [B,H,A] of the steps to [B]."""
        total = tf.reduce_sum(tf.add_n(terms), axis=[1, 2])
        elements = int(terms[0].shape[1]) * int(terms[0].shape[2])
        return total / ((len(terms) if counting.per_step else 1) * (elements if counting.per_element else 1))

    # ---------- the loss ----------

    def policy_loss(self, log_prob: Array, old_log_prob: Array, advantages: Array) -> PerRow:
        """Returns `clipped_policy_loss` of log-probabilities [B], clamped to their range."""
        new, old = (tf.clip_by_value(x, *self.log_prob_range) for x in (log_prob, old_log_prob))
        return clipped_policy_loss(new, old, advantages, tf.constant(self.clip_ploss_coef, log_prob.dtype))

    def loss(  # type: ignore[override]  # of chains, not of actions
        self,
        obs: Cond,
        chains: Array,
        returns: Array,
        oldvalues: Array,
        advantages: Array,
        oldlogprobs: Array,
        use_bc_loss: bool = False,
        bc_noise: Array | None = None,
        counting: Counting = FULL,
    ) -> Losses:
        """Returns the loss of one minibatch.

        Args:
            obs: {"state": [B,To,O]};  chains: [B,K+1,H,A];  returns, oldvalues, advantages, oldlogprobs: [B]
            use_bc_loss: add `bc_loss`, from bc_noise [B,H,A].
        """
        log_prob, entropy, std = self.log_probs(obs, chains, counting)
        per_row = self.policy_loss(log_prob, oldlogprobs, self.normalised(advantages))
        return {
            **self.mean_losses(per_row, obs, returns, oldvalues),
            "entropy_loss": -tf.reduce_mean(entropy),
            "bc_loss": self.bc_loss(obs, bc_noise) if use_bc_loss else tf.zeros([], log_prob.dtype),
            "std": tf.stop_gradient(std),
        }

    def bc_noise_shape(self, rows: int) -> tuple[int, ...]:
        return rows, self.horizon_steps, self.action_dim

    def bc_loss(self, obs: Cond, noise: Array | None) -> Array:
        """Returns the squared distance of what both policies make of the same noise [B,H,A] without adding any: an
        upper bound of the squared Wasserstein distance between them (W2).

        The reference begins with zeros, and its second policy where the first one's first step ends.
        """
        batch = tf.shape(obs["state"])[0]
        start = noise
        if start is None or self.time_grid == "upstream":
            start = tf.zeros([batch, self.horizon_steps, self.action_dim], self.dtype)
        before = tf.stop_gradient(self._carried(self.actor_old, start, obs))
        if self.time_grid == "upstream":
            start = tf.stop_gradient(start + self._velocity(self.actor_old, start, 0.0, obs) / self.steps)
        return tf.reduce_mean(tf.square(before - self._carried(self.actor_ft.policy, start, obs)))

    def _velocity(self, network: Any, x: Array, time: float, obs: Cond) -> Array:
        now = tf.fill([tf.shape(x)[0]], tf.constant(time, x.dtype))
        return network(x, now, obs, *self.size(tf.shape(x)[0], x.dtype))

    def _carried(self, network: Any, x: Array, obs: Cond) -> Array:
        """Returns the action chunks [B,H,A] to which a velocity carries noise [B,H,A]."""
        for time in self._grid(sampling=True):
            x = x + self._velocity(network, x, time, obs) / self.steps
            x = tf.clip_by_value(x, self.act_min, self.act_max)
        return x


class ShortcutReinFlow(ReinFlow):
    """ReinFlow for shortcut models, whose velocity knows the size of the step; arguments of `ReinFlow`."""

    KIND = "shortcut_reinflow"
    LABEL = "ReinFlow (shortcut)"
    GRID = "left"

    def size(self, batch: Array, dtype: tf.DType) -> tuple[Array, ...]:
        return (tf.fill([batch], tf.constant(1 / self.steps, dtype)),)
