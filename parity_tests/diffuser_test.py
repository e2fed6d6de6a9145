"""Diffuser's networks, losses and guided steps beside PyTorch twins, on drawn sizes and inputs; twins on recordings."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusion_rl.core.keras import precision
from diffusion_rl.core.noise import NoiseSource, initial_weights
from diffusion_rl.diffusion.guidance import Guide
from diffusion_rl.diffusion.inpainting import Known
from diffusion_rl.methods.diffuser.model import TrajectoryDiffusion, ValueDiffusion
from diffusion_rl.networks.layers import variables_of
from diffusion_rl.networks.temporal_unet import TemporalUnet, ValueFunction
from parity_tests.replay import case
from parity_tests.replay.compare import Comparison, own_rounding
from parity_tests.replay.files import GOLDENS, Golden

torch = pytest.importorskip("torch")

from parity_tests.drawn import Draws, torch_weights  # noqa: E402
from parity_tests.reference import trajectories as twin  # noqa: E402

B, O, A = 3, 3, 2  # noqa: E741
NETWORKS = {"df_unet_other_horizon": (twin.unet, slice(None)), "df_value_outdim": (twin.value, (slice(None), 0))}


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize(("dtype", "suffix"), [("float32", ""), ("float64", "64")])
def test_twins_give_what_was_recorded(name, dtype, suffix):
    golden, (function, part) = Golden.load(GOLDENS / f"{name}.npz"), NETWORKS[name]
    weights = {k: torch.from_numpy(v.astype(dtype)) for k, v in golden.weights.items()}
    found = function(
        weights, torch.from_numpy(golden.arrays["in/x"].astype(dtype)), torch.tensor(golden.arrays["in/time"])
    )
    recorded, rounding = golden.group("out" + suffix)["out"][part], own_rounding(golden, "out/out")
    Comparison(name, 2, dtype).check("out", found, recorded, rounding=rounding)


@st.composite
def models(draw: Any) -> tuple[Any, Draws, int]:
    """Our float64 model with drawn weights, draws, and its horizon."""
    levels, seed = draw(st.integers(1, 3)), draw(st.integers(0, 2**31))
    horizon = draw(st.integers(1, 3)) * 2 ** (levels - 1)
    dim_mults = [draw(st.sampled_from([1, 2])) for _ in range(levels)]
    source = NoiseSource(seed)
    with precision("float64"), initial_weights(source):
        network = TemporalUnet(horizon, A + O, dim=16, dim_mults=dim_mults, attention=draw(st.booleans()))
        model = TrajectoryDiffusion(
            *(network, horizon, O, A, draw(st.integers(3, 9)), "l2"),
            predict_epsilon=draw(st.booleans()),
            action_weight=draw(st.sampled_from([1.0, 10.0])),
            loss_discount=draw(st.sampled_from([1.0, 0.9])),
        )
    return drawn(model, source), Draws(seed), horizon


def drawn(model: Any, source: NoiseSource) -> Any:
    for variable in variables_of(model):
        variable.assign_add(0.1 * source.normal(variable.shape, dtype=np.float64))
    return model


def network_weights(model: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """All tensors, and those of the network under its own names."""
    weights = torch_weights(model)
    return weights, {k.removeprefix("model."): v for k, v in weights.items()}


def tables(model: Any) -> dict[str, Any]:
    return {k: torch.from_numpy(np.array(v, np.float64)) for k, v in vars(model.schedule).items()}


@settings(max_examples=4)
@given(models())
def test_loss_and_its_gradients(drawn_model):
    model, draws, horizon = drawn_model
    x, noise, t = draws.normal(B, horizon, A + O), draws.normal(B, horizon, A + O), draws.integers(model.n_timesteps, B)
    known = {0: draws.normal(B, O), horizon - 1: draws.normal(B, O)}
    with tf.GradientTape() as tape:
        ours, _ = model.loss(x, {k: tf.constant(v) for k, v in known.items()}, t, tf.constant(noise))
    weights, own = network_weights(model)
    x_, noise_, t_ = map(torch.from_numpy, (x, noise, t))
    known_ = {k: torch.from_numpy(v) for k, v in known.items()}
    by_entry = torch.from_numpy(model.loss_weights.astype(np.float64))
    theirs = twin.loss(own, tables(model), by_entry, x_, known_, t_, noise_, A, model.predict_epsilon)
    comparison = Comparison("Diffuser's loss beside its twin", 3, "float64")
    comparison.check("loss", ours, theirs.detach())
    found = torch.autograd.grad(theirs, list(weights.values()))
    grads = {name: grad.numpy() for name, grad in zip(weights, found, strict=True)}
    scale = max(float(np.abs(grad).max()) for grad in grads.values())
    comparison.check_all(case.torch_gradients(model, tape, ours), grads, "grad ", rung=4, scale=scale)


@settings(max_examples=4)
@given(models(), st.sampled_from([1, 2]), st.booleans(), st.integers(0, 3))
def test_guided_step(drawn_model, n_guide_steps, by_variance, t_stopgrad):
    model, draws, horizon = drawn_model
    model.predict_epsilon = False
    source = NoiseSource(int(draws.integers(2**31, 1)[0]))
    with precision("float64"), initial_weights(source):
        network = ValueFunction(horizon, A + O, dim=16, dim_mults=(1, 4))
        values = drawn(ValueDiffusion(network, horizon, O, A, model.n_timesteps, "value_l2"), source)
    options = {"scale": 0.5, "n_guide_steps": n_guide_steps, "t_stopgrad": t_stopgrad, "scale_grad_by_std": by_variance}
    x, noise, t = draws.normal(B, horizon, A + O), draws.normal(B, horizon, A + O), draws.integers(model.n_timesteps, B)
    observed = draws.normal(B, O)
    known = Known.of({0: tf.constant(observed)}, horizon, A, tf.constant(x))
    ours = model.step(tf.constant(x), tf.constant(t), tf.constant(noise), known, Guide(values.value, **options))
    _, own = network_weights(model)
    _, scoring = network_weights(values)
    x_, noise_, t_ = map(torch.from_numpy, (x, noise, t))
    theirs = twin.guided_step(
        *(
            own,
            tables(model),
            lambda x, t: twin.value(scoring, x, t),
            x_,
            {0: torch.from_numpy(observed)},
            t_,
            noise_,
            A,
        ),
        **options,
    )
    comparison = Comparison("Diffuser's guided step beside its twin", 3, "float64")
    for name, one, other in zip(("x", "values"), ours, theirs, strict=True):
        comparison.check(name, one, other.detach())
