"""Rung 2: whole networks on drawn sizes; loading consumes every tensor, and writing gives back every bit."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given
from hypothesis import strategies as st

from diffusion_rl.core.errors import UserError
from diffusion_rl.core.keras import precision
from diffusion_rl.interop import torch_names
from diffusion_rl.networks.critics import CriticEnsemble, CriticObsAct
from parity_tests import drawn, drawn_networks, drawn_vision
from parity_tests.replay import case
from parity_tests.replay.build import OURS
from parity_tests.replay.case import torch_gradients
from parity_tests.replay.compare import Comparison

torch = pytest.importorskip("torch")

from parity_tests.reference import forward  # noqa: E402
from parity_tests.reference.networks import nothing_drawn  # noqa: E402


@pytest.mark.parametrize("kind", drawn_networks.KINDS)
@given(data=st.data(), seed=drawn.seeds)
def test_network(kind, data, seed):
    """Values, and the gradient of every tensor, against the twin; with its dropout masks and shifts of images."""
    specification, prepare = data.draw(drawn_networks.calls(kind))
    model, draws = drawn.build_drawn(specification, seed, "float32"), drawn.Draws(seed, "float32")
    weights = torch_names.state_dict(model)
    case.replay(forward.recorded(specification, weights, prepare(draws), draws.generator))


def test_every_network_has_a_twin_and_drawn_calls():
    networks = {path for path, ours in OURS.items() if ours.startswith("diffusion_rl.networks.")}
    networks = {path for path in networks if not path.startswith("model.flow.")}  # ReinFlow's: recordings alone
    ported_only = {"model.common.critic.CriticObsAct_DACER"}  # of the earlier TensorFlow port; there is none in PyTorch
    assert networks - {drawn_vision.ENCODER_CONFIG} - ported_only == set(forward.TWINS)
    names = {path.rsplit(".", 1)[-1] for path in forward.TWINS if ".eta." not in path}
    assert names == set(drawn_networks.KINDS) - {"Eta"} | {"SinusoidalPosEmb"}  # which is drawn on rung 1


@given(data=st.data(), size=drawn.sizes(), seed=drawn.seeds, members=st.integers(1, 4))
def test_critic_ensemble(data, size, seed, members):
    """All members in one go, each as if it were alone; the twin's weights are stacked as well."""
    specification = drawn_networks.action_critics(data.draw, size, double_q=False)
    for dtype in ("float32", "float64"):
        critics = [drawn.build_drawn(specification, seed + i, dtype) for i in range(members)]
        with precision(dtype):
            ensemble, draws = CriticEnsemble(critics), drawn.Draws(seed, dtype)
        arguments = {"cond": {"state": draws.state(size, 4)}, "action": draws.chunk(size, 4)}
        weights = drawn.torch_weights(ensemble)
        inputs = forward.tensors(arguments, getattr(torch, dtype))
        (theirs,) = forward.outputs(specification, weights, inputs, nothing_drawn)
        with tf.GradientTape() as tape:
            ours = ensemble(**arguments)
            total = tf.reduce_mean(tf.square(ours))
        comparison = Comparison("critic ensembles, drawn", 2, dtype)
        comparison.check("values", ours, theirs.detach(), scale=max(1.0, float(theirs.detach().abs().max())))
        alone = np.stack([critic(**arguments) for critic in critics])
        comparison.check("values, one by one", ours, alone, scale=max(1.0, float(np.abs(alone).max())))
        subset = draws.generator.permutation(members)[:2]
        comparison.check("a subset", ensemble(**arguments, subset=subset), ours.numpy()[subset])
        if dtype == "float32":
            continue
        found = torch.autograd.grad(theirs.square().mean(), list(weights.values()))
        scale = max(float(grad.abs().max()) for grad in found)
        grads = {name: grad.numpy() for name, grad in zip(weights, found, strict=True)}
        comparison.check_all(torch_gradients(ensemble, tape, total), grads, "grad ", rung=4, scale=max(scale, 1e-12))


def test_names_of_an_ensemble():
    """Members of a list, or stacked; either way every bit survives."""
    specification = {"cond_dim": 3, "mlp_dims": [4, 4], "action_dim": 2, "use_layernorm": True, "double_q": False}
    holder, other = (
        SimpleNamespace(
            ensemble_params=CriticEnsemble([CriticObsAct(**specification) for _ in range(3)]),
            target_networks=CriticEnsemble([CriticObsAct(**specification) for _ in range(3)]),
        )
        for _ in range(2)
    )
    weights = torch_names.state_dict(holder)
    assert weights["ensemble_params.Q1.moduleList.0.linear_1.weight"].shape == (3, 4, 5)
    assert weights["target_networks.2.Q1.moduleList.0.linear_1.weight"].shape == (4, 5)
    assert weights["target_networks.0.Q1.moduleList.1.norm_1.bias"].shape == (4,)
    torch_names.load_state_dict(other, weights)
    back = torch_names.state_dict(other)
    assert list(back) == list(weights)
    assert all(np.array_equal(back[name], weights[name]) for name in weights)
    with pytest.raises(UserError, match="double_q"):
        CriticEnsemble([CriticObsAct(**specification | {"double_q": True})])


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
