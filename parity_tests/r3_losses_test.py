"""Rung 3: samplers, log-probabilities, losses and advantages on drawn options and the same noise."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffusion_rl.core.returns import gae
from parity_tests import drawn
from parity_tests.replay.compare import Comparison

torch = pytest.importorskip("torch")

as_torch = torch.from_numpy


@given(drawn.policies(drawn.PRETRAINED), drawn.seeds, st.integers(1, 5))
def test_pretrained_policy(policy, seed, batch):
    specification, size = policy
    model, draws = drawn.build_drawn(specification, seed, "float64"), drawn.Draws(seed)
    twin = drawn.twin_of(model, specification)
    state, x = draws.state(size, batch), draws.chunk(size, batch)
    comparison = Comparison("pre-trained policy, drawn", 3, "float64")
    noise = draws.chunk(size, model.sampling_steps + 1, batch)
    chunk, _ = twin.sample(as_torch(state), as_torch(noise), deterministic=True, evaluation=True)
    comparison.check("sample", model.sample({"state": state}, noise).trajectories, chunk.detach())
    t, noise = draws.integers(model.denoising_steps, batch), noise[0]
    theirs = twin.supervised_loss(*map(as_torch, (x, state, t, noise))).detach()
    comparison.check("loss", model.loss(x, {"state": state}, t, noise), theirs)


@given(drawn.policies(drawn.FINE_TUNED), drawn.seeds, st.integers(1, 4), st.booleans(), st.booleans())
def test_fine_tuned_policy(policy, seed, batch, deterministic, base):
    specification, size = policy
    model, draws = drawn.build_drawn(specification, seed, "float64"), drawn.Draws(seed)
    twin = drawn.twin_of(model, specification)
    state, noise = draws.state(size, batch), draws.chunk(size, model.sampling_steps + 1, batch)
    comparison = Comparison("fine-tuned policy, drawn", 3, "float64")
    sample = model.sample({"state": state}, noise, deterministic=deterministic, use_base_policy=base)
    chunk, chains = (v.detach() for v in twin.sample(as_torch(state), as_torch(noise), deterministic, base))
    comparison.check("sample", sample.trajectories, chunk)
    comparison.check("chains", sample.chains, chains)
    ours = model.log_probs({"state": state}, chains.numpy(), use_base_policy=base)
    theirs = twin.chain_log_probs(as_torch(state), chains, base)
    for name, one, other in zip(("log-probabilities", "eta"), ours, theirs, strict=True):
        comparison.check(name, one, other.detach())


@given(drawn.policies(), drawn.seeds, st.integers(3, 9), st.integers(1, 6), st.booleans())
def test_ppo_loss(policy, seed, batch, reward_horizon, use_bc):
    specification, size = policy
    model, draws = drawn.build_drawn(specification, seed, "float64"), drawn.Draws(seed)
    twin = drawn.twin_of(model, specification)
    arguments = drawn.ppo_batch(model, draws, size, batch)
    noise = draws.chunk(size, model.sampling_steps + 1, batch) if use_bc else None
    theirs = twin.ppo_loss(
        *map(as_torch, arguments.values()), reward_horizon, None if noise is None else as_torch(noise)
    )
    arguments = {"obs": {"state": arguments.pop("state")}} | arguments
    ours = model.loss(**arguments, use_bc_loss=use_bc, reward_horizon=reward_horizon, bc_noise=noise)
    comparison = Comparison("DPPO loss, drawn", 3, "float64")
    for name, value in theirs.items():
        comparison.check(name, ours[name], value.detach())


@given(
    st.integers(1, 9),
    st.integers(1, 4),
    st.sampled_from([0.99, 0.9, 1.0]),
    st.sampled_from([0.95, 0.0, 1.0]),
    st.sampled_from([1.0, 0.3]),
    drawn.seeds,
)
def test_generalized_advantages_are_the_sum_of_errors(steps, envs, gamma, lam, scale, seed):
    """A_t = sum_k (gamma lambda)^k delta_{t+k}, cut at terminations, computed as that double sum."""
    draws = drawn.Draws(seed)
    rewards, values, last = draws.normal(steps, envs), draws.normal(steps, envs), draws.normal(1, envs)
    alive = (draws.normal(steps, envs) < 0.7).astype(float)
    following = np.concatenate([values[1:], last])
    delta = scale * rewards + gamma * following * alive - values
    expected = np.zeros_like(rewards)
    for t in range(steps):
        weight = np.ones(envs)
        for k in range(t, steps):
            expected[t] += weight * delta[k]
            weight = weight * gamma * lam * alive[k]
    advantages, returns = gae(rewards, values, last, 1 - alive, gamma, lam, scale)
    comparison = Comparison("GAE, drawn", 3, "float64")
    comparison.check("advantages", advantages, expected)
    comparison.check("returns", returns, expected + values)
