"""Rung 4: the gradient of every tensor, relative to the model's largest; what is frozen is frozen in both."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given
from hypothesis import strategies as st

from parity_tests import drawn
from parity_tests.replay.case import torch_gradients
from parity_tests.replay.compare import Comparison

torch = pytest.importorskip("torch")

as_torch = torch.from_numpy


def compare_gradients(name: str, ours: dict, weights: dict, total) -> None:
    """Every tensor of the twin against ours; a tensor that got no gradient there must have none here."""
    names = list(weights)
    theirs = torch.autograd.grad(total, [weights[n] for n in names], allow_unused=True)
    largest = max(float(g.abs().max()) for g in theirs if g is not None)
    comparison = Comparison(name, 4, "float64")
    for parameter, gradient in zip(names, theirs, strict=True):
        if gradient is None:
            assert not np.any(ours[parameter]), f"{parameter} is frozen in the twin and has a gradient in ours"
        else:
            comparison.check(parameter, ours[parameter], gradient, scale=max(largest, 1e-12), quantity="gradients")


@given(drawn.policies(drawn.PRETRAINED), drawn.seeds, st.integers(1, 5))
def test_pretraining(policy, seed, batch):
    specification, size = policy
    model, draws = drawn.build_drawn(specification, seed, "float64"), drawn.Draws(seed)
    twin = drawn.twin_of(model, specification)
    x, state, noise = draws.chunk(size, batch), draws.state(size, batch), draws.chunk(size, batch)
    t = draws.integers(model.denoising_steps, batch)
    with tf.GradientTape() as tape:
        loss = model.loss(tf.constant(x), {"state": state}, t, tf.constant(noise))
    ours = torch_gradients(model, tape, loss)
    total = twin.supervised_loss(*map(as_torch, (x, state, t, noise)))
    compare_gradients("pre-training, drawn", ours, twin.weights, total)


@given(drawn.policies(), drawn.seeds, st.integers(3, 9), st.integers(1, 6), st.booleans())
def test_ppo(policy, seed, batch, reward_horizon, use_bc):
    specification, size = policy
    model, draws = drawn.build_drawn(specification, seed, "float64"), drawn.Draws(seed)
    twin = drawn.twin_of(model, specification)
    for name, tensor in twin.weights.items():  # the reference freezes the base network, and eta unless it is learned
        if name.startswith(("network.", "actor.")) or (name.startswith("eta.") and not model.learn_eta):
            tensor.requires_grad_(False)
    trained = {n: w for n, w in twin.weights.items() if w.requires_grad}
    arguments = drawn.ppo_batch(model, draws, size, batch)
    noise = draws.chunk(size, model.sampling_steps + 1, batch) if use_bc else None
    parts = twin.ppo_loss(
        *map(as_torch, arguments.values()), reward_horizon, None if noise is None else as_torch(noise)
    )
    total = parts["pg_loss"] + 0.1 * parts["entropy_loss"] + 0.5 * parts["v_loss"] + 0.2 * parts["bc_loss"]
    arguments = {"obs": {"state": arguments.pop("state")}} | arguments
    with tf.GradientTape() as tape:
        ours = model.loss(**arguments, use_bc_loss=use_bc, reward_horizon=reward_horizon, bc_noise=noise)
        loss = ours["pg_loss"] + 0.1 * ours["entropy_loss"] + 0.5 * ours["v_loss"] + 0.2 * ours["bc_loss"]
    gradients = torch_gradients(model, tape, loss)
    compare_gradients("DPPO, drawn", gradients, trained, total)
    for name in twin.weights.keys() - trained.keys():
        assert not np.any(gradients[name]), f"{name} is frozen in the reference and has a gradient in ours"
