"""A small vision transformer (Dosovitskiy et al. 2021) whose patches come from convolutions (IBRL, Hu et al. 2023).

Shapes: B batch, C channels, Hi, Wi image, P patches, D embedding, N heads.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import tensorflow as tf

from diffusion_rl.core.errors import UserError
from diffusion_rl.core.keras import floatx, keras
from diffusion_rl.core.noise import init_rng
from diffusion_rl.core.typing import Array
from diffusion_rl.networks.layers import LayerNorm, gelu, normal_linear, sequential, uniform_variable
from diffusion_rl.networks.transformer import SelfAttention

LINEAR_STD = 0.02  # initial weights of the transformer and of the position embedding
PATCH = 8  # side of the first convolution's window, whatever `patch_size` says


@dataclass(frozen=True)
class VitEncoderConfig:
    """Architecture of the encoder.

    Attributes:
        depth: number of transformer blocks.
        embed_dim, num_heads: D and N.
        embed_style: "embed1" cuts the image into patches of 8; "embed2" uses two overlapping convolutions.
        embed_norm: embed2 only: normalise every channel over the image after the first convolution.
        patch_size, stride: in the reference's configurations, but nothing reads them there either.
    """

    patch_size: int = PATCH
    depth: int = 1
    embed_dim: int = 128
    num_heads: int = 4
    stride: int = -1
    embed_style: str = "embed2"
    embed_norm: int = 0


class Conv2d(keras.layers.Layer):
    """Convolution without padding; kernel [k,k,in,out], bias [out], both uniform in +-1/sqrt(in k k)."""

    def __init__(self, in_dim: int, out_dim: int, kernel_size: int, stride: int):
        super().__init__(dtype=floatx())
        bound = 1.0 / math.sqrt(in_dim * kernel_size**2)
        self.kernel = uniform_variable((kernel_size, kernel_size, in_dim, out_dim), bound, "kernel")
        self.bias = uniform_variable((out_dim,), bound, "bias")
        self.stride = stride

    def call(self, x: Array) -> Array:
        """Maps [B,Hi,Wi,in] to [B,(Hi-k)/stride+1,(Wi-k)/stride+1,out]."""
        return tf.nn.conv2d(x, self.kernel, self.stride, "VALID") + self.bias


class InstanceNorm(LayerNorm):
    """Normalisation of each channel over its image, [B,Hi,Wi,D] (group normalisation with groups of one)."""

    axes = (1, 2)


class PatchEmbed1(keras.layers.Layer):
    """Patches of 8 x 8 pixels that do not overlap."""

    def __init__(self, embed_dim: int, num_channel: int, img_h: int, img_w: int):
        super().__init__(dtype=floatx())
        self.num_patch = math.prod(_windows(size, (PATCH, PATCH)) for size in (img_h, img_w))
        self.conv = Conv2d(num_channel, embed_dim, PATCH, stride=PATCH)

    def call(self, x: Array) -> Array:
        """Maps [B,Hi,Wi,C] to [B,P,D]."""
        return _patches(self.conv(x), self.num_patch)


class PatchEmbed2(keras.layers.Layer):
    """Two convolutions with a ReLU between: windows of 8 every 4 pixels, of which 3 x 3 every 2 make a patch."""

    def __init__(self, embed_dim: int, use_norm: bool, num_channel: int, img_h: int, img_w: int):
        super().__init__(dtype=floatx())
        self.num_patch = math.prod(_windows(size, (PATCH, 4), (3, 2)) for size in (img_h, img_w))
        self.conv1 = Conv2d(num_channel, embed_dim, PATCH, stride=4)
        self.use_norm = bool(use_norm)
        if use_norm:
            self.norm = InstanceNorm(embed_dim)
        self.conv2 = Conv2d(embed_dim, embed_dim, 3, stride=2)

    def call(self, x: Array) -> Array:
        """Maps [B,Hi,Wi,C] to [B,P,D]."""
        x = self.conv1(x)
        x = self.norm(x) if self.use_norm else x
        return _patches(self.conv2(tf.nn.relu(x)), self.num_patch)


def _windows(size: int, *convolutions: tuple[int, int]) -> int:
    """Returns how many windows (width, stride) after one another leave of `size` pixels; none may be cut off."""
    left = size
    for width, stride in convolutions:
        if left < width or (left - width) % stride:
            least = PATCH * len(convolutions)
            raise UserError(
                f"image side {size}: this patch embedding needs a multiple of 8, at least {least}: crop the images"
            )
        left = (left - width) // stride + 1
    return left


def _patches(x: Array, num_patch: int) -> Array:
    return tf.reshape(x, [-1, num_patch, x.shape[-1]])


class TransformerLayer(keras.layers.Layer):
    """Pre-norm block: x + attention(norm(x)), then x + W2 gelu(W1 norm(x)) of four times the width."""

    def __init__(self, embed_dim: int, num_head: int):
        super().__init__(dtype=floatx())
        if embed_dim % num_head:
            raise UserError(f"embed_dim={embed_dim} does not divide into num_heads={num_head}")
        linear = functools.partial(normal_linear, std=LINEAR_STD)
        self.layer_norm1 = LayerNorm(embed_dim)
        self.mha = SelfAttention(embed_dim, num_head, linear)
        self.layer_norm2 = LayerNorm(embed_dim)
        self.linear1 = linear(embed_dim, 4 * embed_dim)
        self.linear2 = linear(4 * embed_dim, embed_dim)

    def call(self, x: Array) -> Array:
        """Maps [B,P,D] to [B,P,D]."""
        x = x + self.mha(self.layer_norm1(x))
        return x + self.linear2(gelu(self.linear1(self.layer_norm2(x))))


class Vit(keras.layers.Layer):
    """Patch embedding plus position embedding, transformer blocks, LayerNorm. No class token."""

    def __init__(self, cfg: VitEncoderConfig, num_channel: int, img_h: int, img_w: int):
        super().__init__(dtype=floatx())
        if cfg.embed_style == "embed1":
            patch_embed = PatchEmbed1(cfg.embed_dim, num_channel, img_h, img_w)
        elif cfg.embed_style == "embed2":
            patch_embed = PatchEmbed2(cfg.embed_dim, bool(cfg.embed_norm), num_channel, img_h, img_w)
        else:
            raise UserError(f"unknown embed_style {cfg.embed_style!r}: choose embed1 or embed2")
        self.num_patches = patch_embed.num_patch
        position = init_rng().normal((1, self.num_patches, cfg.embed_dim), dtype=floatx()) * LINEAR_STD
        self.pos_embed = tf.Variable(position, name="pos_embed")
        self.patch_embed = patch_embed
        self.net = [TransformerLayer(cfg.embed_dim, cfg.num_heads) for _ in range(cfg.depth)]
        self.norm = LayerNorm(cfg.embed_dim)

    def call(self, x: Array) -> Array:
        """Maps [B,Hi,Wi,C] to [B,P,D]."""
        return self.norm(sequential(self.net, self.patch_embed(x) + self.pos_embed))


class VitEncoder(keras.layers.Layer):
    """Images to patch features.

    Args:
        obs_shape: accepted for the reference's configurations; the sizes below count.
        cfg: the architecture, as `VitEncoderConfig` or a mapping of its fields.
        num_channel: C, with a history of images stacked along the channels: 3 times its length.
        img_h, img_w: Hi, Wi.

    Attributes:
        num_patch: P;  patch_repr_dim: D;  repr_dim: P * D.

    Raises:
        UserError: the windows of the convolutions do not fill the image exactly.
    """

    def __init__(
        self,
        obs_shape: Any = None,
        cfg: VitEncoderConfig | Mapping[str, Any] | None = None,
        num_channel: int = 3,
        img_h: int = 96,
        img_w: int = 96,
    ):
        super().__init__(dtype=floatx())
        if not isinstance(cfg, VitEncoderConfig):
            cfg = VitEncoderConfig(**(cfg or {}))
        self.image_shape = (num_channel, img_h, img_w)
        self.vit = Vit(cfg, num_channel, img_h, img_w)
        self.num_patch, self.patch_repr_dim = self.vit.num_patches, cfg.embed_dim
        self.repr_dim = self.num_patch * cfg.embed_dim

    def call(self, obs: Array, flatten: bool = False) -> Array:
        """Maps [B,C,Hi,Wi] pixels in [0,255] to [B,P,D], or [B,P*D] if `flatten`."""
        if tuple(obs.shape[1:]) != self.image_shape:
            raise UserError(
                f"images [C,H,W] = {list(obs.shape[1:])} (history stacked along C), the encoder is built for "
                f"{list(self.image_shape)}: set num_channel, img_h, img_w and img_cond_steps accordingly"
            )
        channels_last = tf.cast(tf.transpose(obs, [0, 2, 3, 1]), self.compute_dtype)  # moved while still bytes
        features = self.vit(channels_last / 255.0 - 0.5)
        return tf.reshape(features, [-1, self.repr_dim]) if flatten else features
