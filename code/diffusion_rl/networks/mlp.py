"""Multi-layer perceptrons and the diffusion MLP."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import numpy as np
import tensorflow as tf

from diffusion_rl.core.errors import UserError
from diffusion_rl.core.keras import floatx, keras
from diffusion_rl.core.precision import product
from diffusion_rl.core.typing import Array, Rng
from diffusion_rl.networks.layers import (
    LayerNorm,
    Linear,
    Network,
    TimeEmbedding,
    activation,
    dropped,
    flatten_state,
    sequential,
)

_folding: ContextVar[bool] = ContextVar("residual MLPs folded", default=False)


@contextmanager
def folding(folds: bool = True) -> Iterator[None]:
    """Lets residual MLPs compute their last block and the layer behind it as one (`networks.folded` says how) while a
    function is traced: equal but for rounding, in half the products where there is one block."""
    before = _folding.set(folds)
    try:
        yield
    finally:
        _folding.reset(before)


class MLPLayer(keras.layers.Layer):
    """Linear, then (optionally) LayerNorm, dropout, activation, in that order."""

    def __init__(self, in_dim: int, out_dim: int, activation_type: str, use_layernorm: bool, dropout: float):
        super().__init__(dtype=floatx())
        self.linear = Linear(in_dim, out_dim)
        if use_layernorm:
            self.norm = LayerNorm(out_dim)
        self.use_layernorm, self.dropout, self.activate = use_layernorm, dropout, activation(activation_type)

    def call(self, x: Array, keep: Array | None = None) -> Array:
        """Maps x [B,in] to [B,out]; `keep` [B,out] is dropout's 0/1 mask (none: evaluation)."""
        x = self.linear(x)
        if self.use_layernorm:
            x = self.norm(x)
        return self.activate(dropped(x, keep, self.dropout))


class MLP(keras.layers.Layer):
    """A plain multi-layer perceptron.

    Args:
        dim_list: dimensions from input to output.
        append_dim, append_layers: width of an extra input, and the layers at which it is concatenated.
        activation_type, out_activation_type: of the hidden layers and of the last one.
        use_layernorm, use_layernorm_final: LayerNorm in the hidden layers, and in the last as well.
        dropout, use_drop_final: the same for dropout.
    """

    def __init__(
        self,
        dim_list: Sequence[int],
        append_dim: int = 0,
        append_layers: Sequence[int] | None = None,
        activation_type: str = "Tanh",
        out_activation_type: str = "Identity",
        use_layernorm: bool = False,
        use_layernorm_final: bool = False,
        dropout: float = 0.0,
        use_drop_final: bool = False,
        verbose: bool = False,
    ):
        super().__init__(dtype=floatx())
        self.append_layers = tuple(append_layers or ()) if append_dim > 0 else ()
        last = len(dim_list) - 2
        self.layers = [
            MLPLayer(
                dim_list[i] + (append_dim if i in self.append_layers else 0),
                dim_list[i + 1],
                activation_type if i < last else out_activation_type,
                use_layernorm and (i < last or use_layernorm_final),
                dropout if i < last or use_drop_final else 0.0,
            )
            for i in range(last + 1)
        ]

    def masks_shapes(self, batch: int) -> list[tuple[int, int]]:
        """Returns the shapes of the 0/1 dropout masks that training draws, in the order of the layers."""
        return [(batch, layer.linear.kernel.shape[-1]) for layer in self.layers if layer.dropout]

    def call(self, x: Array, append: Array | None = None, keep_masks: Sequence[Array] = ()) -> Array:
        """Maps x [B,in] to [B,out]; `append` [B,append_dim]; `keep_masks` one dropout mask per layer that has
        dropout."""
        masks = iter(keep_masks)
        for i, layer in enumerate(self.layers):
            if append is not None and i in self.append_layers:
                x = tf.concat([x, append], axis=-1)
            x = layer(x, next(masks, None) if layer.dropout else None)
        return x


class ResidualBlock(keras.layers.Layer):
    """Pre-activation block: x + l2(act(norm2(l1(act(norm1(x))))))."""

    def __init__(self, dim: int, activation_type: str, use_layernorm: bool):
        super().__init__(dtype=floatx())
        self.l1, self.l2 = Linear(dim, dim), Linear(dim, dim)
        self.use_layernorm, self.activate = use_layernorm, activation(activation_type)
        if use_layernorm:
            self.norm1, self.norm2 = LayerNorm(dim, epsilon=1e-6), LayerNorm(dim, epsilon=1e-6)

    def call(self, x: Array) -> Array:
        """Maps x [...,dim] to [...,dim]."""
        return self.l2(self.hidden(x)) + x

    def hidden(self, x: Array) -> Array:
        """Maps x [...,dim] to what enters the second layer, [...,dim]."""
        h = self.norm1(x) if self.use_layernorm else x
        h = self.l1(self.activate(h))
        h = self.norm2(h) if self.use_layernorm else h
        return self.activate(h)


def behind(last: ResidualBlock, out: Linear) -> tuple[Array, Array]:
    """Returns kernel [W,out] and constant [out] of a last block's second layer and the output layer as one."""
    constant = tf.linalg.matvec(out.kernel, last.l2.bias, transpose_a=True) + out.bias
    return tf.matmul(last.l2.kernel, out.kernel), constant


def draw_masks(network: Any, rng: Rng, shape: Sequence[int]) -> np.ndarray:
    """Draws dropout's 0/1 masks for all layers [*shape, W]; W = 0 of networks without dropout."""
    widths = [math.prod(mask[1:]) for mask in _masks_shapes(network)]
    if not widths:
        return np.zeros((*shape, 0), floatx())
    rates = np.repeat(np.broadcast_to(network.dropout, len(widths)), widths)
    return (rng.uniform((*shape, sum(widths))) >= rates).astype(floatx())


def split_masks(network: Any, masks: Array | None) -> list[Array]:
    """Returns masks [B,W] as the network takes them, one for each layer; none if there are none."""
    shapes = [] if masks is None or not masks.shape[-1] else _masks_shapes(network)
    parts = tf.split(masks, [math.prod(shape[1:]) for shape in shapes], axis=-1) if shapes else []
    return [tf.reshape(part, [-1, *shape[1:]]) for part, shape in zip(parts, shapes, strict=True)]


def _masks_shapes(network: Any) -> list[tuple[int, ...]]:
    return network.masks_shapes(1) if getattr(network, "dropout", 0) else []


class ResidualMLP(keras.layers.Layer):
    """Linear, pre-activation residual blocks of two layers each, Linear.

    Only the first hidden dimension counts: it is the width throughout. The number of hidden layers after the first
    must be even. No nonlinearity follows the first Linear or precedes the last.
    """

    def __init__(
        self,
        dim_list: Sequence[int],
        activation_type: str = "Mish",
        out_activation_type: str = "Identity",
        use_layernorm: bool = False,
        use_layernorm_final: bool = False,
        dropout: float = 0.0,
    ):
        super().__init__(dtype=floatx())
        n_hidden = len(dim_list) - 3
        if n_hidden % 2:
            raise UserError(
                f"a residual MLP needs an odd number of hidden dims (blocks have two layers), got {dim_list[1:-1]}"
            )
        if dropout:
            raise UserError("a residual MLP has no dropout: set dropout to 0 or residual_style to false")
        width = dim_list[1]
        self.layers: list[Any] = [
            Linear(dim_list[0], width),
            *(ResidualBlock(width, activation_type, use_layernorm) for _ in range(max(n_hidden, 0) // 2)),
            Linear(width, dim_list[-1]),
        ]
        if use_layernorm_final:
            self.layers.append(LayerNorm(dim_list[-1]))
        self.activate_out = activation(out_activation_type)

    def call(self, x: Array) -> Array:
        """Maps x [...,in] to [...,out]."""
        return self.activate_out(self._folded(x) if self._folds(x) else sequential(self.layers, x))

    def _folds(self, x: Array) -> bool:
        """Returns whether one product of both kernels is cheaper than the rows' own with the first one."""
        *_, last, out = self.layers
        plain = isinstance(last, ResidualBlock) and last.l2.kernel.shape.rank == x.shape.rank == 2
        return plain and _folding.get() and (x.shape[0] is None or x.shape[0] > 2 * out.kernel.shape[1])

    def _folded(self, x: Array) -> Array:
        *first, last, out = self.layers
        x = sequential(first, x)
        together, shift = behind(last, out)
        return product(last.hidden(x), together) + product(x, out.kernel) + shift


class DiffusionMLP(Network):
    """Noise prediction from [action chunk, time embedding, observation] (DPPO, Ren et al. 2024, appendix).

    Args:
        action_dim, horizon_steps: A and H.
        cond_dim: width of the flattened observation history, To * O.
        time_dim: width of the time embedding.
        mlp_dims: hidden dimensions.
        cond_mlp_dims: if given, the observation first goes through an MLP of these dimensions.
    """

    def __init__(
        self,
        action_dim: int,
        horizon_steps: int,
        cond_dim: int,
        time_dim: int = 16,
        mlp_dims: Sequence[int] = (256, 256),
        cond_mlp_dims: Sequence[int] | None = None,
        activation_type: str = "Mish",
        out_activation_type: str = "Identity",
        use_layernorm: bool = False,
        residual_style: bool = False,
    ):
        super().__init__(dtype=floatx())
        self.action_dim, self.horizon_steps = action_dim, horizon_steps
        self.cond_dim, self.time_dim = cond_dim, time_dim
        self.time_embedding = TimeEmbedding(time_dim)
        if cond_mlp_dims is not None:
            self.cond_mlp = MLP([cond_dim, *cond_mlp_dims], activation_type=activation_type)
            cond_dim = cond_mlp_dims[-1]
        self.has_cond_mlp = cond_mlp_dims is not None
        output_dim = action_dim * horizon_steps
        self.mlp_mean = (ResidualMLP if residual_style else MLP)(
            [output_dim + time_dim + cond_dim, *mlp_dims, output_dim],
            activation_type=activation_type,
            out_activation_type=out_activation_type,
            use_layernorm=use_layernorm,
        )

    def call(self, x: Array, time: Array, cond: dict[str, Array]) -> Array:
        """Maps x [B,H,A], time [B] integers, cond {"state": [B,To,O]} to noise (or x0) [B,H,A]."""
        flat = tf.reshape(x, [-1, self.horizon_steps * self.action_dim])
        state = flatten_state(cond)
        if self.has_cond_mlp:
            state = self.cond_mlp(state)
        out = self.mlp_mean(tf.concat([flat, self.time_embedding(tf.reshape(time, [-1])), state], axis=-1))
        return tf.reshape(out, [-1, self.horizon_steps, self.action_dim])
