"""DiffuserLite's transformer, flow loss, sampling and reflow beside PyTorch twins; the twins on recordings."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusion_rl.core.keras import precision
from diffusion_rl.core.noise import NoiseSource, initial_weights
from diffusion_rl.diffusion.rectified_flow import time_grid
from diffusion_rl.methods.diffuser_lite.levels import PlanLevel
from diffusion_rl.methods.diffuser_lite.trainer import LevelTrainer
from diffusion_rl.networks.dit import ConditionalDiT
from diffusion_rl.networks.layers import copy_weights, variables_of
from parity_tests.replay import case
from parity_tests.replay.compare import Comparison
from parity_tests.replay.files import GOLDENS, Golden

torch = pytest.importorskip("torch")

from parity_tests.drawn import Draws, torch_weights  # noqa: E402
from parity_tests.reference import lite as twin  # noqa: E402

B, E = 3, 16
RATE, DECAY = 2e-4, 1e-5


@pytest.mark.parametrize(("dtype", "suffix"), [("float32", ""), ("float64", "64")])
def test_the_twin_gives_what_was_recorded(dtype, suffix):
    golden = Golden.load(GOLDENS / "dl_dit_d16_cond1.npz")
    weights = {k: torch.from_numpy(v.astype(dtype)) for k, v in golden.weights.items()}
    x, t, condition = (torch.from_numpy(golden.arrays["in/" + k].astype(dtype)) for k in ("x", "noise", "condition"))
    found = twin.dit(weights, x, t, condition, golden.meta["spec"]["kwargs"]["n_heads"])
    Comparison(golden.name, 2, dtype).check("out", found, golden.group("out" + suffix)["out"])


@st.composite
def levels(draw):
    """Our float64 level with drawn weights, its heads, and draws."""
    seed, heads, states, width = (draw(st.integers(*range_)) for range_ in ((0, 2**31), (1, 3), (3, 6), (1, 4)))
    source = NoiseSource(seed)
    with precision("float64"), initial_weights(source):
        network = ConditionalDiT(width, E, d_model=8 * heads, n_heads=heads, depth=draw(st.integers(1, 2)))
        for variable in variables_of(network):
            if variable.trainable:
                variable.assign_add(0.2 * source.normal(variable.shape, dtype=np.float64))
        level = PlanLevel(network, states, width, draw(st.booleans()), draw(st.sampled_from([1.0, 10.0])))
    return level, heads, Draws(seed)


def tables(level):
    return (torch.from_numpy(each.astype(np.float64)) for each in (level.mask, level.weights))


@settings(max_examples=6)
@given(levels(), st.booleans())
def test_loss_and_its_gradients(drawn, conditional):
    level, heads, draws = drawn
    x0, x1 = draws.normal(B, *level.shape), draws.normal(B, *level.shape)
    t, keep = np.linspace(0.1, 0.9, B), np.array([1.0, 0.0, 1.0])
    condition = draws.normal(B, 1) if conditional else None
    with tf.GradientTape() as tape:
        ours = level.loss(*map(tf.constant, (x0, x1, t)), None if condition is None else tf.constant(condition), keep)
    weights = torch_weights(level.network)
    told = None if condition is None else torch.from_numpy(condition)
    mask, by_entry = tables(level)
    theirs = twin.loss(
        weights, *map(torch.from_numpy, (x0, x1, t)), told, torch.from_numpy(keep), mask, by_entry, heads
    )
    comparison = Comparison("DiffuserLite's loss beside its twin", 3, "float64")
    comparison.check("loss", ours, theirs.detach())
    named = {k: v for k, v in weights.items() if not k.endswith("freqs") and (conditional or "condition" not in k)}
    found = torch.autograd.grad(theirs, list(named.values()))
    grads = {name: grad.numpy() for name, grad in zip(named, found, strict=True)}
    scale = max(float(np.abs(grad).max()) for grad in grads.values())
    own = case.torch_gradients(level.network, tape, ours)
    comparison.check_all(own, grads, "grad ", rung=4, scale=scale)


@settings(max_examples=6)
@given(levels(), st.integers(1, 4), st.sampled_from([0.0, 0.9, 1.0, 5.0]))
def test_samples(drawn, steps, guidance):
    level, heads, draws = drawn
    copy_weights(level.network, level.ema)
    noise, known, told = draws.normal(B, *level.shape), draws.normal(B, *level.shape), draws.normal(B, 1)
    ours = level.sample(*map(tf.constant, (noise, known)), time_grid(steps), tf.constant(told), guidance)
    mask, _ = tables(level)
    inputs = map(torch.from_numpy, (noise, known))
    with torch.no_grad():
        theirs = twin.sample(torch_weights(level.ema), *inputs, mask, steps, torch.from_numpy(told), guidance, heads)
    comparison = Comparison("DiffuserLite's samples beside their twin", 3, "float64")
    comparison.check("grid", time_grid(steps), np.array(twin.grid(steps)))
    comparison.check("x", ours, theirs)


@settings(max_examples=3)
@given(levels())
def test_updates_of_a_reflow(drawn):
    """Pairs are given, every second update is unconditional: torch then leaves the embedding alone, its count too."""
    level, heads, draws = drawn
    level.network.condition.dropout = 0.0
    weights = {k: torch.nn.Parameter(v, not k.endswith("freqs")) for k, v in torch_weights(level.network).items()}
    optimizer = torch.optim.AdamW([w for w in weights.values() if w.requires_grad], lr=RATE, weight_decay=DECAY)
    trainer, (mask, by_entry) = LevelTrainer(level, RATE, 0.99), tables(level)
    comparison, keep = Comparison("DiffuserLite's reflow beside its twin", 6, "float64"), np.ones(B)
    for i in range(6):
        x0, x1, t = draws.normal(B, *level.shape), draws.normal(B, *level.shape), np.linspace(0.1, 0.9, B)
        told = draws.normal(B, 1) if i % 2 else None
        condition = None if told is None else tf.constant(told)
        ours, _ = trainer.update(
            *map(tf.constant, (x0, x1, t)), condition, tf.constant(keep), tf.constant(RATE, tf.float64)
        )
        theirs = twin.loss(
            weights,
            *map(torch.from_numpy, (x0, x1, t)),
            None if told is None else torch.from_numpy(told),
            torch.from_numpy(keep),
            mask,
            by_entry,
            heads,
        )
        optimizer.zero_grad()
        theirs.backward()
        optimizer.step()
        comparison.check(f"loss {i}", ours, theirs.detach())
