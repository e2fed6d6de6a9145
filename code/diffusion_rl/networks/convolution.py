"""One-dimensional convolutions with PyTorch's padding, as matrix products, and group normalisation.

Shape letters: T time steps in, U time steps out, B batch, I channels in, D channels out, k kernel size. Time comes
first, [T,B,C]: a shift in time is then a slice of memory, and what is per row and channel broadcasts.

TensorFlow's own convolutions of one dimension are slow on CPUs. The plain form here is one product with the shifted
inputs side by side. The fast one needs 7 or 8 products for every 4 outputs of a kernel of 5 instead of 20: convolution
is multiplication of polynomials, which can be made from their values at a few points (Toom 1963, Cook 1966; Winograd
1980). Values at points, and back, are small constant matrices over time.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from diffusion_rl.core.errors import UserError
from diffusion_rl.core.keras import floatx, keras
from diffusion_rl.core.typing import Array
from diffusion_rl.networks.layers import uniform_variable

TILE = 4  # outputs that share products: more need more points, which costs precision
POINTS = (0.0, 1.0, -1.0, 2.0, -2.0, 0.5, -0.5)  # and infinity, always the last one
FAST_KERNELS = (3, 5)

_plain: list[bool] = []


class _Kept(NamedTuple):
    """Transformed kernels by kernel (which is kept alive) and plan, and the graph that they are made in."""

    graph: Any
    kernels: dict[tuple[int, int], tuple[Any, Array]]


_shared: list[_Kept] = []


@contextlib.contextmanager
def shared_matrices() -> Iterator[None]:
    """Transforms a kernel only once inside this block: before the loops that begin in the block, not in their rounds.

    For use where weights do not change, and in one graph (or eagerly) only.
    """
    _shared.append(_Kept(None if tf.executing_eagerly() else tf.compat.v1.get_default_graph(), {}))
    try:
        yield
    finally:
        _shared.pop()


@contextlib.contextmanager
def plain_convolutions() -> Iterator[None]:
    """Makes all convolutions plain inside this block: for comparisons in float32.

    The fast ones' rounding is about five times as large, which networks whose groups are single numbers magnify.
    """
    _plain.append(True)
    try:
        yield
    finally:
        _plain.pop()


def convolve(x: Array, kernel: Array, stride: int = 1, padding: int = 0) -> Array:
    """Computes y[u] = sum_j x[u * stride + j - padding] @ kernel[j], with zeros outside of x (torch's Conv1d without
    bias).

    x [T,B,I], kernel [k,I,D] -> [U,B,D] with U = (T + 2 padding - k) // stride + 1.
    """
    length = x.shape[0]

    @tf.custom_gradient  # the automatic one copies slices
    def product(x: Array, kernel: Array) -> tuple[Array, Any]:
        windows = _windows(x, kernel.shape[0], stride, padding)
        matrix = tf.reshape(kernel, [-1, kernel.shape[2]])

        def gradient(upstream: Array) -> tuple[Array, Array]:
            by_kernel = tf.matmul(_rows(windows), _rows(upstream), transpose_a=True)
            return _scattered(upstream, kernel, stride, padding, length), tf.reshape(by_kernel, kernel.shape)

        return _by_time(tf.matmul(_rows(windows), matrix), windows.shape[0]), gradient

    return product(x, tf.convert_to_tensor(kernel))


def convolve_transposed(x: Array, kernel: Array, stride: int, padding: int) -> Array:
    """Computes y[t * stride + j - padding] += x[t] @ kernel[j]^T (torch's ConvTranspose1d without bias).

    x [T,B,I], kernel [k,D,I] -> [U,B,D] with U = (T - 1) stride + k - 2 padding.
    """
    length = (x.shape[0] - 1) * stride + kernel.shape[0] - 2 * padding

    @tf.custom_gradient
    def product(x: Array, kernel: Array) -> tuple[Array, Any]:
        def gradient(upstream: Array) -> tuple[Array, Array]:
            windows = _windows(upstream, kernel.shape[0], stride, padding)
            by_kernel = tf.matmul(_rows(windows), _rows(x), transpose_a=True)
            return convolve(upstream, kernel, stride, padding), tf.reshape(by_kernel, kernel.shape)

        return _scattered(x, kernel, stride, padding, length), gradient

    return product(x, tf.convert_to_tensor(kernel))


def _rows(x: Array) -> Array:
    """Maps [T,B,C] to [T*B,C]."""
    return tf.reshape(x, [-1, x.shape[2]])


def _by_time(rows: Array, length: int) -> Array:
    """Maps [T*B,C] to [T,B,C]."""
    return tf.reshape(rows, [length, -1, rows.shape[1]])


def _windows(x: Array, k: int, stride: int, padding: int) -> Array:
    """Returns what each output sees, its k inputs side by side: [T,B,I] -> [U,B,k*I]."""
    n_in, channels = x.shape[0], x.shape[2]
    n_out = (n_in + 2 * padding - k) // stride + 1
    per_phase = n_out + (k - 1) // stride  # inputs of every phase of the stride
    padded = tf.pad(x, [[padding, max(per_phase * stride - n_in - padding, 0)], [0, 0], [0, 0]])[: per_phase * stride]
    phases = tf.unstack(tf.reshape(padded, [per_phase, stride, -1, channels]), axis=1) if stride > 1 else [padded]
    return tf.concat([phases[j % stride][j // stride :][:n_out] for j in range(k)], axis=-1)


def _scattered(x: Array, kernel: Array, stride: int, padding: int, length: int) -> Array:
    """Returns the transposed convolution, `length` outputs of it: y[t * stride + j - padding] += x[t] @ kernel[j]^T.

    x [T,B,I], kernel [k,D,I] -> [length,B,D]. The kernel is not transposed: that would take longer than the products.
    """
    n, (k, outputs, _) = x.shape[0], kernel.shape
    products = tf.unstack(tf.reshape(tf.matmul(_rows(x)[None], kernel, transpose_b=True), [k, n, -1, outputs]))
    per_phase = -(-length // stride)  # outputs of every phase of the stride
    phases: list[list[Array]] = [[] for _ in range(stride)]
    for j, product in enumerate(products):
        shift, phase = divmod(j - padding, stride)
        first, end = max(-shift, 0), min(per_phase - shift, n)
        if first < end:
            phases[phase].append(tf.pad(product[first:end], [[first + shift, per_phase - end - shift], [0, 0], [0, 0]]))
    nothing = tf.zeros([per_phase, tf.shape(x)[1], outputs], x.dtype)  # what no tap reaches
    sums = [functools.reduce(tf.add, parts) if parts else nothing for parts in phases]
    if stride == 1:
        return sums[0]
    return tf.reshape(tf.stack(sums, axis=1), [per_phase * stride, -1, outputs])[:length]


class Toom(NamedTuple):
    """A convolution of stride 1 that keeps the length T, as P products for each of N groups of outputs.

    y = out @ ((into @ x) * (points @ kernel)), where * is a matrix product over the channels at each point.
    """

    into: np.ndarray  # [P*N,T]
    out: np.ndarray  # [T,P*N]
    points: np.ndarray  # [P,k]


def _powers(n: int, count: int) -> np.ndarray:
    """Returns [count,n]: x^0 … x^(n-1) at count - 1 points; at infinity the last of them alone."""
    return np.vstack([np.power.outer(np.array(POINTS[: count - 1]), np.arange(n)), np.eye(n)[-1]])


@functools.cache
def toom(length: int, k: int) -> Toom:
    """Returns the matrices for T = length and an odd kernel.

    sum_u a_u y_u = sum_{u,j} a_u g_j x_{u+j} is the product of the polynomials a and g, weighted by x: it is made from
    values of a and g at points, with the inverse of the powers applied to x. Where the whole signal is one group, the
    inputs are the short polynomial instead, and the kernel is what the product is weighted by.
    """
    reach = (k - 1) // 2
    if length <= TILE and 2 * length - 1 <= TILE + k - 1:
        count = 2 * length - 1
        diagonals = np.arange(count) - (length - 1) + reach  # taps of the kernel, some of them outside of it
        weights = np.linalg.inv(_powers(count, count)).T
        points = np.zeros((count, k))
        inside = (diagonals >= 0) & (diagonals < k)
        points[:, diagonals[inside]] = weights[:, inside]
        return Toom(_powers(length, count), _powers(length, count)[:, ::-1].T, points)
    count, groups = TILE + k - 1, -(-length // TILE)
    window, back = np.linalg.inv(_powers(count, count)).T, _powers(TILE, count)
    into, out = np.zeros((count, groups, length)), np.zeros((length, count, groups))
    for group in range(groups):
        first = group * TILE
        for i in range(count):
            if 0 <= (t := first + i - reach) < length:
                into[:, group, t] = window[:, i]
        for u in range(min(TILE, length - first)):
            out[first + u, :, group] = back[:, u]
    return Toom(into.reshape(-1, length), out.reshape(length, -1), _powers(k, count))


def convolve_fast(x: Array, kernel: Array, owner: Any = None) -> Array:
    """Computes `convolve` with stride 1 and padding that keeps the length, in fewer products; equal but for rounding.

    Args:
        x: [T,B,I];  kernel: [k,I,D], k odd.
        owner: what `shared_matrices` keeps the transformed kernel under.
    """
    n, (k, inputs, outputs) = x.shape[0], kernel.shape
    plan = toom(n, k)
    count = len(plan.points)
    into, out = tf.constant(plan.into, x.dtype), tf.constant(plan.out, x.dtype)
    kept = _shared[-1] if _shared and owner is not None else _Kept(None, {})
    key = id(owner), count
    if key not in kept.kernels:
        with kept.graph.as_default() if kept.graph else contextlib.nullcontext():
            at_points = tf.matmul(tf.constant(plan.points, x.dtype), tf.reshape(kernel, [k, inputs * outputs]))
            kept.kernels[key] = owner, tf.reshape(at_points, [count, inputs, outputs])
    values = tf.reshape(tf.matmul(into, tf.reshape(x, [n, -1])), [count, -1, inputs])
    products = tf.reshape(tf.matmul(values, kept.kernels[key][1]), [out.shape[1], -1])
    return tf.reshape(tf.matmul(out, products), [n, -1, outputs])


class Conv1d(keras.layers.Layer):
    """torch's Conv1d on [T,B,I]: kernel [k,I,D], bias [D], both uniform in +-1/sqrt(k I) at first."""

    def __init__(
        self, in_dim: int, out_dim: int, kernel_size: int, stride: int = 1, padding: int = 0, has_bias: bool = True
    ):
        super().__init__(dtype=floatx())
        self.stride, self.padding = stride, padding
        self.fast = kernel_size in FAST_KERNELS and stride == 1 and 2 * padding == kernel_size - 1
        bound = 1.0 / math.sqrt(in_dim * kernel_size)
        self.kernel = uniform_variable((kernel_size, in_dim, out_dim), bound, "kernel")
        self.has_bias = has_bias
        if has_bias:
            self.bias = uniform_variable((out_dim,), bound, "bias")

    def call(self, x: Array) -> Array:
        """Maps x [T,B,I] to [T',B,D], T' = (T + 2 padding - k) // stride + 1."""
        if self.kernel.shape[0] == self.stride == 1 and not self.padding:
            y = _by_time(tf.matmul(_rows(x), tf.reshape(self.kernel, self.kernel.shape[1:])), x.shape[0])
        elif self.fast and not _plain:
            y = convolve_fast(x, self.kernel, self.kernel)
        else:
            y = convolve(x, self.kernel, self.stride, self.padding)
        return y + self.bias if self.has_bias else y


class ConvTranspose1d(keras.layers.Layer):
    """torch's ConvTranspose1d on [T,B,I]: kernel [k,D,I], bias [D], both uniform in +-1/sqrt(k D) at first."""

    def __init__(self, in_dim: int, out_dim: int, kernel_size: int, stride: int, padding: int = 0):
        super().__init__(dtype=floatx())
        if kernel_size % stride:
            raise UserError(
                f"kernel_size={kernel_size} of a transposed convolution must be a multiple of stride={stride}"
            )
        self.stride, self.padding = stride, padding
        bound = 1.0 / math.sqrt(out_dim * kernel_size)
        self.kernel = uniform_variable((kernel_size, out_dim, in_dim), bound, "kernel")
        self.bias = uniform_variable((out_dim,), bound, "bias")

    def call(self, x: Array) -> Array:
        """Maps x [T,B,I] to [T',B,D], T' = (T - 1) stride - 2 padding + k."""
        return convolve_transposed(x, self.kernel, self.stride, self.padding) + self.bias


class GroupNorm(keras.layers.Layer):
    """Normalisation of each group of neighbouring channels over time and the group (Wu & He 2018), on [T,B,C]."""

    def __init__(self, groups: int, dim: int, epsilon: float = 1e-5):
        super().__init__(dtype=floatx())
        if dim % groups:
            raise UserError(f"n_groups={groups} does not divide {dim} channels: choose a divisor of dim * dim_mults")
        self.groups, self.epsilon = groups, epsilon
        self.gamma = tf.Variable(np.ones(dim, floatx()), name="gamma")
        self.beta = tf.Variable(np.zeros(dim, floatx()), name="beta")

    def call(self, x: Array) -> Array:
        """Maps x [T,B,C] to [T,B,C]."""
        steps, channels = x.shape[0], x.shape[2]
        member = tf.constant(np.kron(np.eye(self.groups), np.ones((channels // self.groups, 1))), x.dtype)  # [C,groups]

        def mean(sums: Array) -> Array:
            """Averages over time and group, for every channel: sums over time [B,C] -> [B,C]."""
            return tf.matmul(tf.matmul(sums, member) * (self.groups / (steps * channels)), member, transpose_b=True)

        @tf.custom_gradient
        def normalise(x: Array, gamma: Array, beta: Array) -> tuple[Array, Any]:
            centred = x - mean(tf.reduce_sum(x, axis=0))
            spread = tf.math.rsqrt(mean(tf.reduce_sum(tf.square(centred), axis=0)) + self.epsilon)  # [B,C]
            scale = spread * gamma

            def gradient(upstream: Array) -> tuple[Array, Array, Array]:
                # Of the sums that the automatic derivative makes only those over time are of full size.
                total, along = tf.reduce_sum(upstream, axis=0), tf.reduce_sum(upstream * centred, axis=0)
                offset, slope = spread * mean(total * gamma), spread**3 * mean(along * gamma)
                own = scale * upstream - slope * centred - offset
                return own, tf.reduce_sum(along * spread, axis=0), tf.reduce_sum(total, axis=0)

            return centred * scale + beta, gradient

        return normalise(x, tf.convert_to_tensor(self.gamma), tf.convert_to_tensor(self.beta))
