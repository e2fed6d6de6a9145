"""Convolutions in blocks of any size are TensorFlow's own, in float64, values and gradients."""

import numpy as np
import pytest
import tensorflow as tf

from diffusion_rl.core.noise import NoiseSource
from diffusion_rl.networks import convolution

SAME = 1e-12
BLOCKS = (1, 4, 1000)  # outputs of a product


def values_and_gradients(function, x, kernel):
    with tf.GradientTape() as tape:
        tape.watch([x, kernel])
        y = function(x, kernel)
        total = tf.reduce_sum(tf.sin(y))
    return [y, *tape.gradient(total, [x, kernel])]


def assert_same(ours, theirs, x, kernel):
    for one, other in zip(*(values_and_gradients(f, x, kernel) for f in (ours, theirs)), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=SAME)


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize(("k", "stride", "padding"), [(5, 1, 2), (3, 2, 1), (1, 1, 0)])
@pytest.mark.parametrize("length", [2, 4, 7, 16])
def test_convolution(monkeypatch, block, k, stride, padding, length):
    monkeypatch.setattr(convolution, "BLOCK", block)
    draw = NoiseSource(length)
    x, kernel = (tf.constant(draw.normal(shape, np.float64)) for shape in ((3, length, 6), (k, 6, 5)))
    assert_same(
        lambda x, w: convolution.convolve(x, w, stride, padding),
        lambda x, w: tf.nn.conv1d(tf.pad(x, [[0, 0], [padding, padding], [0, 0]]), w, stride, "VALID"),
        x,
        kernel,
    )


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("length", [2, 4, 7, 16])
def test_transposed_convolution(monkeypatch, block, length):
    monkeypatch.setattr(convolution, "BLOCK", block)
    draw, k, stride, padding = NoiseSource(length), 4, 2, 1
    x, kernel = (tf.constant(draw.normal(shape, np.float64)) for shape in ((3, length, 6), (k, 5, 6)))

    def whole(x, w):
        full = tf.nn.conv1d_transpose(x, w, [3, (length - 1) * stride + k, 5], stride, "VALID")
        return full[:, padding:-padding]

    assert_same(lambda x, w: convolution.convolve_transposed(x, w, stride, padding), whole, x, kernel)
