"""One-dimensional U-Net over an action chunk (Janner et al. 2022; Chi et al. 2023), conditioned by FiLM.

Shape letters: B batch, H horizon, A action, To observation history, O observation, C channels, G width of the
condition (time embedding and observation together). Inside the network time comes first, [H,B,C].
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from diffusion_rl.core.errors import UserError
from diffusion_rl.core.keras import floatx, keras
from diffusion_rl.core.typing import Array
from diffusion_rl.networks.convolution import Conv1d, ConvTranspose1d, GroupNorm
from diffusion_rl.networks.layers import Linear, Network, TimeEmbedding, activation, flatten_state, sequential
from diffusion_rl.networks.mlp import ResidualMLP


class ConvBlock(keras.layers.Layer):
    """Convolution that keeps the length (odd kernels), group normalisation (none without groups), activation."""

    def __init__(
        self, in_dim: int, out_dim: int, kernel_size: int, n_groups: int | None, activation_type: str, epsilon: float
    ):
        super().__init__(dtype=floatx())
        self.conv = Conv1d(in_dim, out_dim, kernel_size, padding=kernel_size // 2)
        if n_groups is not None:
            self.norm = GroupNorm(n_groups, out_dim, epsilon)
        self.normalises, self.activate = n_groups is not None, activation(activation_type)

    def call(self, x: Array) -> Array:
        """Maps [H,B,I] to [H,B,C]."""
        x = self.conv(x)
        return self.activate(self.norm(x) if self.normalises else x)


class FiLMBlock(keras.layers.Layer):
    """Two convolution blocks with a skip; between them the condition scales and shifts channels (Perez et al. 2018).

    Args:
        cond_dim: G.
        cond_predict_scale: the condition gives scale and shift of every channel, in this order; otherwise a shift.
        larger_encoder: three Linear layers on the condition instead of an activation and one.
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        cond_dim: int,
        kernel_size: int = 5,
        n_groups: int | None = None,
        cond_predict_scale: bool = False,
        larger_encoder: bool = False,
        activation_type: str = "Mish",
        groupnorm_eps: float = 1e-5,
    ):
        super().__init__(dtype=floatx())
        self.out_dim, self.cond_predict_scale = out_dim, cond_predict_scale
        block = (kernel_size, n_groups, activation_type, groupnorm_eps)
        self.blocks = [ConvBlock(in_dim, out_dim, *block), ConvBlock(out_dim, out_dim, *block)]
        act, film_dim = activation(activation_type), 2 * out_dim if cond_predict_scale else out_dim
        if larger_encoder:
            self.cond_encoder: list[Any] = [Linear(cond_dim, film_dim), act, Linear(film_dim, film_dim), act]
            self.cond_encoder += [Linear(film_dim, film_dim)]
        else:
            self.cond_encoder = [act, Linear(cond_dim, film_dim)]
        if in_dim != out_dim:
            self.residual_conv = Conv1d(in_dim, out_dim, 1)
        self.changes_width = in_dim != out_dim

    def call(self, x: Array, cond: Array) -> Array:
        """Maps x [H,B,I], cond [B,G] to [H,B,C]."""
        cond = sequential(self.cond_encoder, cond)
        out, n = self.blocks[0](x), self.out_dim
        out = cond[:, :n] * out + cond[:, n:] if self.cond_predict_scale else out + cond
        return self.blocks[1](out) + (self.residual_conv(x) if self.changes_width else x)


class Downsample(keras.layers.Layer):
    """Half the length: convolution with stride 2."""

    def __init__(self, dim: int):
        super().__init__(dtype=floatx())
        self.conv = Conv1d(dim, dim, 3, stride=2, padding=1)

    def call(self, x: Array) -> Array:
        """Maps x [H,B,C] to [(H+1)//2,B,C]."""
        return self.conv(x)


class Upsample(keras.layers.Layer):
    """Twice the length: transposed convolution with stride 2."""

    def __init__(self, dim: int):
        super().__init__(dtype=floatx())
        self.conv = ConvTranspose1d(dim, dim, 4, stride=2, padding=1)

    def call(self, x: Array) -> Array:
        """Maps x [H,B,C] to [2H,B,C]."""
        return self.conv(x)


class UNetTrunk(Network):
    """The U of convolutions, conditioned on one vector: base of the networks for states and for images.

    L levels are joined by L-1 halvings on the way down and as many doublings on the way up; the features of the first
    level are kept but no step up takes them, as in the reference.

    Args:
        action_dim: A.
        cond_dim: width of the flattened observation history, To * O.
        diffusion_step_embed_dim: width of the time embedding.
        dim, dim_mults: channels of the levels are dim times these.
        smaller_encoder: one Linear layer on the condition in every block instead of three.
        cond_mlp_dims: the observation first goes through a residual MLP of these dimensions; this also makes the
            encoders of the blocks the small ones. Two dimensions are two Linear layers without a nonlinearity.
        kernel_size: odd.
        n_groups: groups of channels of the normalisation; None: no normalisation.
        cond_predict_scale: see `FiLMBlock`.
        groupnorm_eps: epsilon inside the normalisation's root.
        image_dim: width of the image features of subclasses that have some.
    """

    def __init__(
        self,
        action_dim: int,
        cond_dim: int,
        diffusion_step_embed_dim: int = 32,
        dim: int = 32,
        dim_mults: Sequence[int] = (1, 2, 4, 8),
        smaller_encoder: bool = False,
        cond_mlp_dims: Sequence[int] | None = None,
        kernel_size: int = 5,
        n_groups: int | None = None,
        activation_type: str = "Mish",
        cond_predict_scale: bool = False,
        groupnorm_eps: float = 1e-5,
        image_dim: int = 0,
    ):
        super().__init__(dtype=floatx())
        if kernel_size % 2 == 0:
            raise UserError(f"kernel_size={kernel_size}: the U-Net needs an odd one, or its chunks change length")
        self.action_dim, self.cond_dim, self.time_dim = action_dim, cond_dim, diffusion_step_embed_dim
        self.time_mlp = TimeEmbedding(diffusion_step_embed_dim, expansion=4)
        self.has_cond_mlp, state_dim = cond_mlp_dims is not None, cond_dim
        if cond_mlp_dims is not None:
            self.cond_mlp = ResidualMLP([cond_dim, *cond_mlp_dims], activation_type=activation_type)
            state_dim = cond_mlp_dims[-1]
        seen_dim = diffusion_step_embed_dim + image_dim + state_dim
        larger_encoder = not (self.has_cond_mlp or smaller_encoder)
        self.levels = len(dim_mults)
        film = (kernel_size, n_groups, cond_predict_scale, larger_encoder, activation_type, groupnorm_eps)
        dims = [action_dim, *(dim * m for m in dim_mults)]
        widths = list(zip(dims[:-1], dims[1:], strict=True))

        def pair(in_dim: int, out_dim: int) -> list[FiLMBlock]:
            return [FiLMBlock(in_dim, out_dim, seen_dim, *film), FiLMBlock(out_dim, out_dim, seen_dim, *film)]

        self.mid_modules = pair(dims[-1], dims[-1])
        self.down_modules: list[list[Any]] = [
            [*pair(before, after), *([Downsample(after)] if level < self.levels - 1 else [])]
            for level, (before, after) in enumerate(widths)
        ]
        self.up_modules: list[list[Any]] = [
            [*pair(2 * after, before), Upsample(before)] for before, after in reversed(widths[1:])
        ]
        width = dims[1]  # the reference says `dim`, and fails where the first of dim_mults is not 1
        self.final_conv: list[Any] = [
            ConvBlock(width, width, kernel_size, n_groups, activation_type, groupnorm_eps),
            Conv1d(width, action_dim, 1),
        ]

    def encoded_state(self, cond: dict[str, Array]) -> Array:
        """Maps {"state": [B,To,O]} to the observation as the blocks are conditioned on it."""
        return self.cond_mlp(flatten_state(cond)) if self.has_cond_mlp else flatten_state(cond)

    def trunk(self, x: Array, time: Array, features: Array) -> Array:
        """Maps x [B,H,A], time [B] integers or one for all, features of images and observation [B,F] to [B,H,A].

        Where H is odd and there are two levels the result has H+1 steps.

        Raises:
            UserError: more levels than H can be halved.
        """
        time = tf.reshape(time, [-1])
        if time.shape[0] == 1 != x.shape[0]:
            time = tf.repeat(time, tf.shape(x)[0])
        cond = tf.concat([self.time_mlp(time), features], axis=-1)
        horizon, skips = x.shape[1], []
        x = tf.transpose(x, [1, 0, 2])
        for one, two, *down in self.down_modules:
            x = two(one(x, cond), cond)
            skips.append(x)
            x = sequential(down, x)
        for block in self.mid_modules:
            x = block(x, cond)
        for one, two, double in self.up_modules:
            skip = skips.pop()
            if skip.shape[0] != x.shape[0]:
                parts = 2 ** (self.levels - 1)
                raise UserError(
                    f"horizon_steps={horizon}: a U-Net of {self.levels} levels needs a multiple of {parts} "
                    "(or fewer network.dim_mults)"
                )
            x = double(two(one(tf.concat([x, skip], axis=-1), cond), cond))
        return tf.transpose(sequential(self.final_conv, x), [1, 0, 2])


class Unet1D(UNetTrunk):
    """Noise prediction from a noisy chunk, the denoising step and the observation history; arguments: `UNetTrunk`."""

    def call(self, x: Array, time: Array, cond: dict[str, Array]) -> Array:
        """Maps x [B,H,A], time [B] integers or one for all, cond {"state": [B,To,O]} to noise (or x0) [B,H,A]."""
        return self.trunk(x, time, self.encoded_state(cond))
