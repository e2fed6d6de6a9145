"""One-dimensional convolutions with PyTorch's padding, as matrix products, and group normalisation.

Shape letters: B batch, T time steps in, U time steps out, I channels in, D channels out, k kernel size. Time comes
before channels, [B,T,I].

TensorFlow's own convolutions of one dimension are slow on CPUs, backwards above all. Here a few neighbouring outputs at
a time are one product with the banded matrix that the kernel stands for: of a short signal all of them, [T*I, U*D].
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow as tf

from diffusion_rl.core.errors import UserError
from diffusion_rl.core.keras import floatx, keras
from diffusion_rl.core.noise import init_noise
from diffusion_rl.networks.layers import Array

BLOCK = 4  # outputs of one product: more are fewer products, of matrices with more zeros in them


def taps(n_in: int, n_out: int, kernel_size: int, stride: int, padding: int) -> np.ndarray:
    """[T,U]: the tap j of the kernel that leads from input t to output u, t = u * stride + j - p; k where none does."""
    t, u = np.ogrid[:n_in, :n_out]
    j = t - u * stride + padding
    return np.where((j >= 0) & (j < kernel_size), j, kernel_size)


Bands = list[tuple[int, int, Array]]  # first and last input of a few outputs, and the matrix between them
_shared: list[dict[tuple[int, int], tuple[Any, Bands]]] = []  # by kernel, which is kept alive, and length


@contextlib.contextmanager
def shared_matrices() -> Iterator[None]:
    """Inside this block a kernel's matrices are made once: those made before a loop are not made again in it.

    For use where weights do not change, and in one graph (or eagerly) only.
    """
    _shared.append({})
    try:
        yield
    finally:
        _shared.pop()


def bands(kernel: Array, tap: np.ndarray) -> Bands:
    """The matrices of the kernel's shifts, [k,I,D] and [T,U] of `taps`, for `BLOCK` outputs each."""
    (n_out, k, inputs, outputs), found = (tap.shape[1], *kernel.shape), []
    blocks = [*tf.unstack(kernel), tf.zeros([inputs, outputs], kernel.dtype)]
    for first in range(0, n_out, BLOCK):
        columns = tap[:, first : first + BLOCK]
        used = np.flatnonzero((columns < k).any(axis=1))
        start, stop = (used[0], used[-1] + 1) if len(used) else (0, 1)  # none: outputs that see only padding
        matrix = tf.concat([tf.concat([blocks[j] for j in row], axis=1) for row in columns[start:stop]], axis=0)
        found.append((start, stop, matrix))
    return found


def banded_product(x: Array, kernel: Array, tap: np.ndarray, owner: Any = None) -> Array:
    """Convolution as products with the matrix of the kernel's shifts.

    Args:
        x: [B,T,I];  kernel: [k,I,D].
        tap: [T,U] of `taps`.
        owner: the variable that the kernel is from, under which `shared_matrices` keeps its matrices.

    Returns:
        [B,U,D]
    """
    (n_in, n_out), (_, inputs, outputs) = tap.shape, kernel.shape
    if _shared and owner is not None:
        known, key = _shared[-1], (id(owner), n_in)
        if key not in known:
            known[key] = owner, bands(kernel, tap)
        found = known[key][1]
    else:
        found = bands(kernel, tap)
    rows = tf.reshape(x, [-1, n_in * inputs])
    products = [tf.matmul(rows[:, start * inputs : stop * inputs], matrix) for start, stop, matrix in found]
    return tf.reshape(tf.concat(products, axis=1), [-1, n_out, outputs])


def convolve(x: Array, kernel: Array, stride: int = 1, padding: int = 0) -> Array:
    """y[u] = sum_j x[u * stride + j - padding] @ kernel[j], with zeros outside of x (torch's Conv1d without bias).

    x [B,T,I], kernel [k,I,D] -> [B,U,D] with U = (T + 2 padding - k) // stride + 1.
    """
    n_in, (k, inputs, outputs) = x.shape[1], kernel.shape
    if k == 1 and stride == 1 and padding == 0:
        return tf.reshape(tf.matmul(tf.reshape(x, [-1, inputs]), kernel[0]), [-1, n_in, outputs])
    n_out = (n_in + 2 * padding - k) // stride + 1
    return banded_product(x, kernel, taps(n_in, n_out, k, stride, padding), kernel)


def convolve_transposed(x: Array, kernel: Array, stride: int, padding: int) -> Array:
    """y[t * stride + j - padding] += x[t] @ kernel[j]^T (torch's ConvTranspose1d without bias).

    x [B,T,I], kernel [k,D,I] -> [B,U,D] with U = (T - 1) stride + k - 2 padding.
    """
    n_in, k = x.shape[1], kernel.shape[0]
    n_out = (n_in - 1) * stride + k - 2 * padding
    return banded_product(x, tf.transpose(kernel, [0, 2, 1]), taps(n_out, n_in, k, stride, padding).T, kernel)


class Conv1d(keras.layers.Layer):
    """torch's Conv1d on [B,T,I]: kernel [k,I,D], bias [D], both uniform in +-1/sqrt(k I) at first."""

    def __init__(
        self, in_dim: int, out_dim: int, kernel_size: int, stride: int = 1, padding: int = 0, has_bias: bool = True
    ):
        super().__init__(dtype=floatx())
        self.stride, self.padding = stride, padding
        bound = 1.0 / math.sqrt(in_dim * kernel_size)
        self.kernel = tf.Variable(
            init_noise().uniform((kernel_size, in_dim, out_dim), -bound, bound, dtype=floatx()), name="kernel"
        )
        self.has_bias = has_bias
        if has_bias:
            self.bias = tf.Variable(init_noise().uniform((out_dim,), -bound, bound, dtype=floatx()), name="bias")

    def call(self, x: Array) -> Array:
        y = convolve(x, self.kernel, self.stride, self.padding)
        return y + self.bias if self.has_bias else y


class ConvTranspose1d(keras.layers.Layer):
    """torch's ConvTranspose1d on [B,T,I]: kernel [k,D,I], bias [D], both uniform in +-1/sqrt(k D) at first."""

    def __init__(self, in_dim: int, out_dim: int, kernel_size: int, stride: int, padding: int = 0):
        super().__init__(dtype=floatx())
        if kernel_size % stride:
            raise UserError(
                f"kernel_size={kernel_size} of a transposed convolution must be a multiple of stride={stride}"
            )
        self.stride, self.padding = stride, padding
        bound = 1.0 / math.sqrt(out_dim * kernel_size)
        self.kernel = tf.Variable(
            init_noise().uniform((kernel_size, out_dim, in_dim), -bound, bound, dtype=floatx()), name="kernel"
        )
        self.bias = tf.Variable(init_noise().uniform((out_dim,), -bound, bound, dtype=floatx()), name="bias")

    def call(self, x: Array) -> Array:
        return convolve_transposed(x, self.kernel, self.stride, self.padding) + self.bias


class GroupNorm(keras.layers.Layer):
    """Normalisation of each group of neighbouring channels over time and the group (Wu & He 2018), on [B,T,C]."""

    def __init__(self, groups: int, dim: int, epsilon: float = 1e-5):
        super().__init__(dtype=floatx())
        if dim % groups:
            raise UserError(f"n_groups={groups} does not divide {dim} channels: choose a divisor of dim * dim_mults")
        self.groups, self.epsilon = groups, epsilon
        self.gamma = tf.Variable(np.ones(dim, floatx()), name="gamma")
        self.beta = tf.Variable(np.zeros(dim, floatx()), name="beta")

    def call(self, x: Array) -> Array:
        steps, channels = x.shape[1:]
        grouped = tf.reshape(x, [-1, steps, self.groups, channels // self.groups])
        mean, variance = tf.nn.moments(grouped, axes=[1, 3], keepdims=True)
        normal = (grouped - mean) * tf.math.rsqrt(variance + tf.constant(self.epsilon, x.dtype))
        return tf.reshape(normal, [-1, steps, channels]) * self.gamma + self.beta
