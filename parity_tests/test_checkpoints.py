"""Rung 2 for files: checkpoints of every method of the reference, into ours and back, bit for bit."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from diffusion_rl.interop import torch_names
from diffusion_rl.interop.description import describe_networks
from diffusion_rl.training.checkpoint import load_checkpoint, save_checkpoint
from parity_tests.replay.build import OURS, build
from parity_tests.replay.files import GOLDENS, Golden, case_files

torch = pytest.importorskip("torch", reason="it writes the files: pip install -e '.[parity]'")

from parity_tests import checkpoint_files  # noqa: E402

SCRIPT = Path(__file__).resolve().parents[1] / "script" / "convert_checkpoint.py"


def pytest_generate_tests(metafunc):
    if "golden" not in metafunc.fixturenames:
        return
    files = case_files(metafunc.config.getoption("--golden-dir") or GOLDENS)
    models = [g for g in map(Golden.load, files) if class_name(g) in checkpoint_files.KINDS and g.group("w")]
    metafunc.parametrize("golden", models, ids=[g.name for g in models])


def class_name(golden: Golden) -> str:
    return ((golden.meta.get("spec") or {}).get("class") or "").rpartition(".")[2]


def test_there_is_a_file_of_every_method():
    assert {class_name(Golden.load(file)) for file in case_files(GOLDENS)} >= checkpoint_files.KINDS.keys() - {
        "PPOExactDiffusion"  # the same parts as PPODiffusion
    }


def test_the_file_survives_both_ways(golden, tmp_path):
    state = checkpoint_files.state_dict(golden)
    data = {"itr": 12, "model": state}
    if class_name(golden) in ("DiffusionModel", "GaussianModel", "GMMModel"):  # pre-training writes these
        averaged = {k: v + 1 for k, v in state.items()}
        data = {"epoch": 3000, "model": state, "ema": type(state)(averaged)}
    torch.save(data, tmp_path / "theirs.pt")
    read = load_checkpoint(tmp_path / "theirs.pt")
    save_checkpoint(tmp_path / "ours.safetensors", read.tensors, read.metadata)
    ours = load_checkpoint(tmp_path / "ours.safetensors")
    assert ours.metadata == read.metadata
    save_checkpoint(tmp_path / "back.pt", ours.tensors, ours.metadata)

    back = torch.load(tmp_path / "back.pt", weights_only=True)
    assert list(back) == list(data)
    for group in {"model", "ema"} & data.keys():
        assert list(back[group]) == list(data[group])
        assert not [k for k, v in data[group].items() if not checkpoint_files.same_tensor(back[group][k], v)]
        assert checkpoint_files.sharing(back[group]) == checkpoint_files.sharing(data[group])


def test_its_kind_and_networks_are_recognised(golden, tmp_path):
    torch.save({"itr": 0, "model": checkpoint_files.state_dict(golden)}, tmp_path / "x.pt")
    checkpoint = load_checkpoint(tmp_path / "x.pt")
    expected = checkpoint_files.KINDS[class_name(golden)]
    if class_name(golden) == "DiffusionEval" and not any(k.startswith("actor_ft.") for k in golden.state_dict):
        expected = "diffusion_policy"
    assert checkpoint.metadata["kind"] == expected
    networks = describe_networks(checkpoint.tensors)
    for part, spec, _ in checkpoint_files.parts(golden):
        assert networks[part.partition(".")[0]]["class"] == OURS[spec["class"]].rpartition(".")[2], part


def test_every_part_loads_into_our_network_and_out_again(golden):
    """Nothing missing, nothing left over, not a bit changed."""
    for part, spec, weights in checkpoint_files.parts(golden):
        network = build(spec)
        loaded = torch_names.load_state_dict(network, weights, strict=True)
        written = torch_names.state_dict(network)
        assert set(loaded) == set(written) == set(weights), part
        for name, value in weights.items():
            assert np.asarray(written[name]).astype(value.dtype).tobytes() == value.tobytes(), f"{part}.{name}"


def test_a_run_of_ours_gets_what_the_reference_wants(tmp_path):
    """Without a file of the reference to return to: shared tensors and the shell of an ensemble are made."""
    for name in ("rlpd_update_target", "dipo_update_target_actor", "ppo_gaussian_loss_base"):
        golden = Golden.load(GOLDENS / f"{name}.npz")
        tensors = {f"model.{k}": v for k, v in golden.state_dict.items()} | {"optimizer.actor.exp_avg.x": np.ones(1)}
        save_checkpoint(tmp_path / f"{name}.pt", tensors, {"itr": 5, "kind": "whatever", "config": {}})
        back = torch.load(tmp_path / f"{name}.pt", weights_only=True)
        expected = checkpoint_files.state_dict(golden)
        assert list(back) == ["itr", "model"] and list(back["model"]) == list(expected)
        assert all(checkpoint_files.same_tensor(back["model"][k], v) for k, v in expected.items())
        assert checkpoint_files.sharing(back["model"]) == checkpoint_files.sharing(expected)


def test_the_command_says_what_it_found(tmp_path):
    golden = Golden.load(GOLDENS / "ibrl_update_target_actor.npz")
    torch.save({"itr": 7, "model": checkpoint_files.state_dict(golden)}, tmp_path / "x.pt")
    environment = {**os.environ, "PYTHONPATH": str(SCRIPT.parents[1] / "code")}
    for source, target in (("x.pt", "x.safetensors"), ("x.safetensors", "y.pt")):
        command = [sys.executable, str(SCRIPT), source, target]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        lines = [line.split() for line in done.stdout.splitlines()]
        assert lines[:2] == [["kind:", "ibrl"], ["itr:", "7"]]
        rows = {words[0]: words[1:] for words in lines[2:-1]}
        assert set(rows) == {f"model.{name}" for name in {k.partition(".")[0] for k in golden.state_dict}}
        for part, words in rows.items():
            arrays = [v for k, v in golden.state_dict.items() if f"model.{k}".startswith(part + ".")]
            assert words[:4] == [str(len(arrays)), "tensors", f"{sum(a.size for a in arrays):,}", "parameters"]
        assert "GaussianMLP," in rows["model.bc_policy"] and "members=3," in rows["model.critic_networks"]
    a, b = (torch.load(tmp_path / name, weights_only=True)["model"] for name in ("x.pt", "y.pt"))
    assert list(a) == list(b) and all(checkpoint_files.same_tensor(a[k], b[k]) for k in a)
