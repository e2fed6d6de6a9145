"""Decisions of a diffusion policy for a vector of environments: one compiled program per decision."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import tensorflow as tf

from diffusion_rl.core.threads import streams
from diffusion_rl.diffusion.gaussian import normal_log_prob
from diffusion_rl.networks import folded
from diffusion_rl.networks.layers import Array
from diffusion_rl.policies.diffusion import FineTunedDiffusionPolicy

MIN_PART = 8  # environments; a smaller batch costs as much


class Decision(NamedTuple):
    """Action chunks and what led to them."""

    actions: np.ndarray  # [E,H,A]
    chains: np.ndarray  # [E,F+1,H,A]
    log_probs: np.ndarray  # [E,F,H,A] of the steps of the chain


class DiffusionActor:
    """Samples action chunks, with the log-probabilities of the fine-tuned steps.

    Where the networks can be folded (`networks.folded`), the denoising loop is unrolled into one compiled program;
    otherwise `FineTunedDiffusionPolicy.sample` is compiled as it stands. Both give the same numbers up to rounding.

    Args:
        policy: whose present weights are used.
        fast: False forces the plain path.
    """

    def __init__(self, policy: FineTunedDiffusionPolicy, fast: bool = True):
        self.policy = policy
        self.fast = fast and folded.can_fold(policy.actor) and folded.can_fold(policy.actor_ft)
        build = self._fast_sampler if self.fast else self._plain_sampler
        self._samplers = {deterministic: build(deterministic) for deterministic in (False, True)}
        self._fold = tf.function(self._fold_networks)
        self._folded: tuple[list[Array], list[Array]] | None = None

    def weights_changed(self) -> None:
        """To be called after every change of the weights: folded copies of them are kept between decisions."""
        self._folded = None

    def noise_shape(self, n_envs: int) -> tuple[int, ...]:
        """Shape of the noise that one decision takes: [steps + 1, E, H, A]."""
        p = self.policy
        return (p.sampling_steps + 1, n_envs, p.horizon_steps, p.action_dim)

    def act(self, state: np.ndarray, noise: np.ndarray, deterministic: bool) -> Decision:
        """Decide for all environments.

        Args:
            state: [E,To,O];  noise: `noise_shape`;  deterministic: evaluate instead of explore.
        """
        dtype = self.policy.dtype
        floor = tf.constant(self.policy.min_sampling_denoising_std, dtype)
        inputs = (tf.constant(state, dtype), tf.constant(noise, dtype), floor)
        if self.fast:
            if self._folded is None:
                self._folded = self._fold()
            inputs += self._folded
        return Decision(*(output.numpy() for output in self._samplers[deterministic](*inputs)))

    def _plain_sampler(self, deterministic: bool):
        @tf.function
        def sample(state: Array, noise: Array, std_floor: Array) -> tuple[Array, ...]:
            out = self.policy.sample({"state": state}, noise, deterministic, with_log_probs=True, std_floor=std_floor)
            return out.trajectories, out.chains, _or_empty(out.log_probs, out.trajectories)

        return sample

    def _fold_networks(self) -> tuple[list[Array], list[Array]]:
        p = self.policy
        timesteps, n_base = p.sampling_timesteps(), p.sampling_steps - p.ft_denoising_steps
        base = folded.fold_actor(p.actor, timesteps[:n_base]) if n_base else []
        tuned = folded.fold_actor(p.actor_ft, timesteps[n_base:]) if p.ft_denoising_steps else []
        return base, tuned

    def _fast_sampler(self, deterministic: bool):
        p = self.policy
        n, n_base, timesteps = p.sampling_steps, p.sampling_steps - p.ft_denoising_steps, p.sampling_timesteps()

        @tf.function(jit_compile=True)
        def part(
            state: Array, noise: Array, std_floor: Array, base: list[Array], tuned: list[Array]
        ) -> tuple[Array, ...]:
            batch, x = state.shape[0], noise[0]
            flat = tf.reshape(state, [batch, -1])
            chain, log_probs = [x] if n_base == 0 else [], []
            for i, t in enumerate(timesteps):
                is_tuned = i >= n_base
                network, weights = (p.actor_ft, tuned) if is_tuned else (p.actor, base)
                position, depth = (i - n_base, n - n_base) if is_tuned else (i, n_base)
                step = tf.one_hot(tf.fill([batch], position), depth, dtype=p.dtype)
                rows = tf.concat([tf.reshape(x, [batch, -1]), flat, step], axis=1)
                output = tf.reshape(folded.actor_output(network, weights, rows), x.shape)
                t_batch, index = tf.fill([batch], int(t)), tf.fill([batch], i)
                mean, logvar, _ = p.mean_var_eta(x, t_batch, {"state": state}, index, output, deterministic)
                floor = 1e-3 if deterministic else std_floor
                x = p.next_sample(i, int(t), mean, logvar, noise[i + 1], floor, zero_at_end=deterministic)
                if i >= n_base - 1:
                    chain.append(x)
                if is_tuned:
                    log_probs.append(normal_log_prob(x, mean, p.log_prob_std(logvar)))
            return x, tf.stack(chain, axis=1), _or_empty(tf.stack(log_probs, axis=1) if log_probs else None, x)

        @tf.function
        def sample(
            state: Array, noise: Array, std_floor: Array, base: list[Array], tuned: list[Array]
        ) -> tuple[Array, ...]:
            """The environments in equal parts, one per core, side by side."""
            n_envs = state.shape[0]
            parts = max(k for k in range(1, streams() + 1) if n_envs % k == 0 and n_envs // k >= MIN_PART or k == 1)
            size = n_envs // parts
            cuts = [slice(i * size, (i + 1) * size) for i in range(parts)]
            results = [part(state[cut], noise[:, cut], std_floor, base, tuned) for cut in cuts]
            return tuple(tf.concat(outputs, axis=0) for outputs in zip(*results, strict=True))

        return sample


def _or_empty(log_probs: Array | None, like: Array) -> Array:
    """[E,0,H,A] where no step is fine-tuned."""
    return tf.zeros_like(like)[:, None][:, :0] if log_probs is None else log_probs
