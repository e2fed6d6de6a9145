"""Rung 5: one or a few optimizer steps, clipping and moving averages, against torch's own."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given
from hypothesis import strategies as st

from diffusion_rl.core.ema import ema_update
from diffusion_rl.core.optimizers import AdamW, clip_by_global_norm
from parity_tests import drawn
from parity_tests.replay.compare import Comparison

torch = pytest.importorskip("torch")

shapes = st.lists(st.lists(st.integers(1, 5), min_size=1, max_size=3), min_size=1, max_size=4)


@given(
    shapes,
    st.sampled_from([1e-4, 1e-2, 1.0]),
    st.sampled_from([0.0, 1e-2, 0.5]),
    st.sampled_from([None, 0.1, 5.0, 1e3]),
    st.sampled_from([1e-8, 1e-3]),
    st.booleans(),
    drawn.seeds,
)
def test_steps_of_adamw(shapes, lr, decay, max_norm, eps, decoupled, seed):
    """Weights, both moments and the norm before clipping, over steps with changing rates and missing gradients."""
    draws = drawn.Draws(seed)
    initial = [draws.normal(*shape) for shape in shapes]
    ours = [tf.Variable(value) for value in initial]
    theirs = [torch.nn.Parameter(torch.from_numpy(value.copy())) for value in initial]
    optimizer = AdamW(ours, lr, decay, eps=eps, decoupled=decoupled)
    twin = (torch.optim.AdamW if decoupled else torch.optim.Adam)(theirs, lr=lr, weight_decay=decay, eps=eps)
    comparison = Comparison("AdamW, drawn", 5, "float64")
    for step in range(5):
        grads = [draws.normal(*shape, scale=10.0 ** draws.integers(5).item() / 100) for shape in shapes]
        # torch counts steps per tensor, ours in all: a tensor without gradient from the start never moves in either
        missing = len(shapes) > 1 and seed % 2 == 0
        present = [None if missing and i == 0 else tf.constant(g) for i, g in enumerate(grads)]
        for parameter, grad in zip(theirs, present, strict=True):
            parameter.grad = None if grad is None else torch.from_numpy(grad.numpy())
        if max_norm is not None:
            present, norm = clip_by_global_norm(present, max_norm)
            comparison.check("norm", norm, torch.nn.utils.clip_grad_norm_(theirs, max_norm))
        rate = lr * (1 + step)
        optimizer.learning_rate.assign(rate)
        twin.param_groups[0]["lr"] = rate
        optimizer.apply(present)
        twin.step()
    for i, (one, other) in enumerate(zip(ours, theirs, strict=True)):
        comparison.check("weights", one.numpy(), other.detach())
        moments = twin.state[other]
        if moments:
            comparison.check("exp_avg", optimizer.exp_avg[i].numpy(), moments["exp_avg"])
            comparison.check("exp_avg_sq", optimizer.exp_avg_sq[i].numpy(), moments["exp_avg_sq"])
        else:
            assert np.array_equal(one.numpy(), initial[i])


@given(st.sampled_from([0.0, 0.9, 0.995, 1.0]), drawn.seeds)
def test_moving_average(decay, seed):
    """(1 - d) sum_k d^k x_{n-k} + d^n x_0, as that sum."""
    values = drawn.Draws(seed).normal(9, 4)
    average = values[0]
    for value in values[1:]:
        average = ema_update(average, value, decay)
    weights = np.array([(1 - decay) * decay**k for k in range(8)][::-1])
    expected = weights @ values[1:] + decay**8 * values[0]
    Comparison("EMA, drawn", 5, "float64").check("average", average, expected)
