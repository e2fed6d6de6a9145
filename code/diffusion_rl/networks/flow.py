"""Velocities of flow-matching policies: what moves noise at time 0 to an action chunk at time 1.

Names and layouts are those of ReinFlow (Zhang et al. 2025, arXiv:2505.22094). Shapes: B batch, H chunk, A action, To
observation history, O observation, F image features; cond = {"state": [B,To,O]}, with images and their encoded form as
in `networks.vision`; times [B] are numbers in [0, 1], not steps.

Each network also gives away what it makes of time and observation (`embed`), of the widths `widths`: ReinFlow's noise
is made of these.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

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
from diffusion_rl.networks.vision import ImageFeatures, SeesImages, VisionDiffusionMLP


class FlowMLP(DiffusionMLP):
    """The velocity from [action chunk, time embedding, observation]: `DiffusionMLP` at times that are real numbers.

    Arguments are those of `DiffusionMLP`.
    """

    @property
    def widths(self) -> tuple[int, int]:
        """Returns the widths of what `embed` gives."""
        return self.time_dim, self.cond_mlp.layers[-1].linear.kernel.shape[-1] if self.has_cond_mlp else self.cond_dim

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

    @property
    def widths(self) -> tuple[int, int]:
        """Returns the widths of what `embed` gives."""
        return self.time_dim, self.vision.dim + self.cond_dim

    def embed(self, time: Array, cond: dict[str, Array]) -> tuple[Array, Array]:
        """Embeds time [B] and observation: [B,time_dim] and [B,F+cond_dim]."""
        return self.time_embedding(tf.reshape(time, [-1])), self.encode(cond)["features"]


#: How a shortcut model brings together what it knows of the time and of the observation (the reference's spelling).
COMBINATIONS = ("add", "multiply", "concate")


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
        _check_combination(embed_combination_type)
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

    @property
    def widths(self) -> tuple[int, int]:
        """Returns the widths of what `embed` gives."""
        return self.t_emb.dim, self.embedded_dim

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


def _check_combination(kind: str) -> None:
    if kind not in COMBINATIONS:
        raise UserError(f"embed_combination_type={kind}: take {', '.join(COMBINATIONS[:-1])} or {COMBINATIONS[-1]}")


class ObservationEmbedding(keras.layers.Layer):
    """Linear, ReLU, Linear, with twice the width between."""

    def __init__(self, in_dim: int, dim: int):
        super().__init__(dtype=floatx())
        self.expand, self.project = Linear(in_dim, 2 * dim), Linear(2 * dim, dim)

    def call(self, x: Array) -> Array:
        """Maps x [B,in_dim] to [B,dim]."""
        return self.project(tf.nn.relu(self.expand(x)))


class ShortcutFlowViT(SeesImages, Network):
    """`ShortcutFlowMLP` with images: they and the observation are embedded to the width of time and step.

    Args:
        action_dim, horizon_steps: A and H.
        prop_dim: width of the flattened observation history, To * O.
        td_emb_dim: width of both embeddings.
        mlp_dims, activation_type, out_activation_type, use_layernorm, residual_style: of the MLP.
        cond_mlp_dims: if given, the observation first goes through an MLP of these dimensions.
        embed_combination_type: how both embeddings come together: add or multiply.
        **vision: of `ImageFeatures`.
    """

    ALSO_TAKES = (ImageFeatures.__init__,)

    def __init__(
        self,
        action_dim: int,
        horizon_steps: int,
        prop_dim: int,
        td_emb_dim: int = 16,
        mlp_dims: Sequence[int] = (256, 256),
        cond_mlp_dims: Sequence[int] | None = None,
        activation_type: str = "Mish",
        out_activation_type: str = "Identity",
        use_layernorm: bool = False,
        residual_style: bool = False,
        embed_combination_type: str = "add",
        **vision: Any,
    ):
        super().__init__(dtype=floatx())
        _check_combination(embed_combination_type)
        if embed_combination_type == "concate":
            raise UserError("embed_combination_type=concate: shortcut models that see images take add or multiply")
        self.embed_combination_type = embed_combination_type
        self.action_dim, self.horizon_steps, self.cond_dim = action_dim, horizon_steps, prop_dim
        self.td_emb = StepEmbedding(td_emb_dim)
        self.has_cond_mlp = bool(cond_mlp_dims)
        if cond_mlp_dims:
            self.prop_emb = MLP([prop_dim, *cond_mlp_dims], activation_type=activation_type)
        self.vision = ImageFeatures(cond_dim=prop_dim, **vision)
        seen = self.vision.dim + (cond_mlp_dims[-1] if cond_mlp_dims else prop_dim)
        self.cond_embed = ObservationEmbedding(seen, td_emb_dim)
        output_dim = action_dim * horizon_steps
        self.vel_head = (ResidualMLP if residual_style else MLP)(
            [output_dim + td_emb_dim, *mlp_dims, output_dim],
            activation_type=activation_type,
            out_activation_type=out_activation_type,
            use_layernorm=use_layernorm,
        )

    @property
    def widths(self) -> tuple[int, int]:
        """Returns the widths of what `embed` gives."""
        return self.td_emb.dim, self.td_emb.dim

    def embed(self, time: Array, cond: dict[str, Array], step: Array) -> tuple[Array, Array]:
        """Embeds time and step [B], and the observation (plain or encoded): [B,td_emb_dim] both."""
        features, state = tf.split(self.encode(cond)["features"], [self.vision.dim, self.cond_dim], axis=-1)
        state = self.prop_emb(state) if self.has_cond_mlp else state
        return self.td_emb(time, step), self.cond_embed(tf.concat([features, state], axis=-1))

    def call(self, x: Array, time: Array, cond: dict[str, Array], step: Array) -> Array:
        """Maps x [B,H,A], time [B], cond (plain or encoded), step [B] to the velocity [B,H,A]."""
        embedded, seen = self.embed(time, cond, step)
        together = embedded + seen if self.embed_combination_type == "add" else embedded * seen
        flat = tf.reshape(x, [-1, self.horizon_steps * self.action_dim])
        return tf.reshape(self.vel_head(tf.concat([flat, together], axis=-1)), tf.shape(x))


class OneStepMLP(Network):
    """A velocity whose one step of size 1 leads from noise to an MLP's output: MLP([x, o]) - x (flow Q-learning, Park
    et al. 2025, arXiv:2502.02538).

    Args:
        horizon_steps, action_dim: H and A.
        cond_dim: width of the flattened observation history, To * O.
        mlp_dims, activation_type, use_layernorm: of the MLP.
    """

    def __init__(
        self,
        horizon_steps: int,
        action_dim: int,
        cond_dim: int,
        mlp_dims: Sequence[int] = (512, 512, 512, 512),
        activation_type: str = "GELU",
        use_layernorm: bool = False,
    ):
        super().__init__(dtype=floatx())
        self.horizon_steps, self.action_dim, self.cond_dim = horizon_steps, action_dim, cond_dim
        size = horizon_steps * action_dim
        dims = [size + cond_dim, *mlp_dims, size]
        self.mlp_mean = MLP(dims, activation_type=activation_type, use_layernorm=use_layernorm)

    def call(self, x: Array, time: Array, cond: dict[str, Array]) -> Array:
        """Maps noise x [B,H,A], cond {"state": [B,To,O]} to the velocity [B,H,A], whatever the time [B]."""
        flat = tf.reshape(x, [-1, self.horizon_steps * self.action_dim])
        return tf.reshape(self.mlp_mean(tf.concat([flat, flatten_state(cond)], axis=-1)), tf.shape(x)) - x


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
        return self.within_bounds(self.mlp_logvar(x))

    def within_bounds(self, x: Array) -> Array:
        """Maps numbers [B,out_dim] to standard deviations between the bounds."""
        share = (tf.tanh(x) + 1) / 2
        return tf.exp(0.5 * (self.logvar_min + (self.logvar_max - self.logvar_min) * share))


def _log_variance(std: float) -> np.ndarray:
    """Returns log(std^2), a scalar, in float32 as the reference does in every precision."""
    return np.log(np.square(np.float32(std)))


Velocity = FlowMLP | VisionFlowMLP | ShortcutFlowMLP | ShortcutFlowViT
SCHEDULED = ("const", "vp", "lin", "const_schedule_itr")
LEARNED = ("learn", "learn_decay")


class NoisyFlow(Network):
    """A velocity, and how much noise ReinFlow adds to each of its steps (Zhang et al. 2025, section 4.1).

    Args:
        policy: the velocity's network.
        denoising_steps: K.
        learn_explore_noise_from: steps before it have fixed noise.
        inital_noise_scheduler_type: learn, learn_decay (the network says how much), const, vp, lin or
            const_schedule_itr (fixed levels of the steps; the last one's follow the iterations). The spelling is the
            reference's.
        min_logprob_denoising_std, max_logprob_denoising_std: bounds of the noise's standard deviation.
        use_time_independent_noise: noise from the observation alone.
        learn_explore_time_embedding, time_dim_explore: noise from the observation and an embedding of the step that is
            its own, of that width; otherwise from the observation and the velocity's embedding of the time.
        noise_hidden_dims, activation_type: of the network of the noise.
        device: accepted for the reference's configurations.
    """

    def __init__(
        self,
        policy: Velocity,
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
            raise UserError(f"ReinFlow trains flows that `embed` time and state, not {type(policy).__name__}")
        self.policy, self.denoising_steps = policy, int(denoising_steps)
        self.learn_from, self.kind, self.bounds = int(learn_explore_noise_from), kind, bounds
        self.from_observation, self.own_embedding = use_time_independent_noise, learn_explore_time_embedding
        self.out_dim, (time_dim, width) = policy.horizon_steps * policy.action_dim, policy.widths
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
            hidden = (int(np.sqrt(width**2 + self.out_dim**2)),) if hidden is None else hidden
        self.explore_noise_net = NoiseRange(width, self.out_dim, hidden, *bounds, activation_type)
        self._levels = _Kept(fixed_levels(kind, self.denoising_steps, *bounds))

    @property
    def levels(self) -> np.ndarray:
        """Returns the fixed standard deviations [K] of the steps."""
        return self._levels.variable.numpy()

    def set_level(self, std: float) -> None:
        """Gives all steps this fixed standard deviation, within the bounds."""
        self._levels.variable.assign(np.full(self.denoising_steps, np.clip(std, *self.bounds)))

    def call(self, x: Array, time: Array, cond: dict[str, Array], step: int, *size: Array) -> tuple[Array, Array]:
        """Maps x [B,H,A], time [B], cond, the step's number and, for shortcut models, its size [B] to the velocity
        [B,H,A] and the standard deviation of the noise [B,H*A]."""
        cond = self.policy.encode(cond) if hasattr(self.policy, "encode") else cond
        return self.policy(x, time, cond, *size), self.noise_std(time, cond, step, *size)

    def noise_std(self, time: Array, cond: dict[str, Array], step: int, *size: Array) -> Array:
        """Returns the standard deviation of the noise [B,H*A] of a step; the arguments are those of `call`.

        The embedding of the time is the velocity's and learns nothing from the noise; that of the observation does.
        """
        embedded, state = self.policy.embed(time, cond, *size)
        if self.kind == "const" or step < self.learn_from:
            return tf.fill([tf.shape(state)[0], self.out_dim], tf.convert_to_tensor(self._levels.variable)[step])
        if self.from_observation:
            return self.explore_noise_net(state)
        if self.own_embedding:
            embedded = self.time_embedding_explore(tf.fill([tf.shape(state)[0]], step))
        else:
            embedded = tf.stop_gradient(embedded)
        return self.explore_noise_net(tf.concat([embedded, state], axis=-1))


class _Kept:
    """Holds a variable that is no weight."""

    def __init__(self, values: np.ndarray):
        self.variable = tf.Variable(values, dtype=floatx(), trainable=False)


class _Entries(keras.layers.Layer):
    """A learned vector for each number."""

    def __init__(self, n: int, dim: int):
        super().__init__(dtype=floatx())
        self.weight = tf.Variable(init_rng().normal((n, dim), dtype=floatx()), name="weight")

    def call(self, number: Array) -> Array:
        """Maps numbers [B] to [B,dim]."""
        return tf.gather(self.weight, number)


def fixed_levels(kind: str, steps: int, min_std: float, max_std: float) -> np.ndarray:
    """Returns fixed standard deviations [K] of the steps: by the variance of a bridge (vp), growing with time (lin), or
    the least one; within the bounds."""
    step, i = float(np.float32(1 / max(steps - 1, 1))), np.arange(steps)
    t = np.where(i < max(steps // 2, 1), i * step, 1 - i[::-1] * step)  # from both ends, as the reference rounds it
    t = t.astype(np.float32)
    levels = {"vp": np.sqrt(np.float32(0.2) * t * (1 - t)), "lin": np.float32(0.1) * t}.get(
        kind, np.full_like(t, min_std)
    )
    return np.clip(levels, np.float32(min_std), np.float32(max_std))
