"""One-dimensional convolutions with PyTorch's padding, as matrix products, and group normalisation.

Shape letters: B batch, T time steps in, U time steps out, I channels in, D channels out, k kernel size. Time comes
before channels, [B,T,I].

TensorFlow's own convolutions are slow on CPUs, backwards above all. A short signal goes through one product with the
banded matrix [T*I, U*D] that the kernel stands for; a long one, where that matrix would be mostly zeros, through
products of shifted copies.
"""

from __future__ import annotations

import math

import numpy as np
import tensorflow as tf

from diffusion_rl.core.errors import UserError
from diffusion_rl.core.keras import floatx, keras
from diffusion_rl.core.noise import init_noise
from diffusion_rl.networks.layers import Array

BANDED_UP_TO = 3  # times the kernel size: longest signal for which the banded matrix wastes less than it saves


def taps(n_in: int, n_out: int, kernel_size: int, stride: int, padding: int) -> np.ndarray:
    """[n_in, n_out, k] of 0 and 1: which tap of the kernel leads from input t to output u: t = u * stride + j - p."""
    t, u, j = np.ogrid[:n_in, :n_out, :kernel_size]
    return t == u * stride + j - padding


def banded_product(x: Array, kernel: Array, where: np.ndarray) -> Array:
    """Convolution as a product with the matrix of all the kernel's shifts.

    Args:
        x: [B,T,I];  kernel: [k,I,D].
        where: [T,U,k] of 0 and 1, which tap leads from t to u.

    Returns:
        [B,U,D]
    """
    n_in, n_out, k = where.shape
    inputs, outputs = kernel.shape[1:]
    matrix = tf.matmul(where.reshape(-1, k).astype(kernel.dtype.as_numpy_dtype), tf.reshape(kernel, [k, -1]))
    matrix = tf.transpose(tf.reshape(matrix, [n_in, n_out, inputs, outputs]), [0, 2, 1, 3])
    rows = tf.reshape(x, [-1, n_in * inputs])
    return tf.reshape(tf.matmul(rows, tf.reshape(matrix, [n_in * inputs, n_out * outputs])), [-1, n_out, outputs])


def convolve(x: Array, kernel: Array, stride: int = 1, padding: int = 0) -> Array:
    """y[u] = sum_j x[u * stride + j - padding] @ kernel[j], with zeros outside of x (torch's Conv1d without bias).

    x [B,T,I], kernel [k,I,D] -> [B,U,D] with U = (T + 2 padding - k) // stride + 1.
    """
    n_in, (k, inputs, outputs) = x.shape[1], kernel.shape
    n_out = (n_in + 2 * padding - k) // stride + 1
    if k == 1 and stride == 1 and padding == 0:
        return tf.reshape(tf.matmul(tf.reshape(x, [-1, inputs]), kernel[0]), [-1, n_in, outputs])
    if n_in <= BANDED_UP_TO * k:
        return banded_product(x, kernel, taps(n_in, n_out, k, stride, padding))
    padded = tf.pad(x, [[0, 0], [padding, padding + stride - 1], [0, 0]])
    windows = tf.concat([padded[:, j : j + n_out * stride : stride] for j in range(k)], axis=-1)
    flat = tf.reshape(windows, [-1, k * inputs])
    return tf.reshape(tf.matmul(flat, tf.reshape(kernel, [k * inputs, outputs])), [-1, n_out, outputs])


def convolve_transposed(x: Array, kernel: Array, stride: int, padding: int) -> Array:
    """y[t * stride + j - padding] += x[t] @ kernel[j]^T (torch's ConvTranspose1d without bias).

    x [B,T,I], kernel [k,D,I] with k a multiple of the stride -> [B,U,D] with U = (T - 1) stride + k - 2 padding.
    """
    n_in, (k, outputs, inputs) = x.shape[1], kernel.shape
    n_out = (n_in - 1) * stride + k - 2 * padding
    if n_in <= BANDED_UP_TO * k:
        where = taps(n_out, n_in, k, stride, padding).transpose(1, 0, 2)
        return banded_product(x, tf.transpose(kernel, [0, 2, 1]), where)
    by_tap = tf.matmul(tf.reshape(x, [-1, inputs]), tf.reshape(kernel, [k * outputs, inputs]), transpose_b=True)
    by_tap = tf.reshape(by_tap, [-1, n_in, k, outputs])
    pieces, extra = [], k // stride - 1  # `stride` neighbouring taps fill one stretch of the output
    for i in range(k // stride):
        stretch = by_tap[:, :, i * stride : (i + 1) * stride]
        pieces.append(tf.pad(stretch, [[0, 0], [i, extra - i], [0, 0], [0, 0]]))
    whole = tf.reshape(tf.add_n(pieces), [-1, (n_in + extra) * stride, outputs])
    return whole[:, padding : padding + n_out]


class Conv1d(keras.layers.Layer):
    """torch's Conv1d on [B,T,I]: kernel [k,I,D], bias [D], both uniform in +-1/sqrt(k I) at first."""

    def __init__(self, in_dim: int, out_dim: int, kernel_size: int, stride: int = 1, padding: int = 0):
        super().__init__(dtype=floatx())
        self.stride, self.padding = stride, padding
        bound = 1.0 / math.sqrt(in_dim * kernel_size)
        self.kernel = tf.Variable(
            init_noise().uniform((kernel_size, in_dim, out_dim), -bound, bound, dtype=floatx()), name="kernel"
        )
        self.bias = tf.Variable(init_noise().uniform((out_dim,), -bound, bound, dtype=floatx()), name="bias")

    def call(self, x: Array) -> Array:
        return convolve(x, self.kernel, self.stride, self.padding) + self.bias


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
