"""Transformer policies: a decoder over the positions of a chunk that attends to the embedded observation history.

Shape letters: B batch, To observation history, O observation, H horizon, A action, M modes, E embedding, N heads.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from diffusion_rl.core.errors import UserError
from diffusion_rl.core.keras import floatx, keras
from diffusion_rl.core.noise import init_rng
from diffusion_rl.core.typing import Array
from diffusion_rl.networks.layers import LayerNorm, Linear, activation, dropped, flatten_state, sequential, variables_of
from diffusion_rl.networks.spread import SpreadOwner

_ACTIVATIONS = {"gelu": "GELU", "relu": "ReLU"}
INIT_STD = 0.02


class SelfAttention(keras.layers.Layer):
    """Multi-head attention of a sequence to itself (Vaswani et al. 2017, eq. 1), without a mask.

    One projection gives queries, keys and values, in this order; heads are neighbouring channels.

    Args:
        linear: makes both projections from their widths.
    """

    def __init__(self, dim: int, heads: int, linear: Callable[[int, int], Linear] = Linear):
        super().__init__(dtype=floatx())
        self.heads, self.head_dim = heads, dim // heads
        self.in_proj, self.out_proj = linear(dim, 3 * dim), linear(dim, dim)

    def call(self, x: Array, asking: slice | None = None, keep: Array | None = None, rate: float = 0.0) -> Array:
        """Maps [B,H,E] to [B,H,E]; of all positions or those that ask; `keep` [B,N,H,H]: dropout's mask of the
        weights."""
        steps, dim = x.shape[1:]
        if asking is None:
            queries, keys, values = (self._heads(part) for part in tf.split(self.in_proj(x), 3, axis=-1))
        else:
            queries = self._heads(self._project(x[:, asking], 0, dim))
            keys, values = (self._heads(part) for part in tf.split(self._project(x, dim, 3 * dim), 2, axis=-1))
            steps = len(range(*asking.indices(steps)))
        weights = tf.nn.softmax(tf.matmul(queries, keys, transpose_b=True) / math.sqrt(self.head_dim))
        mixed = tf.transpose(tf.matmul(dropped(weights, keep, rate), values), [0, 2, 1, 3])
        return self.out_proj(tf.reshape(mixed, [-1, steps, dim]))

    def _heads(self, x: Array) -> Array:
        """Maps [B,H,E] to [B,heads,H,E/heads]."""
        return tf.transpose(tf.reshape(x, [-1, x.shape[1], self.heads, self.head_dim]), [0, 2, 1, 3])

    def _project(self, x: Array, first: int, last: int) -> Array:
        """Applies some of the columns of `in_proj` alone."""
        rows = tf.matmul(tf.reshape(x, [-1, x.shape[-1]]), self.in_proj.kernel[:, first:last])
        return tf.reshape(rows + self.in_proj.bias[first:last], [-1, x.shape[1], last - first])


class AttentionToOne(keras.layers.Layer):
    """Attention to a memory of a single entry: whatever the query, that entry's value.

    Queries and keys therefore need not be computed; their weights are there for the reference's state_dict (and get
    no gradient there either, the softmax over one entry being constant).
    """

    def __init__(self, dim: int, heads: int):
        super().__init__(dtype=floatx())
        self.dim, self.heads = dim, heads
        self.in_proj, self.out_proj = Linear(dim, 3 * dim), Linear(dim, dim)

    def call(self, memory: Array, keep: Array | None = None, rate: float = 0.0) -> Array:
        """Maps [B,E] to [B,1,E], for all positions; [B,H,E] with `keep` [B,N,H,1], dropout's mask of the weights."""
        values = tf.matmul(memory, self.in_proj.kernel[:, 2 * self.dim :]) + self.in_proj.bias[2 * self.dim :]
        values = values[:, None]
        if keep is not None:
            by_head = tf.reshape(values, [-1, 1, self.heads, self.dim // self.heads])
            by_head = dropped(by_head, tf.transpose(keep, [0, 2, 1, 3]), rate)
            values = tf.reshape(by_head, [-1, keep.shape[2], self.dim])
        return self.out_proj(values)


class DecoderLayer(keras.layers.Layer):
    """Self-attention, attention to the memory, feed-forward network of width 4 E; each normalised before and added.

    Args:
        dropout: rate of the attentions' weights, of what each of the three adds, and inside the feed-forward network.
    """

    def __init__(self, dim: int, heads: int, activation_type: str, dropout: float):
        super().__init__(dtype=floatx())
        self.dim, self.heads, self.dropout = dim, heads, dropout
        self.self_attn, self.multihead_attn = SelfAttention(dim, heads), AttentionToOne(dim, heads)
        self.linear1, self.linear2 = Linear(dim, 4 * dim), Linear(4 * dim, dim)
        self.norm1, self.norm2, self.norm3 = LayerNorm(dim), LayerNorm(dim), LayerNorm(dim)
        self.activate = activation(activation_type)

    def masks_shapes(self, batch: int, steps: int) -> list[tuple[int, ...]]:
        """Returns the shapes of dropout's masks in the order of use; none without dropout."""
        added, heads = (batch, steps, self.dim), (batch, self.heads, steps)
        shapes = [(*heads, steps), added, (*heads, 1), added, (batch, steps, 4 * self.dim), added]
        return shapes if self.dropout else []

    def call(self, x: Array, memory: Array, masks: Iterable[Array] = ()) -> Array:
        """Maps x [B,H,E] (or [1,H,E], the same for all), memory [B,E] to [B,H,E]; `masks` see `masks_shapes`."""
        rate, keep = self.dropout, tuple(masks) or (None,) * 6
        x = x + dropped(self.self_attn(self.norm1(x), keep=keep[0], rate=rate), keep[1], rate)
        # What norm2 gives is only queried with, so its gradient is zero; zero, not missing: weight decay acts on it.
        idle = 0 * (self.norm2.gamma + self.norm2.beta)
        x = x + dropped(self.multihead_attn(memory, keep[2], rate), keep[3], rate) + idle
        hidden = dropped(self.activate(self.linear1(self.norm3(x))), keep[4], rate)
        return x + dropped(self.linear2(hidden), keep[5], rate)


class Decoder(keras.layers.Layer):
    """A stack of decoder layers."""

    def __init__(self, dim: int, heads: int, n_layers: int, activation_type: str, dropout: float):
        super().__init__(dtype=floatx())
        self.layers = [DecoderLayer(dim, heads, activation_type, dropout) for _ in range(n_layers)]

    def call(self, x: Array, memory: Array, masks: Iterator[Array]) -> Array:
        """Maps x [B or 1,H,E], memory [B,E], dropout's masks of all layers to [B,H,E]."""
        for layer in self.layers:
            x = layer(x, memory, itertools.islice(masks, len(layer.masks_shapes(1, 1))))
        return x


class Transformer(keras.layers.Layer):
    """From one observation vector to an output for every step of the chunk.

    The observation (its history flattened) is embedded and goes through a small MLP: the memory. The decoder's input
    is nothing but the position embeddings, and every position sees every other.

    Args:
        output_dim: outputs of each step.
        horizon: H.
        cond_dim: To * O.
        n_layer, n_head, n_emb: layers, heads and E.
        p_drop_emb: rate of dropout on the embedded observation and on the position embeddings.
        p_drop_attn: rate inside the decoder, see `DecoderLayer`.
        activation_type: "gelu" or "relu".
    """

    def __init__(
        self,
        output_dim: int,
        horizon: int,
        cond_dim: int,
        n_layer: int = 12,
        n_head: int = 12,
        n_emb: int = 768,
        p_drop_emb: float = 0.0,
        p_drop_attn: float = 0.0,
        activation_type: str = "gelu",
    ):
        super().__init__(dtype=floatx())
        if not 0 <= p_drop_emb < 1 or not 0 <= p_drop_attn < 1:
            raise UserError(f"p_drop_emb={p_drop_emb}, p_drop_attn={p_drop_attn}: take rates from 0 to below 1")
        if n_emb % n_head:
            raise UserError(f"transformer_embed_dim={n_emb} must be a multiple of transformer_num_heads={n_head}")
        if activation_type not in _ACTIVATIONS:
            raise UserError(f"transformer_activation={activation_type!r}: choose one of {', '.join(_ACTIVATIONS)}")
        self.cond_obs_emb = Linear(cond_dim, n_emb)
        self.encoder: list[Any] = [Linear(n_emb, 4 * n_emb), activation("Mish"), Linear(4 * n_emb, n_emb)]
        self.decoder = Decoder(n_emb, n_head, n_layer, _ACTIVATIONS[activation_type], p_drop_attn)
        self.horizon, self.embed_dim, self.p_drop_emb, self.p_drop_attn = horizon, n_emb, p_drop_emb, p_drop_attn
        self.ln_f, self.head = LayerNorm(n_emb), Linear(n_emb, output_dim)
        self.cond_pos_emb = tf.Variable(np.zeros((1, 1, n_emb), floatx()), name="cond_pos_emb")
        self.pos_emb = tf.Variable(np.zeros((1, horizon, n_emb), floatx()), name="pos_emb")
        self._initialise()

    def _initialise(self) -> None:
        """Draws weights and positions from N(0, 0.02^2); offsets are 0, gains 1."""
        for variable in variables_of(self):
            if variable.name.startswith("bias"):
                variable.assign(tf.zeros_like(variable))
            elif not variable.name.startswith(("gamma", "beta")):
                variable.assign(INIT_STD * init_rng().normal(variable.shape, floatx()))

    def masks_shapes(self, batch: int) -> list[tuple[int, ...]]:
        """Returns the shapes of the 0/1 dropout masks that training draws, in the order of use: of the embedded
        observation, of the positions, of each layer of the decoder; none at a rate of 0."""
        embedded = [(batch, 1, self.embed_dim), (batch, self.horizon, self.embed_dim)] if self.p_drop_emb else []
        return embedded + [s for layer in self.decoder.layers for s in layer.masks_shapes(batch, self.horizon)]

    @property
    def dropout(self) -> tuple[float, ...]:
        """Returns the rate of each mask."""
        count, embedded = len(self.masks_shapes(1)), 2 if self.p_drop_emb else 0
        return (self.p_drop_emb,) * embedded + (self.p_drop_attn,) * (count - embedded)

    def call(self, state: Array, keep_masks: Sequence[Array] = ()) -> tuple[Array, Array]:
        """Maps [B,To*O] to outputs [B,H,output_dim] and what the head sees of them [B,H,E].

        `keep_masks`: see `masks_shapes`; none in evaluation.
        """
        masks, rate = iter(keep_masks), self.p_drop_emb
        of_memory, of_positions = (next(masks, None) if rate else None for _ in range(2))
        memory = (self.cond_obs_emb(state) + self.cond_pos_emb[0])[:, None]
        memory = sequential(self.encoder, dropped(memory, of_memory, rate)[:, 0])
        positions = dropped(tf.convert_to_tensor(self.pos_emb), of_positions, rate)
        features = self.ln_f(self.decoder(positions, memory, masks))
        return self.head(features), features


class GaussianTransformer(SpreadOwner):
    """Mean (squashed by tanh) and standard deviation of an action chunk.

    Args:
        action_dim, horizon_steps: A and H.
        cond_dim: width of the flattened observation history, To * O.
        transformer_*: see `Transformer`.
        modes: M, for the mixture below.
        **spread: of `SpreadOwner.init_spread`; predicted standard deviations are clamped to their range.
    """

    ALSO_TAKES = (SpreadOwner.init_spread,)

    def __init__(
        self,
        action_dim: int,
        horizon_steps: int,
        cond_dim: int,
        transformer_embed_dim: int = 256,
        transformer_num_heads: int = 8,
        transformer_num_layers: int = 6,
        transformer_activation: str = "gelu",
        p_drop_emb: float = 0.0,
        p_drop_attn: float = 0.0,
        modes: int = 1,
        **spread: Any,
    ):
        super().__init__(dtype=floatx())
        self.action_dim, self.horizon_steps, self.cond_dim = action_dim, horizon_steps, cond_dim
        self.init_spread(modes * action_dim, **spread)
        self.transformer = Transformer(
            modes * action_dim * (2 if self.fixed_std is None else 1),
            horizon_steps,
            cond_dim,
            n_layer=transformer_num_layers,
            n_head=transformer_num_heads,
            n_emb=transformer_embed_dim,
            p_drop_emb=p_drop_emb,
            p_drop_attn=p_drop_attn,
            activation_type=transformer_activation,
        )

    def masks_shapes(self, batch: int) -> list[tuple[int, ...]]:
        """Returns the shapes of the 0/1 dropout masks that training draws, see `Transformer`."""
        return self.transformer.masks_shapes(batch)

    @property
    def dropout(self) -> tuple[float, ...]:
        """Returns the rate of each mask."""
        return self.transformer.dropout

    def call(self, cond: dict[str, Array], keep_masks: Sequence[Array] = ()) -> tuple[Array, ...]:
        """Maps {"state": [B,To,O]} to mean, standard deviation, both [B,H*A], step by step.

        `keep_masks`: see `masks_shapes`; none in evaluation.
        """
        out, _ = self.transformer(flatten_state(cond), keep_masks)
        return self._mean_std(out, [self.horizon_steps * self.action_dim])

    def _mean_std(self, out: Array, shape: Sequence[int]) -> tuple[Array, Array]:
        """Returns outputs of each step [B,H,...], brought into the given shape, as mean and standard deviation."""
        halves = tf.split(out, 2, axis=-1) if self.fixed_std is None else [out]
        mean, *logvar = (self._arranged(half, shape) for half in halves)
        mean = tf.tanh(mean)
        return mean, self.clamped_std(logvar[0]) if logvar else self.constant_std(mean, self.horizon_steps)

    def _arranged(self, half: Array, shape: Sequence[int]) -> Array:
        return tf.reshape(half, [-1, *shape])


class GMMTransformer(GaussianTransformer):
    """Means, standard deviations and weights of a Gaussian mixture over an action chunk.

    (In the reference a predicted standard deviation crashes here; it works the way the others do.)

    Args:
        num_modes: M; the rest as in `GaussianTransformer`, a learned fixed standard deviation for each mode.
    """

    def __init__(
        self,
        action_dim: int,
        horizon_steps: int,
        cond_dim: int,
        num_modes: int = 5,
        transformer_embed_dim: int = 256,
        **kwargs: Any,
    ):
        super().__init__(action_dim, horizon_steps, cond_dim, transformer_embed_dim, modes=num_modes, **kwargs)
        self.num_modes = num_modes
        self.modes_head = Linear(horizon_steps * transformer_embed_dim, num_modes)

    def call(self, cond: dict[str, Array], keep_masks: Sequence[Array] = ()) -> tuple[Array, Array, Array]:
        """Maps {"state": [B,To,O]} to means and standard deviations [B,M,H*A], step by step, and logits [B,M].

        `keep_masks`: see `masks_shapes`; none in evaluation.
        """
        out, features = self.transformer(flatten_state(cond), keep_masks)
        mean, std = self._mean_std(out, [self.num_modes, self.horizon_steps * self.action_dim])
        return mean, std, self.modes_head(tf.reshape(features, [-1, features.shape[1] * features.shape[2]]))

    def _arranged(self, half: Array, shape: Sequence[int]) -> Array:
        by_step = tf.reshape(half, [-1, self.horizon_steps, self.num_modes, self.action_dim])
        return tf.reshape(tf.transpose(by_step, [0, 2, 1, 3]), [-1, *shape])
