"""Rung 1: layers, schedules, learning rates, reward scaling, on drawn sizes and options."""

from __future__ import annotations

import math

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given
from hypothesis import strategies as st

from diffusion_rl.core.lr_schedules import CosineWarmupRestarts
from diffusion_rl.core.reward_scaling import RunningRewardScaler
from diffusion_rl.diffusion.schedules import ddim_schedule, ddpm_schedule
from diffusion_rl.networks.layers import sinusoidal_embedding
from parity_tests import drawn
from parity_tests.replay.compare import Comparison

torch = pytest.importorskip("torch")

from parity_tests.reference import networks  # noqa: E402
from parity_tests.reference.diffusion import ddim_tables, ddpm_tables  # noqa: E402

PRECISIONS = ("float32", "float64")


@given(half=st.integers(2, 40), seed=drawn.seeds)
def test_sinusoidal_embedding(half, seed):
    t = drawn.Draws(seed).integers(100, 7)
    for dtype in PRECISIONS:
        theirs = networks.sinusoidal(torch.from_numpy(t), 2 * half, getattr(torch, dtype))
        ours = sinusoidal_embedding(t, 2 * half, dtype)
        # float32: the angle itself, up to 100, is only known to 100 * 2^-24
        gate = 1e-5 if dtype == "float32" else None
        Comparison("sinusoidal embedding, drawn", 1, dtype).check("embedding", ours, theirs, gate=gate)


@given(name=drawn.activations, seed=drawn.seeds)
def test_activations(name, seed):
    from diffusion_rl.networks.layers import activation

    for dtype in PRECISIONS:
        x = drawn.Draws(seed, dtype).normal(200, scale=8.0)
        theirs = networks.ACTIVATIONS[name](torch.from_numpy(x))
        Comparison("activations, drawn", 1, dtype).check(name, activation(name)(tf.constant(x)), theirs)


@given(steps=st.integers(1, 200), share=st.integers(1, 10))
def test_noise_schedules(steps, share):
    ours, theirs = ddpm_schedule(steps), ddpm_tables(steps)
    comparison = Comparison("schedules, drawn", 1, "float32")
    for name in ("betas", "alphas"):
        np.testing.assert_allclose(getattr(ours, name), theirs[name], rtol=2e-7)
    for name, table in theirs.items():
        comparison.check(name, getattr(ours, name), table)
    ddim_steps = max(1, steps // share)
    ours, theirs = ddim_schedule(ours, ddim_steps), ddim_tables(theirs, ddim_steps)
    for name, table in theirs.items():
        comparison.check(name, getattr(ours, name), table)


@given(
    first=st.integers(2, 15),
    data=st.data(),
    gamma=st.sampled_from([1.0, 0.7]),
    mult=st.sampled_from([1.0, 1.5, 2.0]),
)
def test_learning_rate_is_the_formula(first, data, gamma, mult):
    """Cosine from top to bottom after a linear warm-up; cycle c is `mult` times as long and `gamma` times as high."""
    warmup = data.draw(st.integers(0, first - 1))
    schedule = CosineWarmupRestarts(first, mult, 1e-2, 1e-4, warmup, gamma)
    assert schedule.lr == 1e-4  # stands at the bottom until the first step
    expected, length, top = [], first, 1e-2
    while len(expected) < 40:
        for k in range(length):
            rise = k / warmup if k < warmup else None
            fall = (1 + math.cos(math.pi * (k - warmup) / (length - warmup))) / 2
            expected.append(1e-4 + (top - 1e-4) * (fall if rise is None else rise))
        length, top = int((length - warmup) * mult) + warmup, top * gamma
    rates = [schedule.step() for _ in range(39)]
    np.testing.assert_allclose(rates, expected[1:40], rtol=1e-12)


@given(envs=st.integers(1, 4), steps=st.integers(2, 8), seed=drawn.seeds, gamma=st.sampled_from([0.99, 0.5]))
def test_reward_scaling_from_scratch(envs, steps, seed, gamma):
    """Two calls against a direct computation over everything seen, joined by the same merging formula."""
    draws = drawn.Draws(seed)
    scaler = RunningRewardScaler(envs, gamma=gamma, cliprew=2.0)
    count, mean, var, running = 1e-4, 0.0, 1.0, np.zeros(envs)
    for _ in range(2):
        reward, first = draws.normal(envs, steps), (draws.normal(envs, steps) > 0.8).astype(float)
        sums = []
        for t in range(steps):
            running = reward[:, t] + gamma * running * (first[:, t] == 0)
            sums.append(running)
        new = np.stack(sums)
        total, shift = count + new.size, new.mean() - mean
        spread = var * count + new.var() * new.size + shift**2 * count * new.size / total
        mean, var, count = mean + shift * new.size / total, spread / (total - 1), total
        expected = np.clip(reward / np.sqrt(var + 1e-8), -2.0, 2.0)
        Comparison("reward scaling, drawn", 1, "float64").check("scaled", scaler(reward, first), expected)
