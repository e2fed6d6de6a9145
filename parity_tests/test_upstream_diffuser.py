"""The genuine Diffuser, live: `pytest parity_tests/test_upstream_diffuser.py --upstream-diffuser PATH`."""

from __future__ import annotations

import contextlib
import importlib
import io
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusion_rl.core.keras import precision
from diffusion_rl.diffusion.guidance import Guide
from parity_tests.replay import diffuser
from parity_tests.replay.compare import Comparison

torch = pytest.importorskip("torch")

from parity_tests import live  # noqa: E402
from parity_tests.drawn import Draws  # noqa: E402
from parity_tests.surroundings import import_diffuser  # noqa: E402

pytestmark = pytest.mark.upstream_diffuser
B, O, A = 3, 3, 2  # noqa: E741
TEMPORAL, DIFFUSION = "diffuser.models.temporal.", "diffuser.models.diffusion."


@pytest.fixture(scope="module", autouse=True)
def checkout(request):
    """Its package can be imported; what it only needs for other things is replaced by nothing."""
    import_diffuser(request.config.getoption("--upstream-diffuser"), "sampling")


def spec(cls: str, **kwargs: Any) -> dict[str, Any]:
    return {"class": cls, "kwargs": kwargs}


@st.composite
def unets(draw: Any) -> dict[str, Any]:
    levels = draw(st.integers(1, 3))
    mults = [1] + [draw(st.sampled_from([1, 2])) for _ in range(levels - 1)]
    options = {"cond_dim": O, "dim": 16, "dim_mults": mults, "attention": draw(st.booleans())}
    return spec(TEMPORAL + "TemporalUnet", horizon=4 * 2 ** (levels - 1), transition_dim=A + O, **options)


def values_of(horizon: int) -> dict[str, Any]:
    options = {"cond_dim": O, "dim": 16, "dim_mults": [1, 4]}
    return spec(TEMPORAL + "ValueFunction", horizon=horizon, transition_dim=A + O, **options)


def diffusion_of(cls: str, network: dict[str, Any], n_timesteps: int, **options: Any) -> dict[str, Any]:
    sizes = {"horizon": network["kwargs"]["horizon"], "observation_dim": O, "action_dim": A}
    return spec(DIFFUSION + cls, model=network, **sizes, n_timesteps=n_timesteps, **options)


seeds = st.integers(0, 2**31)


def replay(specification: dict[str, Any], method: str, prepare: Any, returns: Any, loss: Any, seed: int) -> None:
    """Record the genuine call with drawn weights, and hold ours to it."""
    with contextlib.redirect_stdout(io.StringIO()):
        golden = live.record_call(specification, method, prepare, returns, loss, Draws(seed, "float32"))
    diffuser.replay(golden)


@settings(max_examples=3)
@given(unets(), seeds)
def test_unet(network, seed):
    horizon = network["kwargs"]["horizon"]

    def prepare(model: Any, draws: Draws) -> dict[str, Any]:
        return {"x": draws.normal(B, horizon, A + O), "cond": None, "time": draws.integers(20, B)}

    replay(network, "forward", prepare, ("out",), "mean_square", seed)


@settings(max_examples=2)
@given(st.sampled_from([4, 8, 12]), seeds)
def test_value_network(horizon, seed):
    def prepare(model: Any, draws: Draws) -> dict[str, Any]:
        return {"x": draws.normal(B, horizon, A + O), "cond": None, "time": draws.integers(20, B)}

    replay(values_of(horizon), "forward", prepare, ("out",), "mean_square", seed)


@settings(max_examples=3)
@given(unets(), st.sampled_from([("l2", False), ("l1", False), ("l2", True)]), st.integers(3, 20), seeds)
def test_loss(network, kind, n_timesteps, seed):
    loss_type, predict_epsilon = kind
    options = {"loss_type": loss_type, "predict_epsilon": predict_epsilon, "action_weight": 10, "loss_discount": 0.9}
    model, horizon = diffusion_of("GaussianDiffusion", network, n_timesteps, **options), network["kwargs"]["horizon"]

    def prepare(model: Any, draws: Draws) -> dict[str, Any]:
        given = {"x_start": draws.normal(B, horizon, A + O), "cond": {0: draws.normal(B, O)}}
        return given | {"t": draws.integers(n_timesteps, B)}

    replay(model, "p_losses", prepare, ("loss", "info"), {"loss": 1.0}, seed)


@settings(max_examples=2)
@given(st.sampled_from([4, 8]), st.integers(3, 20), seeds)
def test_value_loss(horizon, n_timesteps, seed):
    model = diffusion_of("ValueDiffusion", values_of(horizon), n_timesteps, loss_type="value_l2")

    def prepare(model: Any, draws: Draws) -> dict[str, Any]:
        given = {"x_start": draws.normal(B, horizon, A + O), "cond": {0: draws.normal(B, O)}}
        return given | {"target": draws.normal(B, 1, scale=3.0), "t": draws.integers(n_timesteps, B)}

    replay(model, "p_losses", prepare, ("loss", "info"), {"loss": 1.0}, seed)


@settings(max_examples=2)
@given(st.sampled_from([1, 2]), st.booleans(), seeds)
def test_guided_plans(n_guide_steps, by_variance, seed):
    """Whole guided sampling in float64, with the genuine weights, tables and draws."""
    horizon, draws = 8, Draws(seed, "float32")
    network = spec(
        TEMPORAL + "TemporalUnet", horizon=horizon, transition_dim=A + O, cond_dim=O, dim=16, dim_mults=[1, 2]
    )
    specs = (
        diffusion_of("GaussianDiffusion", network, 6, predict_epsilon=False),
        diffusion_of("ValueDiffusion", values_of(horizon), 6, loss_type="value_l2"),
    )
    torch.manual_seed(seed)
    with contextlib.redirect_stdout(io.StringIO()):
        genuine = [live.build(each) for each in specs]
    for model in genuine:
        live.scramble(model, draws)
    observed = draws.normal(5, O)
    options = {"scale": 0.5, "n_guide_steps": n_guide_steps, "t_stopgrad": 2, "scale_grad_by_std": by_variance}
    source = live.Source(draws)
    sampling, guides = (importlib.import_module(f"diffuser.sampling.{name}") for name in ("functions", "guides"))
    with live.double_precision(), source.active():
        model, guide = live.as_double(genuine[0]), guides.ValueGuide(live.as_double(genuine[1]))
        known = {0: torch.from_numpy(observed).double()}
        theirs = model.conditional_sample(
            known, verbose=False, return_chain=True, sample_fn=sampling.n_step_guided_p_sample, guide=guide, **options
        )
    with precision("float64"):
        ours = [diffuser.build(each) for each in specs]
        for one, other in zip(ours, genuine, strict=True):
            diffuser.load("live", one, live.arrays_of(other))
        noise = tf.constant(np.stack([array for _, array in source.kept]).astype(np.float64))
        sample = tf.function(
            lambda known, noise: ours[0].sample(known, noise, Guide(ours[1].value, **options), True), autograph=False
        )
        plans = sample({0: tf.constant(observed.astype(np.float64))}, noise)
    comparison = Comparison("guided plans, live", 3, "float64")
    for name in ("trajectories", "values", "chains"):
        comparison.check(name, getattr(plans, name), getattr(theirs, name).detach())
