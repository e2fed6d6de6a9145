"""Convolutions are TensorFlow's own, in float64, values and gradients; the fast ones are the plain ones."""

import numpy as np
import pytest
import tensorflow as tf

from diffusion_rl.core.noise import NoiseSource
from diffusion_rl.networks import convolution

SAME = 1e-12


def values_and_gradients(function, x, kernel):
    with tf.GradientTape() as tape:
        tape.watch([x, kernel])
        y = function(x, kernel)
        total = tf.reduce_sum(tf.sin(y))
    return [y, *tape.gradient(total, [x, kernel])]


def assert_same(ours, theirs, x, kernel, atol=SAME):
    for one, other in zip(*(values_and_gradients(f, x, kernel) for f in (ours, theirs)), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=atol)


def drawn(length, kernel_shape, inputs, dtype=np.float64):
    draw = NoiseSource(length)
    return (tf.constant(draw.normal(shape, dtype)) for shape in ((length, 3, inputs), kernel_shape))


def batch_first(x):
    return tf.transpose(x, [1, 0, 2])


@pytest.mark.parametrize(("k", "stride", "padding"), [(5, 1, 2), (3, 2, 1), (1, 1, 0), (1, 2, 1)])
@pytest.mark.parametrize("length", [2, 4, 7, 16])
def test_convolution(k, stride, padding, length):
    def theirs(x, w):
        padded = tf.pad(batch_first(x), [[0, 0], [padding, padding], [0, 0]])
        return batch_first(tf.nn.conv1d(padded, w, stride, "VALID"))

    assert_same(lambda x, w: convolution.convolve(x, w, stride, padding), theirs, *drawn(length, (k, 6, 5), 6))


@pytest.mark.parametrize("length", [2, 4, 7, 16])
def test_transposed_convolution(length):
    k, stride, padding = 4, 2, 1

    def whole(x, w):
        full = tf.nn.conv1d_transpose(batch_first(x), w, [3, (length - 1) * stride + k, 5], stride, "VALID")
        return batch_first(full)[padding:-padding]

    ours = lambda x, w: convolution.convolve_transposed(x, w, stride, padding)  # noqa: E731
    assert_same(ours, whole, *drawn(length, (k, 5, 6), 6))


@pytest.mark.parametrize("k", convolution.FAST_KERNELS)
@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 6, 8, 13, 32])
def test_fewer_products_give_the_same(k, length):
    plain = lambda x, w: convolution.convolve(x, w, padding=k // 2)  # noqa: E731
    assert_same(convolution.convolve_fast, plain, *drawn(length, (k, 6, 5), 6), atol=1e-11)
    x, kernel = drawn(length, (k, 64, 32), 64, np.float32)
    expected = plain(x, kernel).numpy()
    np.testing.assert_allclose(convolution.convolve_fast(x, kernel), expected, rtol=0, atol=5e-6 * abs(expected).max())


@pytest.mark.parametrize(("length", "products"), [(1, 1), (2, 3), (4, 7), (8, 16), (32, 64)])
def test_number_of_products(length, products):
    assert len(convolution.toom(length, 5).into) == products  # 20 for 4 outputs where all are made


def test_a_transformed_kernel_is_made_once():
    x, kernel = drawn(8, (5, 6, 5), 6)
    with convolution.shared_matrices():
        first = convolution.convolve_fast(x, kernel, kernel)
        np.testing.assert_array_equal(convolution.convolve_fast(x, 0 * kernel, kernel), first)
