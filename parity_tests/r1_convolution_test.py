"""Rung 1: convolutions and group normalisation on drawn sizes, values and gradients, short and long signals."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given
from hypothesis import strategies as st

from diffusion_rl.core.errors import UserError
from diffusion_rl.core.keras import precision
from diffusion_rl.networks.convolution import ConvTranspose1d, GroupNorm, convolve, convolve_transposed
from parity_tests import drawn
from parity_tests.replay.compare import Comparison

torch = pytest.importorskip("torch")

DTYPES = ("float32", "float64")
LENGTHS = st.sampled_from([1, 2, 3, 4, 5, 7, 8, 11, 16, 33])


def check(case: str, dtype: str, ours: Any, theirs: Any, inputs: list[np.ndarray]) -> None:
    """Compare f(inputs), and the gradients of sum(f * weights) for fixed weights."""
    tensors = [tf.constant(a) for a in inputs]
    with tf.GradientTape() as tape:
        tape.watch(tensors)
        out = ours(*tensors)
        weights = np.cos(np.arange(out.numpy().size)).reshape(out.shape).astype(dtype)
        total = tf.reduce_sum(out * weights)
    leaves = [torch.from_numpy(a).requires_grad_() for a in inputs]
    expected = theirs(*leaves)
    comparison = Comparison(case, 1, dtype)
    comparison.check("output", out, expected.detach(), scale=max(1.0, float(expected.detach().abs().max())))
    grads = torch.autograd.grad((expected * torch.from_numpy(weights)).sum(), leaves)
    for i, (mine, other) in enumerate(zip(tape.gradient(total, tensors), grads, strict=True)):
        scale = max(1.0, float(other.abs().max()))
        comparison.check(f"gradient {i}", mine, other, rung=4, scale=scale)


def channels_first(function: Any) -> Any:
    """Of a function of torch's, for [T,B,C]."""
    return lambda x, *rest: function(x.permute(1, 2, 0), *rest).permute(2, 0, 1)


@given(st.data(), LENGTHS, drawn.seeds)
def test_convolution_is_torchs(data, length, seed):
    k, stride = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 3))
    padding = data.draw(st.integers(max(0, (k - length + 1) // 2), k))
    channels = data.draw(st.tuples(st.integers(1, 4), st.integers(1, 4)))
    for dtype in DTYPES:
        rng = np.random.default_rng(seed)
        x = rng.standard_normal((length, 3, channels[0])).astype(dtype)
        kernel = rng.standard_normal((k, *channels)).astype(dtype)
        check(
            "convolution, drawn",
            dtype,
            lambda x, w: convolve(x, w, stride, padding),
            channels_first(
                lambda x, w: torch.nn.functional.conv1d(x, w.permute(2, 1, 0).contiguous(), None, stride, padding)
            ),
            [x, kernel],
        )


@given(st.data(), LENGTHS, drawn.seeds)
def test_transposed_convolution_is_torchs(data, length, seed):
    stride = data.draw(st.integers(1, 3))
    k = stride * data.draw(st.integers(1, 2))
    padding = data.draw(st.integers(0, (k - 1) // 2))
    channels = data.draw(st.tuples(st.integers(1, 4), st.integers(1, 4)))
    for dtype in DTYPES:
        rng = np.random.default_rng(seed)
        x = rng.standard_normal((length, 3, channels[1])).astype(dtype)
        kernel = rng.standard_normal((k, *channels)).astype(dtype)
        check(
            "transposed convolution, drawn",
            dtype,
            lambda x, w: convolve_transposed(x, w, stride, padding),
            channels_first(
                lambda x, w: torch.nn.functional.conv_transpose1d(
                    x, w.permute(2, 1, 0).contiguous(), None, stride, padding
                )
            ),
            [x, kernel],
        )


@given(st.sampled_from([(1, 3), (2, 4), (4, 4), (3, 6)]), st.integers(2, 6), drawn.seeds)
def test_group_normalisation_is_torchs(shape, length, seed):
    groups, channels = shape
    for dtype in DTYPES:
        with precision(dtype):
            layer = GroupNorm(groups, channels, 1e-4)
        x = np.random.default_rng(seed).standard_normal((length, 3, channels)).astype(dtype)
        check(
            "group normalisation, drawn",
            dtype,
            layer,
            channels_first(lambda x: torch.nn.functional.group_norm(x, groups, eps=1e-4)),
            [x],
        )


def test_impossible_sizes_are_refused():
    with pytest.raises(UserError, match="does not divide"):
        GroupNorm(3, 8)
    with pytest.raises(UserError, match="multiple of stride"):
        ConvTranspose1d(2, 2, 3, 2)
