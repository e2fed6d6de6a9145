"""The genuine reference's own `save_model` and `load` against our converter (`--upstream PATH`)."""

from __future__ import annotations

import types

import pytest

from diffusion_rl.training.checkpoint import load_checkpoint, save_checkpoint
from parity_tests.replay.files import GOLDENS, Golden, case_files

torch = pytest.importorskip("torch")

from parity_tests import checkpoint_files, live  # noqa: E402

pytestmark = pytest.mark.upstream

FINE_TUNING = "finetune.train_agent.TrainAgent"
PRETRAINED = ("DiffusionModel", "GaussianModel", "GMMModel")


@pytest.fixture(scope="module", autouse=True)
def checkout(request):
    live.make_importable(request.config.getoption("--upstream"))


def one_of_each() -> dict[str, Golden]:
    """A recorded model of every method (evaluation reads its weights from a file: it writes none)."""
    found: dict[str, Golden] = {}
    for golden in map(Golden.load, case_files(GOLDENS)):
        name = ((golden.meta.get("spec") or {}).get("class") or "").rpartition(".")[2]
        if name in checkpoint_files.KINDS and name != "DiffusionEval" and golden.kind == "case":
            vision = "_vision" if "vision" in golden.name else "_unet" if "unet" in golden.name else ""
            found.setdefault(name + vision, golden)
    return found


@pytest.mark.parametrize(("name", "golden"), one_of_each().items(), ids=one_of_each())
def test_what_it_saves_comes_back_and_loads(name, golden, tmp_path):
    torch.manual_seed(len(name))
    pretrained = name.partition("_")[0] in PRETRAINED
    agents = live.locate("agent." + ("pretrain.train_agent.PreTrainAgent" if pretrained else FINE_TUNING))
    model, averaged = live.build(golden.meta["spec"]), live.build(golden.meta["spec"])
    agent = types.SimpleNamespace(model=model, ema_model=averaged, itr=3, epoch=3, checkpoint_dir=str(tmp_path))
    agents.save_model(agent)
    theirs = tmp_path / "state_3.pt"
    checkpoint = load_checkpoint(theirs)
    assert checkpoint.metadata["kind"] == checkpoint_files.KINDS[name.removesuffix("_vision").removesuffix("_unet")]
    save_checkpoint(tmp_path / "ours.safetensors", checkpoint.tensors, checkpoint.metadata)
    before = torch.load(theirs, weights_only=True)
    theirs.unlink()
    ours = load_checkpoint(tmp_path / "ours.safetensors")
    save_checkpoint(theirs, ours.tensors, ours.metadata)
    after = torch.load(theirs, weights_only=True)
    assert list(before) == list(after)
    for group in {"model", "ema"} & before.keys():
        assert list(before[group]) == list(after[group])
        assert all(checkpoint_files.same_tensor(after[group][k], v) for k, v in before[group].items())
        assert checkpoint_files.sharing(before[group]) == checkpoint_files.sharing(after[group])

    other = live.build(golden.meta["spec"])  # of other random weights
    agent = types.SimpleNamespace(model=other, ema_model=live.build(golden.meta["spec"]), checkpoint_dir=str(tmp_path))
    agents.load(agent, 3)
    assert all(checkpoint_files.same_tensor(v, before["model"][k]) for k, v in other.state_dict().items())
    assert getattr(agent, "epoch" if pretrained else "itr") == 3
