"""Rung 2: whole networks on drawn sizes; loading consumes every tensor, and writing gives back every bit."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffusion_rl.core.errors import UserError
from diffusion_rl.interop import torch_names
from parity_tests import drawn
from parity_tests.replay.compare import Comparison

torch = pytest.importorskip("torch")

from parity_tests.reference import networks  # noqa: E402

PRECISIONS = ("float32", "float64")


@given(data=st.data(), size=drawn.sizes(), seed=drawn.seeds, batch=st.integers(1, 6))
def test_diffusion_mlp(data, size, seed, batch):
    specification = data.draw(drawn.diffusion_mlps(size))
    for dtype in PRECISIONS:
        model, draws = drawn.build_drawn(specification, seed, dtype), drawn.Draws(seed, dtype)
        x, t, state = draws.chunk(size, batch), draws.integers(20, batch), draws.state(size, batch)
        theirs = networks.diffusion_mlp(
            drawn.torch_weights(model), specification["kwargs"], *map(torch.from_numpy, (x, t, state))
        ).detach()
        scale = max(1.0, float(theirs.abs().max()))
        Comparison("DiffusionMLP, drawn", 2, dtype).check("output", model(x, t, {"state": state}), theirs, scale=scale)


@given(data=st.data(), size=drawn.sizes(), seed=drawn.seeds)
def test_critics(data, size, seed):
    specification = data.draw(drawn.critics(size))
    double = drawn.spec(
        "model.common.critic.CriticObsAct",
        cond_dim=size["obs_dim"] * size["cond_steps"],
        mlp_dims=[7, 5],
        action_dim=size["action_dim"],
        action_steps=size["horizon_steps"],
        use_layernorm=data.draw(st.booleans()),
        double_q=data.draw(st.booleans()),
        residual_style=True,  # ignored, as in the reference (quirk 1)
    )
    for dtype in PRECISIONS:
        draws = drawn.Draws(seed, dtype)
        state, action = draws.state(size, 4), draws.chunk(size, 4)
        comparison = Comparison("critics, drawn", 2, dtype)
        model = drawn.build_drawn(specification, seed, dtype)
        theirs = networks.critic(drawn.torch_weights(model), specification["kwargs"], torch.from_numpy(state)).detach()
        comparison.check("CriticObs", model({"state": state}), theirs, scale=max(1.0, float(theirs.abs().max())))
        model = drawn.build_drawn(double, seed, dtype)
        values = networks.double_critic(
            drawn.torch_weights(model), double["kwargs"], torch.from_numpy(state), torch.from_numpy(action)
        )
        ours = model({"state": state}, action)
        for i, (one, other) in enumerate(zip(ours if isinstance(ours, tuple) else [ours], values, strict=True)):
            scale = max(1.0, float(other.detach().abs().max()))
            comparison.check(f"CriticObsAct q{i + 1}", one, other.detach(), scale=scale)


@given(data=st.data(), seed=drawn.seeds)
def test_state_dict_round_trip(data, seed):
    specification, _ = data.draw(drawn.policies())
    one, other = (drawn.build_drawn(specification, seed + i, "float32") for i in range(2))
    weights = torch_names.state_dict(one)
    torch_names.load_state_dict(other, weights)
    back = torch_names.state_dict(other)
    assert list(back) == list(weights)
    assert all(np.array_equal(back[name], weights[name]) for name in weights)


@given(data=st.data(), seed=drawn.seeds)
def test_nothing_missing_and_nothing_left_over(data, seed):
    specification, _ = data.draw(drawn.policies())
    model = drawn.build_drawn(specification, seed, "float32")
    weights = torch_names.state_dict(model)
    name = data.draw(st.sampled_from(sorted(weights)))
    with pytest.raises(UserError, match="missing"):
        torch_names.load_state_dict(model, {k: v for k, v in weights.items() if k != name})
    with pytest.raises(UserError, match="left over"):
        torch_names.load_state_dict(model, weights | {"one.too.many": np.zeros(1)})
