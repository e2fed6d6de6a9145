"""Diffuser's networks (Janner et al. 2022): a U-Net over time that sees whole trajectories, and a value network.

Shape letters: B batch, H horizon, D width of a transition (action and observation), C channels, M width of the time
embedding. Inside the networks time comes first, [H,B,C].

Rows of one denoising step share its embedding: `time` may hold a single step for all of them.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import tensorflow as tf

from diffusion_rl.core.errors import UserError
from diffusion_rl.core.keras import floatx, keras
from diffusion_rl.core.typing import Array
from diffusion_rl.networks.convolution import Conv1d
from diffusion_rl.networks.layers import Linear, Network, TimeEmbedding, mish, sequential
from diffusion_rl.networks.unet1d import ConvBlock, Downsample, Upsample
from diffusion_rl.networks.vision import ImageFeatures
from diffusion_rl.networks.vit import VitEncoder, VitEncoderConfig

GROUPS = 8  # of every group normalisation
EPSILON = 1e-5
IMAGE_FEATURES = 50  # of a camera's picture


def conv_block(in_dim: int, out_dim: int, kernel_size: int = 5, n_groups: int = GROUPS) -> ConvBlock:
    """Convolution, group normalisation, Mish."""
    return ConvBlock(in_dim, out_dim, kernel_size, n_groups, "Mish", EPSILON)


class ResidualTemporalBlock(keras.layers.Layer):
    """Two convolution blocks with a skip; between them the embedded time shifts every channel.

    `horizon` is accepted for the reference's specifications and does nothing. With `attention` there is one more skip,
    around attention, inside the other.
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        embed_dim: int,
        horizon: int | None = None,
        kernel_size: int = 5,
        attention: bool = False,
    ):
        super().__init__(dtype=floatx())
        self.blocks = [conv_block(in_dim, out_dim, kernel_size), conv_block(out_dim, out_dim, kernel_size)]
        self.time_mlp = [mish, Linear(embed_dim, out_dim)]
        if in_dim != out_dim:
            self.residual_conv = Conv1d(in_dim, out_dim, 1)
        if attention:
            self.inner_attention = LinearAttention(out_dim, scaled=False)
        self.changes_width, self.attends = in_dim != out_dim, attention

    def call(self, x: Array, t: Array) -> Array:
        """Maps x [H,B,I], t [B,M] or [1,M] to [H,B,C]."""
        out = self.blocks[1](self.blocks[0](x) + sequential(self.time_mlp, t))
        out = out + self.inner_attention(out) if self.attends else out
        return out + (self.residual_conv(x) if self.changes_width else x)


class ChannelNorm(keras.layers.Layer):
    """Normalisation over channels; gain `g` and offset `b` have the shape [1,C,1] that the reference keeps them in."""

    def __init__(self, dim: int, eps: float = EPSILON):
        super().__init__(dtype=floatx())
        self.eps = eps
        self.g = tf.Variable(tf.ones([1, dim, 1], floatx()), name="g")
        self.b = tf.Variable(tf.zeros([1, dim, 1], floatx()), name="b")

    def call(self, x: Array) -> Array:
        """Maps x [H,B,C] to [H,B,C]."""
        mean, variance = tf.nn.moments(x, axes=[-1], keepdims=True)
        normal = (x - mean) * tf.math.rsqrt(variance + tf.constant(self.eps, x.dtype))
        return normal * tf.reshape(self.g, [-1]) + tf.reshape(self.b, [-1])


class LinearAttention(keras.layers.Layer):
    """Attention whose cost grows linearly with time (Shen et al. 2021): softmax over time of the keys alone.

    Queries are divided by the root of dim_head where they are `scaled`.
    """

    def __init__(self, dim: int, heads: int = 4, dim_head: int = 32, scaled: bool = True):
        super().__init__(dtype=floatx())
        self.heads, self.dim_head, self.scale = heads, dim_head, dim_head**-0.5 if scaled else 1.0
        self.to_qkv = Conv1d(dim, 3 * heads * dim_head, 1, has_bias=False)
        self.to_out = Conv1d(heads * dim_head, dim, 1)

    def call(self, x: Array) -> Array:
        """Maps [H,B,C] to [H,B,C]."""
        steps = x.shape[0]
        qkv = tf.reshape(self.to_qkv(x), [steps, -1, 3, self.heads, self.dim_head])
        q, k, v = (tf.transpose(part, [1, 2, 0, 3]) for part in tf.unstack(qkv, axis=2))  # [B,heads,H,dim_head]
        context = tf.matmul(tf.nn.softmax(k, axis=2), v, transpose_a=True)
        out = tf.matmul(q * self.scale, context)
        return self.to_out(tf.reshape(tf.transpose(out, [2, 0, 1, 3]), [steps, -1, self.heads * self.dim_head]))


class AttentionBlock(keras.layers.Layer):
    """x + attention(normalised x)."""

    def __init__(self, dim: int, heads: int = 4, dim_head: int = 32):
        super().__init__(dtype=floatx())
        self.linear_attention = LinearAttention(dim, heads, dim_head)
        self.channel_norm = ChannelNorm(dim)

    def call(self, x: Array) -> Array:
        """Maps x [H,B,C] to [H,B,C]."""
        return x + self.linear_attention(self.channel_norm(x))


class TemporalUnet(Network):
    """Denoises trajectories; convolutions all through, so any horizon that can be halved often enough will do.

    Features of the first level are kept but no step up takes them, as in the reference.

    Args:
        horizon: H it is trained with.
        transition_dim: D of the output.
        cond_dim: accepted for the reference's specifications and does nothing.
        dim, dim_mults: channels of the levels are dim times these; M = dim.
        attention: linear attention at every level.
        input_dim: channels of the input, where it has more than the output.
    """

    def __init__(
        self,
        horizon: int,
        transition_dim: int,
        cond_dim: int = 0,
        dim: int = 32,
        dim_mults: Sequence[int] = (1, 2, 4, 8),
        attention: bool = False,
        input_dim: int | None = None,
    ):
        super().__init__(dtype=floatx())
        self.horizon, self.transition_dim, self.levels = horizon, transition_dim, len(dim_mults)
        require_horizon(horizon, self.levels)
        dims = [input_dim or transition_dim, *(dim * m for m in dim_mults)]
        widths = list(itertools.pairwise(dims))

        def attend(width: int) -> keras.layers.Layer | None:
            return AttentionBlock(width) if attention else None

        def pair(before: int, after: int) -> list[ResidualTemporalBlock]:
            return [self.block(before, after, dim), self.block(after, after, dim)]

        self.time_mlp = TimeEmbedding(dim, expansion=4)
        self.downs: list[list[Any]] = [
            [*pair(before, after), attend(after), Downsample(after) if level < self.levels - 1 else None]
            for level, (before, after) in enumerate(widths)
        ]
        self.mid_block1, self.mid_block2 = pair(dims[-1], dims[-1])
        self.mid_attn = attend(dims[-1])
        self.ups: list[list[Any]] = [
            [*pair(2 * after, before), attend(before), Upsample(before)] for before, after in widths[:0:-1]
        ]
        self.final_conv: list[Any] = [conv_block(dims[1], dims[1]), Conv1d(dims[1], transition_dim, 1)]

    def block(self, before: int, after: int, dim: int) -> ResidualTemporalBlock:
        """Makes what every level has two of."""
        return ResidualTemporalBlock(before, after, dim)

    def call(self, x: Array, time: Array) -> Array:
        """Maps x [B,H,D], time [B] or [1] integers to noise or clean trajectories [B,H,D].

        Raises:
            UserError: H cannot be halved once between any two levels.
        """
        return self.denoise(x, self.time_mlp(time))

    def denoise(self, x: Array, t: Array) -> Array:
        """Maps x [B,H,D], embedding t [B,M] or [1,M] of what the blocks see besides to [B,H,D]."""
        require_horizon(x.shape[1], self.levels)
        x, skips = tf.transpose(x, [1, 0, 2]), []
        for one, two, attend, halve in self.downs:
            x = _optional(attend, two(one(x, t), t))
            skips.append(x)
            x = _optional(halve, x)
        x = self.mid_block2(_optional(self.mid_attn, self.mid_block1(x, t)), t)
        for one, two, attend, double in self.ups:
            x = double(_optional(attend, two(one(tf.concat([x, skips.pop()], axis=-1), t), t)))
        return tf.transpose(sequential(self.final_conv, x), [1, 0, 2])


class ActionTemporalUnet(TemporalUnet):
    """The U-Net over actions alone; features of the current observation stand beside each of them.

    Args:
        transition_dim: A.
        observation_dim: O.
        obs_embed: "mlp" (three Linear layers, to 1 + O // 3 features) or "raw" (the observation as it is).
        image_shape: [C,Hi,Wi] of the pictures that are seen besides, which the observation [O] then joins as it is;
            three channels are a camera.
        image_dim: width of their encoder.
        horizon, dim, dim_mults, attention: as in `TemporalUnet`.
    """

    def __init__(
        self,
        horizon: int,
        transition_dim: int,
        observation_dim: int,
        dim: int = 32,
        dim_mults: Sequence[int] = (1, 2, 4, 8),
        attention: bool = False,
        obs_embed: str = "mlp",
        image_shape: Sequence[int] | None = None,
        image_dim: int = 64,
    ):
        if obs_embed not in ("mlp", "raw"):
            raise UserError(f"obs_embed={obs_embed!r}: choose mlp or raw")
        features = observation_dim if obs_embed == "raw" else 1 + observation_dim // 3
        if image_shape is not None:
            cameras = max(image_shape[0] // 3, 1)
            features = IMAGE_FEATURES * cameras + observation_dim
        super().__init__(horizon, transition_dim, 0, dim, dim_mults, attention, input_dim=transition_dim + features)
        self.obs_mlp: list = []
        if image_shape is not None:
            channels, height, width = image_shape
            style = VitEncoderConfig(embed_dim=image_dim, embed_style="embed1")
            encoder = VitEncoder(None, style, channels // cameras, height, width)
            self.vision = ImageFeatures(encoder, observation_dim, spatial_emb=IMAGE_FEATURES, num_img=cameras)
        elif obs_embed == "mlp":
            wide = 2 * observation_dim
            self.obs_mlp = [Linear(observation_dim, wide), mish, Linear(wide, observation_dim), mish]
            self.obs_mlp.append(Linear(observation_dim, features))

    def encode(self, observation: Array | Mapping[str, Array]) -> Array:
        """Maps observations [B,O], with pictures {"state": [B,O], "rgb": [B,C,Hi,Wi]}, to features [B,F].

        What is {"features": [B,F]} already is taken as it is.
        """
        if not isinstance(observation, Mapping):
            return sequential(self.obs_mlp, observation)
        if "features" in observation:
            return observation["features"]
        state = observation["state"]
        return tf.concat([self.vision(observation["rgb"][:, None], state), state], axis=-1)

    def call(self, x: Array, time: Array, features: Array) -> Array:  # type: ignore[override]  # one more input
        """Maps x [B,H,A], time [B] integers, features [B,F] of `encode` to noise or clean actions [B,H,A]."""
        beside = tf.repeat(features[:, None], x.shape[1], axis=1)
        return super().call(tf.concat([x, beside], axis=-1), time)


class ValueFunction(Network):
    """The return of a noisy trajectory.

    Args:
        horizon: H; unlike the U-Net it works for this one only.
        transition_dim, dim, dim_mults: as in `TemporalUnet`; dim times the last of dim_mults is a multiple of 32.
        cond_dim: accepted for the reference's specifications and does nothing.
        out_dim: numbers to predict.
    """

    def __init__(
        self,
        horizon: int,
        transition_dim: int,
        cond_dim: int = 0,
        dim: int = 32,
        dim_mults: Sequence[int] = (1, 2, 4, 8),
        out_dim: int = 1,
    ):
        super().__init__(dtype=floatx())
        self.horizon, self.transition_dim = horizon, transition_dim
        dims = [transition_dim, *(dim * m for m in dim_mults)]
        half, quarter = dims[-1] // 2, dims[-1] // 4
        if dims[-1] % (4 * GROUPS):
            raise UserError(
                f"the value network's widest level has {dims[-1]} channels: choose dim_mults so that dim times the "
                f"last of them is a multiple of {4 * GROUPS}"
            )
        self.time_mlp = TimeEmbedding(dim, expansion=4)
        self.blocks: list[list[Any]] = [
            [ResidualTemporalBlock(a, b, dim), ResidualTemporalBlock(b, b, dim), Downsample(b)]
            for a, b in itertools.pairwise(dims)
        ]
        self.mid_block1, self.mid_down1 = ResidualTemporalBlock(dims[-1], half, dim), Downsample(half)
        self.mid_block2, self.mid_down2 = ResidualTemporalBlock(half, quarter, dim), Downsample(quarter)
        steps = horizon
        for _ in range(len(dim_mults) + 2):
            steps = (steps + 1) // 2
        features = quarter * steps
        self.final_block: list[Any] = [Linear(features + dim, features // 2), mish, Linear(features // 2, out_dim)]

    def call(self, x: Array, time: Array) -> Array:
        """Maps x [B,H,D], time [B] or [1] integers to [B,out_dim]. Raises UserError for another H than it was built
        for."""
        if x.shape[1] != self.horizon:
            raise UserError(f"the value network was trained for horizon {self.horizon}, not {x.shape[1]}: plan with it")
        x, t = tf.transpose(x, [1, 0, 2]), self.time_mlp(time)
        for one, two, halve in self.blocks:
            x = halve(two(one(x, t), t))
        x = self.mid_down1(self.mid_block1(x, t))
        x = self.mid_down2(self.mid_block2(x, t))
        x = tf.reshape(tf.transpose(x, [1, 2, 0]), [-1, x.shape[0] * x.shape[2]])  # channel by channel
        x = tf.concat([x, tf.broadcast_to(t, [tf.shape(x)[0], t.shape[1]])], axis=-1)
        return sequential(self.final_block, x)


def require_horizon(horizon: int, levels: int) -> None:
    """Raises UserError if a U-Net of so many levels cannot halve and double the horizon back to itself."""
    parts = 2 ** (levels - 1)
    if horizon % parts:
        raise UserError(
            f"horizon={horizon}: a U-Net of {levels} levels needs a multiple of {parts} (or fewer dim_mults)"
        )


def _optional(layer: keras.layers.Layer | None, x: Array) -> Array:
    return x if layer is None else layer(x)
