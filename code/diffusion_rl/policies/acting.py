"""Decisions of policies for a vector of environments: one compiled program per decision, or one for each core.

An actor draws what one decision needs from a source of randomness (`draw`) and decides with it (`act`).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from diffusion_rl.core.batching import in_chunks, parts
from diffusion_rl.core.keras import floatx, keras
from diffusion_rl.core.typing import Array, Rng
from diffusion_rl.diffusion.gaussian import normal_log_prob
from diffusion_rl.networks import folded
from diffusion_rl.policies.diffusion import Cond, FineTunedDiffusionPolicy
from diffusion_rl.policies.gaussian import GaussianPolicy
from diffusion_rl.policies.gmm import GMMPolicy

MIN_PART, MIN_ROWS = 4, 10  # of an observation batch in equal parts: images, observations without
CHUNKS = {False: 100, True: 10}  # observations whose chains are looked at together: without images, with
MOST_UNROLLED = 25  # denoising steps of one program: compiling takes time and memory as the square of their number

Sampler = Callable[..., tuple[Array, ...]]  # (observation, noise, floor of the noise, folded weights) -> Decision


class Decision(NamedTuple):
    """Action chunks and what led to them."""

    actions: np.ndarray  # [E,H,A]
    chains: np.ndarray | None  # [E,F+1,H,A]; None where there is no denoising
    log_probs: np.ndarray  # [E,F,H,A] of the steps of the chain; else [E] of the chunks

    def arrays(self) -> dict[str, np.ndarray]:
        """Returns what there is, by name."""
        return {name: value for name, value in self._asdict().items() if value is not None}


def actor_for(policy: FineTunedDiffusionPolicy | GaussianPolicy | GMMPolicy, fast: bool = True) -> Any:
    """Returns the actor of a policy, its own where it has one; `fast` concerns diffusion policies only."""
    if hasattr(policy, "make_actor"):
        return policy.make_actor()
    if isinstance(policy, GaussianPolicy | GMMPolicy):
        return SingleStepActor(policy)
    return DiffusionActor(policy, fast)


def _observation(state: np.ndarray, rgb: np.ndarray | None, dtype: tf.DType) -> Cond:
    """Returns the observation of state [E,To,O] and, where there are images, rgb [E,To,C,Hi,Wi], as tensors."""
    return {"state": tf.constant(state, dtype)} | ({} if rgb is None else {"rgb": tf.constant(rgb)})


class SingleStepActor:
    """Samples chunks that are single decisions, with their log-probabilities as the policy's PPO counts them."""

    def __init__(self, policy: Any):
        self.policy = policy
        self._decide = tf.function(self.decisions, autograph=False)

    def weights_changed(self) -> None:
        """Must be called after every change of the weights; nothing is kept between decisions here."""

    def draw(self, rng: Rng, n_envs: int) -> dict[str, np.ndarray]:
        """Draws what one decision needs: the arguments of `policy.sample` beside the observation."""
        return self.policy.draw_noise(rng, n_envs, floatx())

    def decisions(self, obs: Cond, draws: dict[str, Array], deterministic: bool) -> tuple[Array, Array]:
        """Returns actions [E,H,A] and their log-probabilities [E], from one evaluation of the network."""
        policy, cuts = copy.copy(self.policy), parts(obs["state"].shape[0], MIN_PART if "rgb" in obs else MIN_ROWS)
        # side by side
        outputs_by_part = [policy.network({name: array[cut] for name, array in obs.items()}) for cut in cuts]
        outputs = tuple(tf.concat(of_parts, axis=0) for of_parts in zip(*outputs_by_part, strict=True))
        policy.network = policy.actor_ft = lambda cond: outputs
        sample = policy.sample(obs, deterministic=deterministic, **draws)
        actions = sample[0] if isinstance(sample, tuple) else sample
        return actions, policy.log_probs(obs, actions)[0]

    def act(
        self, state: np.ndarray, draws: dict[str, np.ndarray], deterministic: bool, rgb: np.ndarray | None = None
    ) -> Decision:
        """Decides for all environments.

        Args:
            state: [E,To,O];  draws: of `draw`;  deterministic: evaluate instead of explore.
            rgb: [E,To,C,Hi,Wi] pixels, where the network sees images.
        """
        obs = _observation(state, rgb, self.policy.dtype)
        tensors = {k: tf.constant(v, self.policy.dtype if v.dtype.kind == "f" else None) for k, v in draws.items()}
        actions, log_probs = self._decide(obs, tensors, deterministic)
        return Decision(actions.numpy(), None, log_probs.numpy())


class CompiledNetwork:
    """A network for small batches: each denoising step is one program of fused operations, which has one thread.

    Images are encoded without the compiler, whose convolutions are slower, in equal parts on all cores.
    """

    def __init__(self, network: keras.layers.Layer):
        self._network = network
        self._call = tf.function(lambda x, t, cond: network(x, t, cond), jit_compile=True, autograph=False)
        if hasattr(network, "encode"):
            self.encode = self._encode

    def __call__(self, x: Array, t: Array, cond: Cond) -> Array:
        """Maps x [B,H,A], t [B], cond to noise (or x0) [B,H,A]."""
        return self._call(x, t, cond)

    def _encode(self, cond: Cond) -> Cond:
        cuts = parts(cond["state"].shape[0], MIN_PART)
        seen = [self._network.encode({name: array[cut] for name, array in cond.items()}) for cut in cuts]
        return {name: tf.concat([part[name] for part in seen], axis=0) for name in seen[0]}


class DiffusionActor:
    """Samples action chunks, with the log-probabilities of the fine-tuned steps.

    Where the networks can be folded (`networks.folded`), the denoising loop is unrolled into one compiled program, many
    steps into several; otherwise it is `FineTunedDiffusionPolicy.sample` with compiled networks. The plain path,
    `sample` in a graph as it stands, gives the same numbers up to rounding.

    Args:
        policy: whose present weights are used.
        fast: False forces the plain path.
    """

    def __init__(self, policy: FineTunedDiffusionPolicy, fast: bool = True):
        self.policy = policy
        self.folds = fast and folded.can_fold(policy.actor) and folded.can_fold(policy.actor_ft)
        self.fast = fast
        build = self._folded_sampler if self.folds else self._compiled_sampler if fast else self._plain_sampler
        self._samplers = {deterministic: build(deterministic) for deterministic in (False, True)}
        self._log_probs = {sees: self._chunked_log_probs(about) for sees, about in CHUNKS.items()}
        self._fold = tf.function(self._fold_networks, autograph=False)
        self._folded: tuple[list[Array], list[Array]] | None = None

    def weights_changed(self) -> None:
        """Must be called after every change of the weights: folded copies of them are kept between decisions."""
        self._folded = None

    def noise_shape(self, n_envs: int) -> tuple[int, ...]:
        """Returns the shape of the noise that one decision takes: [sampling_steps+1,E,H,A]."""
        return self.policy.noise_shape(n_envs)

    def draw(self, rng: Rng, n_envs: int) -> np.ndarray:
        """Draws the noise of one decision, [steps+1,E,H,A]."""
        return rng.normal(self.noise_shape(n_envs), floatx())

    def act(self, state: np.ndarray, noise: np.ndarray, deterministic: bool, rgb: np.ndarray | None = None) -> Decision:
        """Decides for all environments.

        Args:
            state: [E,To,O];  noise: `noise_shape`;  deterministic: evaluate instead of explore.
            rgb: [E,To,C,Hi,Wi] pixels, where the networks see images.
        """
        dtype = self.policy.dtype
        cond = _observation(state, rgb, dtype)
        floor = tf.constant(self.policy.min_sampling_denoising_std, dtype)
        weights: tuple[list[Array], ...] = ()
        if self.folds:
            if self._folded is None:
                self._folded = self._fold()
            weights = self._folded
        outputs = self._samplers[deterministic](cond, tf.constant(noise, dtype), floor, *weights)
        return Decision(*(output.numpy() for output in outputs))

    def log_probs(self, state: np.ndarray, chains: np.ndarray, rgb: np.ndarray | None = None) -> np.ndarray:
        """Returns the log-probabilities [N,F,H,A] of chains [N,F+1,H,A], with the fine-tuned network; images are
        encoded once.

        Args:
            state, rgb: of the N observations, as in `act`; a whole rollout in batches of one size, since every size is
                compiled anew.
        """
        dtype = self.policy.dtype
        images = () if rgb is None else (tf.constant(rgb),)
        flat = self._log_probs[bool(images)](tf.constant(chains, dtype), tf.constant(state, dtype), *images)[0].numpy()
        return flat.reshape(len(chains), -1, *flat.shape[1:])

    def _chunked_log_probs(self, about: int) -> Callable[..., list[Array]]:
        def log_probs(chains: Array, state: Array, *rgb: Array) -> list[Array]:
            cond = dict(zip(("state", "rgb"), (state, *rgb), strict=False))
            return [self.policy.log_probs(cond, chains)[0]]

        return in_chunks(log_probs, about)

    def _plain_sampler(self, deterministic: bool) -> Sampler:
        return _sampler(self.policy, deterministic)

    def _compiled_sampler(self, deterministic: bool) -> Sampler:
        """Builds a sampler of compiled networks, called step by step: unrolled into one program these would compile for
        a minute."""
        policy = copy.copy(self.policy)
        policy.actor, policy.actor_ft = (CompiledNetwork(network) for network in (policy.actor, policy.actor_ft))
        return _sampler(policy, deterministic)

    def _fold_networks(self) -> tuple[list[Array], list[Array]]:
        p = self.policy
        timesteps, n_base = p.sampling_timesteps(), p.sampling_steps - p.ft_denoising_steps
        base = folded.fold_actor(p.actor, timesteps[:n_base]) if n_base else []
        tuned = folded.fold_actor(p.actor_ft, timesteps[n_base:]) if p.ft_denoising_steps else []
        return base, tuned

    def _folded_sampler(self, deterministic: bool) -> Sampler:
        n = self.policy.sampling_steps
        firsts = range(0, n, MOST_UNROLLED)
        programs = [self._folded_steps(first, min(first + MOST_UNROLLED, n), deterministic) for first in firsts]
        return dealt(programs[0] if len(programs) == 1 else joined(programs))

    def _folded_steps(self, first: int, end: int, deterministic: bool) -> Sampler:
        """Builds the program of the denoising steps from `first` to before `end`; from the second on it is given x
        [E,H,A] as well."""
        p = self.policy
        n, n_base, timesteps = p.sampling_steps, p.sampling_steps - p.ft_denoising_steps, p.sampling_timesteps()

        @tf.function(jit_compile=True, autograph=False)  # no tensor decides a branch: traced in half the time
        def sample(
            cond: Cond,
            noise: Array,
            std_floor: Array,
            base: list[Array],
            tuned: list[Array],
            before: Array | None = None,
        ) -> tuple[Array, ...]:
            batch, x = noise.shape[1], noise[0] if before is None else before
            flat = tf.reshape(cond["state"], [batch, -1])
            chain, log_probs = [x] if n_base == 0 and first == 0 else [], []
            for i, t in list(enumerate(timesteps))[first:end]:
                is_tuned = i >= n_base
                network, weights = (p.actor_ft, tuned) if is_tuned else (p.actor, base)
                position, depth = (i - n_base, n - n_base) if is_tuned else (i, n_base)
                step = tf.one_hot(tf.fill([batch], position), depth, dtype=p.dtype)
                rows = tf.concat([tf.reshape(x, [batch, -1]), flat, step], axis=1)
                output = tf.reshape(folded.actor_output(network, weights, rows), x.shape)
                t_batch, index = tf.fill([batch], int(t)), tf.fill([batch], i)
                mean, logvar, _ = p.mean_var_eta(x, t_batch, cond, index, output, deterministic)
                floor = 1e-3 if deterministic else std_floor
                x = p.next_sample(i, int(t), mean, logvar, noise[i + 1], floor, zero_at_end=deterministic)
                if i >= n_base - 1:
                    chain.append(x)
                if is_tuned:
                    log_probs.append(normal_log_prob(x, mean, p.log_prob_std(logvar)))
            chains = _or_empty(tf.stack(chain, axis=1) if chain else None, x)
            return x, chains, _or_empty(tf.stack(log_probs, axis=1) if log_probs else None, x)

        return sample


def dealt(program: Sampler) -> Sampler:
    """Makes one sampler of a compiled program, which has one thread: environments are dealt to the cores in parts."""

    @tf.function(autograph=False)
    def together(cond: Cond, noise: Array, *shared: Any) -> tuple[Array, ...]:
        cuts = parts(noise.shape[1], MIN_ROWS)
        mine = [program({k: o[cut] for k, o in cond.items()}, noise[:, cut], *shared) for cut in cuts]
        return tuple(tf.concat(of_parts, axis=0) for of_parts in zip(*mine, strict=True))

    def sample(cond: Cond, noise: Array, *shared: Any) -> tuple[Array, ...]:
        return (together if len(parts(noise.shape[1], MIN_ROWS)) > 1 else program)(cond, noise, *shared)

    return sample


def joined(programs: Sequence[Sampler]) -> Sampler:
    """Makes one sampler of programs of successive steps, each given what the one before made of x [E,H,A]."""

    def sample(*given: Any) -> tuple[Array, ...]:
        x: Array | None = None
        chains, log_probs = [], []
        for program in programs:
            x, chain, log_prob = program(*given, x)
            chains.append(chain)
            log_probs.append(log_prob)
        return x, tf.concat(chains, axis=1), tf.concat(log_probs, axis=1)

    return sample


def _sampler(policy: FineTunedDiffusionPolicy, deterministic: bool) -> Sampler:
    @tf.function(autograph=False)
    def sample(cond: Cond, noise: Array, std_floor: Array) -> tuple[Array, ...]:
        out = policy.sample(cond, noise, deterministic, with_log_probs=True, std_floor=std_floor)
        return out.trajectories, out.chains, _or_empty(out.log_probs, out.trajectories)

    return sample


def _or_empty(steps: Array | None, like: Array) -> Array:
    """Returns what there is of each step [E,F,H,A], or [E,0,H,A] where there is none."""
    return tf.zeros_like(like)[:, None][:, :0] if steps is None else steps
