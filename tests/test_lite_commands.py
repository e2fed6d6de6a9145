"""DiffuserLite's modes end to end on small made-up data: training, resuming, reflow, Q-learning, acting, figures."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace

import h5py
import numpy as np
import pytest
import tensorflow as tf

from diffusion_rl.cli import diffuser_lite, figures
from diffusion_rl.core.errors import UserError
from diffusion_rl.core.noise import NoiseSource
from diffusion_rl.interop.torch_checkpoint import read_pt, write_pt
from diffusion_rl.methods.diffuser_lite.domains import DOMAINS
from diffusion_rl.methods.diffuser_lite.options import FOLDER, parse
from diffusion_rl.reports import lite_figures

TASK = "hopper-medium-v2"
SMALL = ["emb_dim=16", "d_model=16", "n_heads=2", "depth=1", "batch_size=16", "num_envs=2", "num_episodes=1"]
STEPS = ["diffusion_gradient_steps=6", "invdyn_gradient_steps=4", "log_interval=1", "save_interval=2"]
PAIRS = ["cond_dataset_size=13", "uncond_dataset_size=5", "dataset_prepare_batch_size=10"]
RUN = [f"task={TASK}", *SMALL, *STEPS, *PAIRS, "dataset_prepare_sampling_steps=2", "reflow_gradient_steps=4"]


def write(path, observation_dim, action_dim, rewards):
    """Three episodes of 20 steps in D4RL's layout; the first ended before its time."""
    draw, n = NoiseSource(0), 60
    with h5py.File(path, "w") as file:
        file["observations"] = draw.normal((n, observation_dim))
        file["actions"] = draw.uniform((n, action_dim), -1, 1)
        file["rewards"] = rewards(draw, n)
        file["terminals"] = np.arange(n) == 19
        file["timeouts"] = np.isin(np.arange(n), (39, 59))


@pytest.fixture(scope="module", autouse=True)
def folder(tmp_path_factory):
    """A working directory with data and a trained model of two levels. Uncompiled: tracing would take most of the
    time."""
    tf.config.run_functions_eagerly(True)
    patch = pytest.MonkeyPatch()
    for kind in ("mujoco", "kitchen"):
        patch.setitem(DOMAINS, kind, replace(DOMAINS[kind], horizons=(3, 3)))
    folder = tmp_path_factory.mktemp("lite")
    write(folder / "hopper_medium-v2.hdf5", 11, 3, lambda draw, n: draw.normal((n,)))
    write(
        folder / "kitchen_microwave_kettle_bottomburner_light-v0.hdf5",
        60,
        9,
        lambda draw, n: np.floor(np.linspace(0, 4, n)).astype(np.float32),
    )
    patch.setenv("D4RL_DATASET_DIR", str(folder))
    patch.chdir(folder)
    diffuser_lite.mujoco([*RUN, "mode=training", "backup_dir=backup"])
    yield folder
    tf.config.run_functions_eagerly(False)
    patch.undo()


def weights(results, name):
    data = read_pt(os.path.join(results, "diffuserlite_d4rl_mujoco", TASK, name))
    return {f"{part}.{k}": v for part, own in data.items() for k, v in own.items()}


def test_files_of_a_training(folder):
    own = folder / "results" / "diffuserlite_d4rl_mujoco" / TASK
    names = {f"diffusion{i}_ckpt_{label}.pt" for i in range(2) for label in (2, 4, 6, "latest")}
    names |= {f"invdyn_ckpt_{label}.pt" for label in (2, 4, "latest")}
    names |= {"train_state_training.safetensors", "normalizer.npz", "loss_log.json"}
    assert {path.name for path in own.iterdir()} >= names
    rows = json.loads((folder / "results" / "loss_log.json").read_text())
    assert [row["gradient_steps"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert rows[0].keys() == {"loss0", "loss1", "invdyn_loss", "gradient_steps"}
    assert rows[3]["invdyn_loss"] > 0 == rows[4]["invdyn_loss"]
    for name in ("loss_curve.png", "invdyn_loss_curve.png"):
        assert (folder / "results" / "figures" / name).stat().st_size > 10_000
    copies = {path.relative_to(folder / "backup") for path in (folder / "backup").rglob("*") if path.is_file()}
    visible = (p for p in (folder / "results").rglob("*") if p.is_file() and p.name != ".lock")
    assert copies == {p.relative_to(folder / "results") for p in visible}


def test_a_run_goes_on_from_a_kept_state(folder):
    diffuser_lite.mujoco([*RUN, "mode=training", "results_dir=parts", "keep_states=true"])
    diffuser_lite.mujoco([*RUN, "mode=training", "results_dir=parts", "resume=2"])
    once, parts = (weights(where, "diffusion1_ckpt_latest.pt") for where in ("results", "parts"))
    assert all(np.array_equal(once[name], parts[name]) for name in once)
    assert (folder / "parts" / "loss_log.json").read_bytes() == (folder / "results" / "loss_log.json").read_bytes()
    with pytest.raises(UserError, match="keep_states=true"):
        diffuser_lite.mujoco([*RUN, "mode=training", "results_dir=parts", "resume=3"])
    with pytest.raises(UserError, match="that run has seed=0 .now 7., which resuming cannot change"):
        diffuser_lite.mujoco([*RUN, "mode=training", "results_dir=parts", "resume=2", "seed=7"])
    with pytest.raises(UserError, match="6 steps, this one has 8"):
        longer = [option.replace("diffusion_gradient_steps=6", "diffusion_gradient_steps=8") for option in RUN]
        diffuser_lite.mujoco([*longer, "mode=training", "results_dir=parts"])


def test_what_is_not_finite_is_neither_saved_nor_loaded(folder):
    faster = [option for option in RUN if not option.startswith("save_interval")]
    with pytest.raises(UserError, match="no longer finite|a loss is nan|a loss is inf"):
        ruined = ["results_dir=ruined", "learning_rate=1e38", "save_interval=1"]
        diffuser_lite.mujoco([*faster, "mode=training", *ruined])
    for path in (folder / "ruined").rglob("diffusion*.pt"):
        data = read_pt(path)
        assert all(np.isfinite(value).all() for part in data.values() for value in part.values()), path
    own = folder / "results" / "diffuserlite_d4rl_mujoco" / TASK
    data = read_pt(own / "diffusion0_ckpt_latest.pt")
    next(iter(data["model_ema"].values()))[...] = np.nan
    write_pt(own / "diffusion0_ckpt_8.pt", data)
    with pytest.raises(UserError, match="diffusion0_ckpt_8.pt: weight .* is not finite"):
        diffuser_lite.mujoco([*RUN, "mode=inference", "diffusion_ckpt=8"])
    (own / "diffusion0_ckpt_8.pt").unlink()


def test_reflow_and_acting(folder, capsys, monkeypatch):
    pytest.importorskip("mujoco")
    monkeypatch.setattr(diffuser_lite.Pipeline, "limit", 3)
    diffuser_lite.mujoco([*RUN, "mode=prepare_dataset"])
    own = folder / "results" / "diffuserlite_d4rl_mujoco" / TASK
    with h5py.File(own / "traj_cond_dataset.h5") as file:
        assert file["traj_cond_dataset_1"].shape == (13, 2, 3, 11) and np.abs(file["traj_cond_dataset_0"][12]).max() > 0
    diffuser_lite.mujoco([*RUN, "mode=reflow"])
    before, after = weights("results", "diffusion0_ckpt_latest.pt"), weights("results", "reflow0_ckpt_4.pt")
    assert any(not np.array_equal(before[name], after[name]) for name in before)
    diffuser_lite.mujoco([*RUN, "mode=inference", "test_model=R2"])
    diffuser_lite.mujoco([*RUN, "mode=inference", "diffusion_ckpt=all", "runtime=graph"])
    rows = json.loads((own / "inference_results_R1.json").read_text())
    assert [row["checkpoint"] for row in rows] == [2, 4, 6] and rows[0]["episodes"] == 2
    assert (folder / "results" / "figures" / "normalized_score.png").is_file()
    for command in (["lite_losses"], ["lite_scores", str(own / "inference_results_R1.json")]):
        monkeypatch.setattr(sys, "argv", ["make_figures.py", *command, "--output", "drawn"])
        assert figures.main() == 0
    assert {path.name for path in (folder / "drawn").iterdir()} >= {"loss_curve.png", "normalized_score.png"}
    assert "score" in capsys.readouterr().out


def test_q_learning_and_kitchen_plans(folder):
    small = [*SMALL, *STEPS, *PAIRS, "iql_gradient_steps=3", "iql_hidden_dim=16"]
    diffuser_lite.kitchen([*small, "mode=iql_training"])
    diffuser_lite.kitchen([*small, "mode=training"])
    own = folder / "results" / "diffuserlite_d4rl_kitchen" / "kitchen-mixed-v0"
    assert (own / "iql_ckpt_latest.pt").is_file() and (own / "diffusion1_ckpt_6.pt").is_file()


def test_a_backup_is_restored(folder):
    diffuser_lite.mujoco([*RUN, "mode=training", "results_dir=restored", "restore_from=backup"])
    for path in ("loss_log.json", f"diffuserlite_d4rl_mujoco/{TASK}/diffusion1_ckpt_4.pt"):
        assert (folder / "restored" / path).read_bytes() == (folder / "backup" / path).read_bytes()


def test_benchmark_says_how_often_it_decides(capsys):
    diffuser_lite.mujoco([*RUN, "mode=benchmark", "benchmark_decisions=3", "benchmark_warm_up=1", "runtime=graph"])
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    assert [(row["model"], row["batch"]) for row in rows] == [("R1", 1), ("R1", 2), ("R2", 1), ("R2", 2)]
    assert all(row["hz"] > 0 for row in rows)


def test_options():
    for path in (FOLDER / "task").glob("*.yaml"):
        kind = {"kitchen": "kitchen", "antmaze": "antmaze"}.get(path.stem.split("-")[0], "mujoco")
        assert parse(kind, [f"task={path.stem}"]).env_name == path.stem
    options = parse(
        "mujoco", ["task=hopper-medium-v2", "learning_rate=1e-3", "task.w_cfg_R1=3", "task.return_scale=9", "seed=4"]
    )
    assert (options.learning_rate, options.of_task("w_cfg"), options.seed) == (1e-3, 3.0, 4)
    assert options.task["return_scale"] == 9
    assert parse("kitchen", []).diffusion_ckpt == 200000
    for wrong, said in (
        ("sed=1", "did you mean seed"),
        ("seed=1.5", "whole number"),
        ("use_ema=1", "true or false"),
        ("task=hopper", "no such task"),
        ("mode=iql_training", "choose one of"),
        ("seed", "key=value"),
    ):
        with pytest.raises(UserError, match=said):
            parse("mujoco", [wrong])


def test_what_is_missing_is_named(tmp_path):
    where = [f"results_dir={tmp_path}", *RUN]
    for mode, said in (
        ("inference", "mode=training"),
        ("prepare_dataset", "mode=training"),
        ("reflow", "mode=training"),
    ):
        with pytest.raises(UserError, match=said):
            diffuser_lite.mujoco([*where, f"mode={mode}"])


def test_pictures_are_gathered_and_none_is_lost(tmp_path):
    for name in ("a/one.png", "b/one.png", "figures/two.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    assert len(lite_figures.organize_figures(tmp_path)) == 2
    found = {path.name: path.read_text() for path in (tmp_path / "figures").iterdir()}
    assert found == {"one.png": "a/one.png", "one_1.png": "b/one.png", "two.png": "figures/two.png"}
