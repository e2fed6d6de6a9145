"""Velocities of flow-matching policies: what moves noise at time 0 to an action chunk at time 1.

Names and layouts are those of ReinFlow (Zhang et al. 2025, arXiv:2505.22094). Shapes: B batch, H chunk, A action, To
observation history, O observation; cond = {"state": [B,To,O]}; times [B] are numbers in [0, 1], not steps.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import tensorflow as tf

from diffusion_rl.core.errors import UserError
from diffusion_rl.core.keras import floatx, keras
from diffusion_rl.core.noise import init_rng
from diffusion_rl.networks.layers import (
    Array,
    Linear,
    Network,
    flatten_state,
    mish,
    sinusoidal_embedding,
)
from diffusion_rl.networks.mlp import MLP, DiffusionMLP, ResidualMLP
from diffusion_rl.networks.vision import VisionDiffusionMLP


class FlowMLP(DiffusionMLP):
    """The velocity from [action chunk, time embedding, observation]: `DiffusionMLP` at times that are real numbers.

    Arguments are those of `DiffusionMLP`.
    """

    def embed(self, time: Array, cond: dict[str, Array]) -> tuple[Array, Array]:
        """Embeds time [B] and observation: [B,time_dim] and [B,D]."""
        state = flatten_state(cond)
        return self.time_embedding(tf.reshape(time, [-1])), self.cond_mlp(state) if self.has_cond_mlp else state

    def call(self, x: Array, time: Array, cond: dict[str, Array]) -> Array:
        """Maps x [B,H,A], time [B], cond {"state": [B,To,O]} to the velocity [B,H,A]."""
        return super().call(x, time, cond)


class VisionFlowMLP(VisionDiffusionMLP):
    """The velocity from [action chunk, time embedding, features of images and observation]: `VisionDiffusionMLP` at
    times that are real numbers.

    Arguments are those of `VisionDiffusionMLP`.
    """


class StepEmbedding(keras.layers.Layer):
    """Embeds a time and the size of the step from there: sinusoidal, then Linear, Mish, Linear."""

    def __init__(self, dim: int):
        super().__init__(dtype=floatx())
        if dim < 4 or dim % 2:
            raise UserError(f"td_emb_dim={dim}: the sinusoidal embedding needs an even dimension of at least 4")
        self.dim = dim
        self.expand, self.project = Linear(2 * dim, dim), Linear(dim, dim)

    def call(self, time: Array, step: Array) -> Array:
        """Maps time and step [B] to [B,dim]."""
        parts = [sinusoidal_embedding(tf.reshape(x, [-1]), self.dim, self.expand.kernel.dtype) for x in (time, step)]
        return self.project(mish(self.expand(tf.concat(parts, axis=-1))))


class ShortcutFlowMLP(Network):
    """The mean velocity over a step of a given size (shortcut models, Frans et al. 2024, arXiv:2410.12557).

    Args:
        horizon_steps, action_dim: H and A.
        cond_dim: width of the flattened observation history, To * O.
        td_emb_dim: width of the embedding of time and step.
        mlp_dims, activation_type, out_activation_type, use_layernorm, residual_style: of the MLP.
        cond_mlp_dims: if given, the observation first goes through an MLP of these dimensions.
        embed_combination_type: how embedding and observation come together: add, multiply or concate (the reference's
            spelling).
    """

    def __init__(
        self,
        horizon_steps: int,
        action_dim: int,
        cond_dim: int,
        td_emb_dim: int = 16,
        mlp_dims: Sequence[int] = (256, 256),
        cond_mlp_dims: Sequence[int] | None = None,
        activation_type: str = "Mish",
        out_activation_type: str = "Identity",
        use_layernorm: bool = False,
        residual_style: bool = False,
        embed_combination_type: str = "add",
    ):
        super().__init__(dtype=floatx())
        self.horizon_steps, self.action_dim, self.cond_dim = horizon_steps, action_dim, cond_dim
        self.t_emb = StepEmbedding(td_emb_dim)
        self.has_cond_mlp = cond_mlp_dims is not None
        if cond_mlp_dims is not None:
            self.cond_emb = MLP([cond_dim, *cond_mlp_dims], activation_type=activation_type)
            cond_dim = cond_mlp_dims[-1]
        if embed_combination_type not in ("add", "multiply", "concate"):
            raise UserError(f"embed_combination_type={embed_combination_type}: take add, multiply or concate")
        if embed_combination_type != "concate" and cond_dim != td_emb_dim:
            raise UserError(
                f"embed_combination_type={embed_combination_type} needs an observation of td_emb_dim={td_emb_dim} "
                f"entries, it has {cond_dim}: end cond_mlp_dims with {td_emb_dim}, or take concate"
            )
        self.embed_combination_type, self.embedded_dim = embed_combination_type, cond_dim
        inputs = action_dim * horizon_steps + td_emb_dim + (cond_dim if embed_combination_type == "concate" else 0)
        self.vel_head = (ResidualMLP if residual_style else MLP)(
            [inputs, *mlp_dims, action_dim * horizon_steps],
            activation_type=activation_type,
            out_activation_type=out_activation_type,
            use_layernorm=use_layernorm,
        )

    def embed(self, time: Array, cond: dict[str, Array], step: Array) -> tuple[Array, Array]:
        """Embeds time and step [B], and the observation: [B,td_emb_dim] and [B,D]."""
        state = flatten_state(cond)
        return self.t_emb(time, step), self.cond_emb(state) if self.has_cond_mlp else state

    def call(self, x: Array, time: Array, cond: dict[str, Array], step: Array) -> Array:
        """Maps x [B,H,A], time [B], cond {"state": [B,To,O]}, step [B] to the velocity [B,H,A]."""
        embedded, state = self.embed(time, cond, step)
        if self.embed_combination_type == "concate":
            together = tf.concat([embedded, state], axis=-1)
        else:
            together = embedded + state if self.embed_combination_type == "add" else embedded * state
        flat = tf.reshape(x, [-1, self.horizon_steps * self.action_dim])
        return tf.reshape(self.vel_head(tf.concat([flat, together], axis=-1)), tf.shape(x))


class NoiseRange(keras.layers.Layer):
    """Standard deviations within bounds: exp of half a log-variance that an MLP places between that of the bounds.

    Args:
        in_dim, out_dim, hidden_dims, activation_type: of the MLP.
        min_std, max_std: the bounds, which are not trained; `set_range` moves them.
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        hidden_dims: Sequence[int],
        min_std: float,
        max_std: float,
        activation_type: str = "Tanh",
    ):
        super().__init__(dtype=floatx())
        self.mlp_logvar = MLP([in_dim, *hidden_dims, out_dim], activation_type=activation_type)
        self.logvar_min, self.logvar_max = (
            tf.Variable(_log_variance(std), dtype=floatx(), trainable=False) for std in (min_std, max_std)
        )

    def set_range(self, min_std: float, max_std: float) -> None:
        """Moves the bounds."""
        self.logvar_min.assign(_log_variance(min_std))
        self.logvar_max.assign(_log_variance(max_std))

    def call(self, x: Array) -> Array:
        """Maps x [B,in_dim] to standard deviations [B,out_dim]."""
        share = (tf.tanh(self.mlp_logvar(x)) + 1) / 2
        return tf.exp(0.5 * (self.logvar_min + (self.logvar_max - self.logvar_min) * share))


def _log_variance(std: float) -> np.ndarray:
    """Returns log(std^2), a scalar, in float32 as the reference does in every precision."""
    return np.log(np.square(np.float32(std)))


SCHEDULED = ("const", "vp", "lin")
LEARNED = ("learn", "learn_decay")


class NoisyFlow(Network):
    """A velocity, and how much noise ReinFlow adds to each of its steps (Zhang et al. 2025, section 4.1).

    Args:
        policy: the velocity's network, `FlowMLP` or `ShortcutFlowMLP`.
        denoising_steps: K.
        learn_explore_noise_from: steps before it have fixed noise.
        inital_noise_scheduler_type: learn, learn_decay (the network says how much), const, vp or lin (fixed levels of
            the steps). The spelling is the reference's.
        min_logprob_denoising_std, max_logprob_denoising_std: bounds of the noise's standard deviation.
        use_time_independent_noise: noise from the observation alone.
        learn_explore_time_embedding, time_dim_explore: noise from the observation and an embedding of the step that is
            its own, of that width; otherwise from the observation and the velocity's embedding of the time.
        noise_hidden_dims, activation_type: of the network of the noise.
        device: accepted for the reference's configurations.
    """

    def __init__(
        self,
        policy: FlowMLP | ShortcutFlowMLP,
        denoising_steps: int,
        learn_explore_noise_from: int,
        inital_noise_scheduler_type: str,
        min_logprob_denoising_std: float,
        max_logprob_denoising_std: float,
        learn_explore_time_embedding: bool = False,
        time_dim_explore: int = 0,
        use_time_independent_noise: bool = False,
        noise_hidden_dims: Sequence[int] | None = None,
        activation_type: str = "Tanh",
        device: str | None = None,
    ):
        super().__init__(dtype=floatx())
        kind, bounds = inital_noise_scheduler_type, (min_logprob_denoising_std, max_logprob_denoising_std)
        if kind not in (*LEARNED, *SCHEDULED):
            raise UserError(f"noise_scheduler_type={kind}: take one of {', '.join((*LEARNED, *SCHEDULED))}")
        if not 0 < bounds[0] <= bounds[1]:
            raise UserError(f"min_logprob_denoising_std={bounds[0]}: more than 0, at most the maximum {bounds[1]}")
        if not hasattr(policy, "embed"):
            raise UserError(f"ReinFlow trains flows that see states alone, not yet a {type(policy).__name__}")
        self.policy, self.denoising_steps = policy, int(denoising_steps)
        self.learn_from, self.kind, self.bounds = int(learn_explore_noise_from), kind, bounds
        self.from_observation, self.own_embedding = use_time_independent_noise, learn_explore_time_embedding
        out_dim, time_dim = policy.horizon_steps * policy.action_dim, _time_width(policy)
        width = policy.cond_dim if not policy.has_cond_mlp else _cond_width(policy)
        hidden = noise_hidden_dims
        if use_time_independent_noise:
            hidden = (16,) if hidden is None else hidden
        elif learn_explore_time_embedding:
            if hidden is None:
                raise UserError("learn_explore_time_embedding=true needs noise_hidden_dims")
            self.time_embedding_explore = _Entries(self.denoising_steps, time_dim_explore)
            width += time_dim_explore
        else:
            width += time_dim
            hidden = (int(np.sqrt(width**2 + out_dim**2)),) if hidden is None else hidden
        self.explore_noise_net = NoiseRange(width, out_dim, hidden, *bounds, activation_type)
        self.levels = fixed_levels(kind, self.denoising_steps, out_dim, *bounds)

    def call(self, x: Array, time: Array, cond: dict[str, Array], step: int, *size: Array) -> tuple[Array, Array]:
        """Maps x [B,H,A], time [B], cond, the step's number and, for shortcut models, its size [B] to the velocity
        [B,H,A] and the standard deviation of the noise [B,H*A]."""
        return self.policy(x, time, cond, *size), self.noise_std(time, cond, step, *size)

    def noise_std(self, time: Array, cond: dict[str, Array], step: int, *size: Array) -> Array:
        """Returns the standard deviation of the noise [B,H*A] of a step; the arguments are those of `call`.

        The embedding of the time is the velocity's and learns nothing from the noise; that of the observation does.
        """
        embedded, state = self.policy.embed(time, cond, *size)
        if self.kind == "const" or step < self.learn_from:
            return tf.repeat(tf.constant(self.levels[step : step + 1], state.dtype), tf.shape(state)[0], axis=0)
        if self.from_observation:
            return self.explore_noise_net(state)
        if self.own_embedding:
            embedded = self.time_embedding_explore(tf.fill([tf.shape(state)[0]], step))
        else:
            embedded = tf.stop_gradient(embedded)
        return self.explore_noise_net(tf.concat([embedded, state], axis=-1))


class _Entries(keras.layers.Layer):
    """A learned vector for each number."""

    def __init__(self, n: int, dim: int):
        super().__init__(dtype=floatx())
        self.weight = tf.Variable(init_rng().normal((n, dim), dtype=floatx()), name="weight")

    def call(self, number: Array) -> Array:
        """Maps numbers [B] to [B,dim]."""
        return tf.gather(self.weight, number)


def fixed_levels(kind: str, steps: int, width: int, min_std: float, max_std: float) -> np.ndarray:
    """Returns fixed standard deviations [K,width] of the steps: by the variance of a bridge (vp), growing with time
    (lin), or the least one; within the bounds."""
    t = np.linspace(0, 1, steps, dtype=np.float32)
    levels = {"vp": np.sqrt(np.float32(0.2) * t * (1 - t)), "lin": np.float32(0.1) * t}.get(
        kind, np.full_like(t, min_std)
    )
    return np.repeat(np.clip(levels, np.float32(min_std), np.float32(max_std))[:, None], width, axis=1)


def _time_width(policy: FlowMLP | ShortcutFlowMLP) -> int:
    return policy.time_dim if isinstance(policy, FlowMLP) else policy.t_emb.dim


def _cond_width(policy: FlowMLP | ShortcutFlowMLP) -> int:
    last = (policy.cond_mlp if isinstance(policy, FlowMLP) else policy.cond_emb).layers[-1]
    return int(last.linear.kernel.shape[-1])
