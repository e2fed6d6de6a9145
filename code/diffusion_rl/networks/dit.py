"""Diffusion transformers over short sequences of states (Peebles & Xie 2023, in the form of DiffuserLite's code).

Shape letters: B batch, H states, O observation, E width of the condition, D width of the transformer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from diffusion_rl.core.keras import floatx, keras
from diffusion_rl.core.noise import init_rng
from diffusion_rl.core.typing import Array
from diffusion_rl.networks.layers import Linear, Network, mish, normal_linear, sequential, without_bias
from diffusion_rl.networks.transformer import SelfAttention

FREQUENCY_SCALE = 16.0
NORM_EPSILON = 1e-6
EMBEDDING_STD = 0.02


@tf.custom_gradient
def gelu_tanh(x: Array) -> tuple[Array, Callable[[Array], Array]]:
    """Returns the GELU of x [...], approximated by tanh. Written so that TFLite sees what it is; the gradient with less
    to do."""
    c, cubic = math.sqrt(2 / math.pi), 0.044715
    tanh = tf.tanh(c * (x + cubic * x**3))

    def gradient(upstream: Array) -> Array:
        slope = (0.5 - 0.5 * tf.square(tanh)) * (c + 3 * c * cubic * tf.square(x))
        return upstream * (0.5 + 0.5 * tanh + x * slope)

    return 0.5 * x * (1 + tanh), gradient


def silu(x: Array) -> Array:
    """Returns x sigmoid(x), [...]"""
    return x * tf.sigmoid(x)


@tf.custom_gradient
def normal(x: Array) -> tuple[Array, Callable[[Array], Array]]:
    """Brings x [...,D] to mean 0 and variance 1 over the last axis, without gain and offset."""
    centred = x - tf.reduce_mean(x, axis=-1, keepdims=True)
    scale = tf.math.rsqrt(tf.reduce_mean(tf.square(centred), axis=-1, keepdims=True) + NORM_EPSILON)
    y = centred * scale

    def gradient(upstream: Array) -> Array:
        along = tf.reduce_mean(upstream * y, axis=-1, keepdims=True)
        return scale * (upstream - tf.reduce_mean(upstream, axis=-1, keepdims=True) - y * along)

    return y, gradient


def xavier(linear: Linear) -> Linear:
    """Draws a Linear's weights uniformly within +-sqrt(6 / (in + out)), without initial bias. Returns the layer."""
    bound = math.sqrt(6 / sum(linear.kernel.shape))
    linear.kernel.assign(init_rng().uniform(linear.kernel.shape, -bound, bound, dtype=floatx()))
    return without_bias(linear)


def zeros(in_dim: int, out_dim: int) -> Linear:
    """Makes a Linear that gives zeros at first."""
    linear = Linear(in_dim, out_dim)
    linear.kernel.assign(tf.zeros_like(linear.kernel))
    return without_bias(linear)


def position_table(length: int, dim: int, dtype: str | None = None) -> np.ndarray:
    """Returns the table [length, dim]: [sin p, 0, …, 0 | cos p, 1, …, 1].

    The frequencies exp(-j ln(10^4) / (dim/2 - 1)) of the usual table are rounded down to whole numbers, 1, 0, 0, …:
    with this table the published weights were trained.
    """
    positions = np.arange(length, dtype=dtype or floatx())[:, None] * (np.arange(dim // 2) == 0)
    return np.concatenate([np.sin(positions), np.cos(positions)], axis=1)


def split_rows(x: Array, parts: int) -> list[Array]:
    """Maps [B,parts D] to parts times [B,1,D]."""
    return tf.split(x[:, None], parts, axis=-1)


class FourierEmbedding(keras.layers.Layer):
    """Time in [0, 1] by cosines and sines of random frequencies that are not trained, and a two-layer perceptron."""

    def __init__(self, dim: int, scale: float = FREQUENCY_SCALE):
        super().__init__(dtype=floatx())
        drawn = scale * init_rng().normal((dim // 8,), dtype=floatx())
        self.freqs = tf.Variable(drawn, trainable=False, name="freqs")
        self.mlp = [xavier(Linear(dim // 4, dim)), mish, xavier(Linear(dim, dim))]

    def call(self, t: Array) -> Array:
        """Maps [B] to [B,dim]."""
        angles = t[:, None] * (tf.constant(2 * math.pi, t.dtype) * self.freqs)[None]
        return sequential(self.mlp, tf.concat([tf.cos(angles), tf.sin(angles)], axis=-1))


class DiTBlock(keras.layers.Layer):
    """Attention and a perceptron, shifted, scaled and gated by the condition ("adaLN-Zero").

    Not the published block: what the attention is added to is its modulated input, not the block's input. The
    published weights were trained so; `standard_residual` gives the block of the paper.
    """

    def __init__(self, hidden_size: int, n_heads: int, standard_residual: bool = False):
        super().__init__(dtype=floatx())
        self.standard_residual = standard_residual
        self.attn = SelfAttention(hidden_size, n_heads)
        xavier(self.attn.in_proj)
        xavier(self.attn.out_proj)
        expand, project = Linear(hidden_size, 4 * hidden_size), Linear(4 * hidden_size, hidden_size)
        self.mlp = [xavier(expand), gelu_tanh, tf.identity, xavier(project)]  # in third place: dropout of nothing
        self.adaLN_modulation = [silu, zeros(hidden_size, 6 * hidden_size)]

    def call(self, x: Array, t: Array) -> Array:
        """Maps x [B,H,D], t [B,D] to [B,H,D]."""
        return self.modulated(x, split_rows(sequential(self.adaLN_modulation, t), 6))

    def modulated(self, x: Array, parts: Sequence[Array], states: slice | None = None) -> Array:
        """Maps x [B,H,D] and six times [B or 1,1,D] to [B,states,D]: all of them, or those that are asked for."""
        shift_attn, scale_attn, gate_attn, shift_mlp, scale_mlp, gate_mlp = parts
        inside = normal(x) * (1 + scale_attn) + shift_attn
        base = x if self.standard_residual else inside
        x = (base if states is None else base[:, states]) + gate_attn * self.attn(inside, states)
        return x + gate_mlp * sequential(self.mlp, normal(x) * (1 + scale_mlp) + shift_mlp)


class FinalLayer(keras.layers.Layer):
    """Modulated normalisation and a projection that starts at zero."""

    def __init__(self, hidden_size: int, out_dim: int):
        super().__init__(dtype=floatx())
        self.linear = zeros(hidden_size, out_dim)
        self.adaLN_modulation = [silu, zeros(hidden_size, 2 * hidden_size)]

    def call(self, x: Array, t: Array) -> Array:
        """Maps x [B,H,D], t [B,D] to [B,H,O]."""
        return self.modulated(x, split_rows(sequential(self.adaLN_modulation, t), 2))

    def modulated(self, x: Array, parts: Sequence[Array]) -> Array:
        """Maps x [B,H,D] and two times [B or 1,1,D] to [B,H,O]."""
        shift, scale = parts
        return self.linear(normal(x) * (1 + scale) + shift)


class DiT1d(Network):
    """A transformer over H states.

    Args:
        in_dim: O.
        emb_dim: E, a multiple of 8.
        d_model, n_heads, depth: D, heads, blocks.
        standard_residual: see `DiTBlock`.
    """

    def __init__(
        self, in_dim: int, emb_dim: int, d_model: int, n_heads: int, depth: int, standard_residual: bool = False
    ):
        super().__init__(dtype=floatx())
        self.d_model = d_model
        self.map_noise = FourierEmbedding(emb_dim)
        self.x_proj = xavier(Linear(in_dim, d_model))
        self.map_emb = [
            normal_linear(emb_dim, d_model, EMBEDDING_STD),
            mish,
            normal_linear(d_model, d_model, EMBEDDING_STD),
            mish,
        ]
        self.blocks = [DiTBlock(d_model, n_heads, standard_residual) for _ in range(depth)]
        self.final_layer = FinalLayer(d_model, in_dim)

    def call(self, x: Array, t: Array, condition: Array | None = None) -> Array:
        """Maps x [B,H,O], t [B] in [0, 1], condition [B,E] (None: zeros) to [B,H,O]."""
        return self.estimate(x, split_rows(self.modulation(t, condition), self.parts))

    def modulation(self, t: Array, condition: Array | None = None) -> Array:
        """Returns what time [B] and condition [B,E] do to the layers: shifts, scales and gates, [B,parts D]."""
        embedded = self.map_noise(t)
        embedded = sequential(self.map_emb, embedded if condition is None else embedded + condition)
        layers: list[DiTBlock | FinalLayer] = [*self.blocks, self.final_layer]
        return tf.concat([sequential(layer.adaLN_modulation, embedded) for layer in layers], axis=-1)

    @property
    def parts(self) -> int:
        return 6 * len(self.blocks) + 2

    def estimate(self, x: Array, parts: Sequence[Array], states: slice | None = None) -> Array:
        """Maps x [B,H,O] and the modulation's parts, each [B or 1,1,D] to [B,states,O]; None: of all states.

        The last block computes only the states that are asked for.
        """
        x = self.x_proj(x) + tf.constant(position_table(x.shape[1], self.d_model, x.dtype.name))
        for number, block in enumerate(self.blocks):
            last = number + 1 == len(self.blocks)
            x = block.modulated(x, parts[6 * number : 6 * number + 6], states if last else None)
        return self.final_layer.modulated(x, parts[-2:])


class Perceptron(keras.layers.Layer):
    """Linear layers with LeakyReLU (slope 0.01) between them."""

    def __init__(self, dims: Sequence[int]):
        super().__init__(dtype=floatx())
        hidden = [[Linear(a, b), leaky_relu] for a, b in zip(dims[:-2], dims[1:-1], strict=True)]
        self.mlp: list[Any] = [*hidden, Linear(*dims[-2:])]
        self._linears = [layer for layer, _ in hidden]  # Keras saves no layers of lists in lists

    def call(self, x: Array) -> Array:
        """Maps x [...,in] to [...,out]."""
        for hidden in self.mlp[:-1]:
            x = sequential(hidden, x)
        return self.mlp[-1](x)


def leaky_relu(x: Array) -> Array:
    """Returns max(x, x / 100), [...]"""
    return tf.maximum(x, 0.01 * x)


class ReturnCondition(keras.layers.Layer):
    """Embeds the return that is wanted of a plan; samples may be left without, which trains the unconditional model.

    Args:
        in_dim, out_dim, hidden_dims: of the perceptron.
        dropout: share of samples that training leaves without.
    """

    def __init__(self, in_dim: int, out_dim: int, hidden_dims: Sequence[int], dropout: float = 0.25):
        super().__init__(dtype=floatx())
        self.dropout = dropout
        self.mlp = Perceptron([in_dim, *hidden_dims, out_dim])

    def keep(self, uniform: Array) -> Array:
        """Returns which samples keep their condition, [B] of 0 and 1, by draws [B] in [0, 1)."""
        return tf.cast(uniform > self.dropout, uniform.dtype)

    def call(self, condition: Array, keep: Array | None = None) -> Array:
        """Maps condition [B,in], keep [B] (None: all) to [B,out]."""
        embedded = self.mlp(condition)
        return embedded if keep is None else embedded * keep[:, None]


class ConditionalDiT(Network):
    """The network of one level: transformer and return embedding. Arguments: `DiT1d`."""

    def __init__(self, in_dim: int, emb_dim: int, **transformer: Any):
        super().__init__(dtype=floatx())
        self.diffusion = DiT1d(in_dim, emb_dim, **transformer)
        self.condition = ReturnCondition(1, emb_dim, [emb_dim])

    def call(
        self,
        x: Array,
        t: Array,
        condition: Array | None = None,
        keep: Array | None = None,
        states: slice | None = None,
    ) -> Array:
        """Maps x [B,H,O], t [B], condition [B,1] or None, keep [B] to [B,states,O]; None: of all states."""
        wanted = None if condition is None else self.condition(condition, keep)
        network = self.diffusion
        return network.estimate(x, split_rows(network.modulation(t, wanted), network.parts), states)
