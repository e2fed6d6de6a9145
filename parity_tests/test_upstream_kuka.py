"""The genuine Kuka experiments, live: `pytest parity_tests/test_upstream_kuka.py --upstream-kuka PATH`.

PATH is a checkout of jannerm/diffuser's branch `kuka`. The guide looks at states from the 64th on, so horizons are 128.
"""

from __future__ import annotations

import collections
import collections.abc
import contextlib
import importlib
import io
import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from diffusion_rl.core.keras import precision
from diffusion_rl.core.noise import NoiseSource
from diffusion_rl.data.kuka import StackingDataset, read_trajectories
from diffusion_rl.interop.diffuser_checkpoint import stacking_weights
from diffusion_rl.interop.torch_names import load_state_dict, named_parameters
from diffusion_rl.methods.diffuser.kuka import MaskedDiffusion, StackGuide, known_states
from diffusion_rl.networks.layers import Linear, variables_of
from diffusion_rl.networks.stacking import MaskedTemporalUnet, StackClassifier
from diffusion_rl.tasks.kuka_stacking import PAIRS, STATE_DIM, Count
from parity_tests.drawn import Draws
from parity_tests.replay.compare import Comparison
from parity_tests.replay.diffuser import SCHEDULE_BUFFERS

torch = pytest.importorskip("torch")

from parity_tests import live  # noqa: E402
from parity_tests.surroundings import Finder  # noqa: E402

pytestmark = pytest.mark.upstream_kuka
B, H, D, T = 3, 128, STATE_DIM, 6
PLAIN = "denoising_diffusion_pytorch.denoising_diffusion_pytorch"  # two copies of one file: this one trains and samples
GUIDED = "diffusion.denoising_diffusion_pytorch"  # and this one is guided


@pytest.fixture(scope="module", autouse=True)
def checkout(request):
    """Its packages can be imported, on a machine without a GPU and with today's numpy."""
    sys.path.insert(0, request.config.getoption("--upstream-kuka"))
    sys.meta_path.append(Finder("torchvision", "apex", "PIL", "easydict", "psutil", "scipy"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(collections, "Mapping", collections.abc.Mapping, raising=False)
        patch.setattr(np, "object", object, raising=False)
        patch.setattr(np, "int", int, raising=False)
        patch.setattr(torch.Tensor, "cuda", lambda self, *unused: self)
        yield


def quietly(function: Any, *arguments: Any, **options: Any) -> Any:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        return function(*arguments, **options)


def theirs_of(name: str, cls: str, *arguments: Any, **options: Any) -> Any:
    return quietly(getattr(quietly(importlib.import_module, name), cls), *arguments, **options)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """The genuine networks and processes in float64, and ours with their weights (through a file) and tables."""
    draws, folder = Draws(0, "float32"), tmp_path_factory.mktemp("weights")
    network = theirs_of("denoising_diffusion_pytorch.temporal_attention", "TemporalUnet", H, D, H, 8, (1, 2))
    guide = theirs_of("diffusion.models.mlp", "TimeConditionedMLP", 128, D, [128] * 3, 12)
    for each in (network, guide):
        live.scramble(each, draws)
    processes = [
        theirs_of(name, "GaussianDiffusion", network, image_size=(H, D), channels=1, timesteps=T, loss_type="l1")
        for name in (PLAIN, GUIDED)
    ]
    torch.save({"step": 0, "model": {}, "ema": processes[0].state_dict()}, folder / "model-0.pt")
    with precision("float64"):
        unet, classifier = MaskedTemporalUnet(H, D, 8, (1, 2)), StackClassifier(D)
    ours = MaskedDiffusion(unet, H, D, 0, T, clip_denoised=True)
    load_state_dict(ours, stacking_weights(folder / "model-0.pt", T))
    load_classifier(classifier, guide)
    doubled = []
    for process in processes:
        process = live.as_double(process)
        for name, table in SCHEDULE_BUFFERS.items():  # they differ in the last digit of float32
            np.testing.assert_allclose(getattr(process, name), getattr(ours.schedule, table), rtol=1e-4, atol=1e-7)
            getattr(process, name).copy_(torch.from_numpy(getattr(ours.schedule, table)))
        doubled.append(process)
    return doubled, live.as_double(guide), ours, classifier


def load_classifier(ours: StackClassifier, theirs: Any) -> None:
    weights = live.arrays_of(theirs)
    places: list[tuple[Linear, str]] = [(each, f"_layers.{2 * i}") for i, each in enumerate(ours.linears)]
    places += [(each, f"augment_models.{2 * i}.1") for i, each in enumerate(ours.shifts)]
    places += [(ours.time_model.expand, "time_model.1"), (ours.time_model.project, "time_model.3")]
    for layer, name in places:
        layer.kernel.assign(weights.pop(name + ".weight").T.astype(np.float64))
        layer.bias.assign(weights.pop(name + ".bias").astype(np.float64))
    assert not weights


def test_sizes():
    network = theirs_of("denoising_diffusion_pytorch.temporal_attention", "TemporalUnet", H, D, H, 128)
    guide = theirs_of("diffusion.models.mlp", "TimeConditionedMLP", 128, D, [128] * 3, 12)
    for theirs, ours in ((network, MaskedTemporalUnet(H, D)), (guide, StackClassifier(D))):
        counts = (v.shape.num_elements() for v in variables_of(ours))
        assert sum(p.numel() for p in theirs.parameters()) == sum(counts)


def test_loss_and_gradients(models):
    (theirs, _), _, ours, _ = models
    draws = Draws(1, "float64")
    x, noise, mask, t = draws.normal(B, H, D), draws.normal(B, H, D), known_states(H), np.array([0, 3, 5])
    with live.double_precision():
        given = [torch.from_numpy(each) for each in (x, mask.astype(np.float64), t, noise * (1 - mask[..., None]))]
        loss = theirs.p_losses(*given)
        loss.backward()
    tensors = [tf.constant(each, tf.float64) for each in (x, mask, noise)]
    with tf.GradientTape() as tape:
        found, _ = ours.loss(*tensors[:2], tf.constant(t, tf.int32), tensors[2])
    comparison = Comparison("Kuka, live", 3, "float64")
    comparison.check("loss", found, loss.detach())
    parameters = list(named_parameters(ours))
    gradients = tape.gradient(found, [p.variable for p in parameters])
    genuine = {n.replace("denoise_fn.", "model."): p.grad.numpy() for n, p in theirs.named_parameters()}
    scale = max(np.abs(each).max() for each in genuine.values())
    for parameter, gradient in zip(parameters, gradients, strict=True):
        name = next(n for n in (parameter.name, parameter.name.replace(".3.conv", ".2.conv")) if n in genuine)
        value = genuine.pop(name)
        comparison.check(name, parameter.to_torch(gradient.numpy()).reshape(value.shape), value, rung=4, scale=scale)
    assert not genuine


@pytest.mark.parametrize("pair", [None, (0, 1), (2, 1), (3, 0)])
def test_plans(models, pair):
    (plain, guided), guide, ours, classifier = models
    source = live.Source(Draws(2, "float32"))
    state = np.tanh(Draws(3, "float64").normal(1, D))
    values = torch.zeros(B, H, D, dtype=torch.float64)
    values[:, 0] = torch.from_numpy(state)
    with live.double_precision(), source.active():
        if pair is None:
            theirs = quietly(plain.conditional_sample, B, [(0, None, values)])
        else:
            known = [(0, D, values[:, 0])]
            theirs = quietly(guided.guided_conditional_sample, guide, B, known, PAIRS.index(pair), *pair)
    noise = np.stack([array for _, array in source.kept]).astype(np.float64)
    model = ours if pair is None else ours.guided_by(StackGuide(classifier, *pair))
    sample = tf.function(lambda known, noise: model.sample(known, noise).trajectories, autograph=False)
    found = sample({0: tf.constant(state)}, tf.constant(noise))
    gate = None if pair is None else 1e-8  # the last draw is multiplied by zero here, by 1e-10 in the guided original
    Comparison("Kuka's plans, live", 3, "float64").check("trajectories", found, theirs.detach(), gate=gate)


@pytest.mark.parametrize("lengths", [(290, 500, 700), (700, 600)])
def test_windows(lengths, tmp_path, monkeypatch):
    folder, noise = tmp_path / "kuka_dataset", NoiseSource(0)
    folder.mkdir()
    for i, length in enumerate(lengths):
        np.save(folder / f"{i}.npy", noise.uniform((length, D), 0.3, 0.5, np.float64))
    monkeypatch.chdir(tmp_path)
    theirs = theirs_of("denoising_diffusion_pytorch.datasets.tamp", "KukaDataset", H)
    labelled = theirs_of("denoising_diffusion_pytorch.datasets.tamp", "KukaDatasetReward", H, max_path_length=300)
    ours = StackingDataset(read_trajectories(folder), H)
    assert len(ours) == len(theirs) and theirs.qstates.shape[0] == len(lengths)
    np.testing.assert_array_equal(ours.windows, theirs.indices[:, :2])
    for item in (0, 3, len(ours) - 1):
        np.testing.assert_allclose(ours.trajectories(np.array([item]))[0], theirs[item][0], atol=1e-6)
        np.testing.assert_array_equal(ours.labels[ours.rows(np.array([item]))[0]], labelled[item][1])
    fitted = ours.normalizers["observations"]
    x = noise.uniform((5, D), -1, 1)
    np.testing.assert_allclose(fitted.unnormalize(x), theirs.unnormalize(torch.from_numpy((x + 1) / 2)), rtol=1e-5)


@pytest.mark.parametrize("task", ["unconditional", "conditional", "rearrangement"])
def test_rewards(task, monkeypatch):
    """Of drawn states close to each other; blocks hang together or not at all, or the reference's slip would show."""
    monkeypatch.setitem(sys.modules, "gym_stacking.utils", Finder().create_module(SimpleNamespace(name="utils")))
    offline = SimpleNamespace(OfflineEnv=type("OfflineEnv", (), {}))
    monkeypatch.setitem(sys.modules, "d4rl", SimpleNamespace(offline_env=offline))
    cls, noise = quietly(importlib.import_module, "gym_stacking.env").StackEnv, NoiseSource(4)
    for _ in range(20):
        env = cls.__new__(cls)
        env.conditional, env.rearrangment = task == "conditional", task == "rearrangement"
        env.stack_map, env.progress = np.zeros(12), 0
        env.goal = noise.permutation(4).tolist()
        env.stacks = [(0, 1), (2, 3)]
        wanted = {"conditional": tuple(zip(env.goal[1:], env.goal[:-1], strict=True)), "rearrangement": env.stacks}
        count, total = Count(tuple(wanted[task]) if task in wanted else None), 0.0
        for _ in range(30):
            state = noise.uniform((D,), 0, 0.25, np.float64)
            state[14::8] = noise.uniform((1,))[0] > 0.7
            env.state, count = state, count.after(state)
            total += env.compute_reward()
            assert count.total == pytest.approx(total)
        assert total > 0 and (count.next is None or count.next == wanted[task][env.progress])
