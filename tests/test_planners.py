"""The planners end to end on a small made-up data set: train, resume, values, guided and unguided plans, results."""

import json
import os
import pickle
from ctypes.util import find_library

import h5py
import numpy as np
import pytest
from matplotlib.image import imread
from tests.small_runs import eagerly

from diffusion_rl.cli import commands, diffuser
from diffusion_rl.core.errors import UserError
from diffusion_rl.core.noise import NoiseSource
from diffusion_rl.envs.locomotion import LocomotionVectorEnv
from diffusion_rl.export.saved import open_policy
from diffusion_rl.methods.diffuser.files import load_experiment
from diffusion_rl.methods.diffuser.pictures import Renderer
from diffusion_rl.reports.pictures import frames
from diffusion_rl.reports.plan_results import bars_of, plan_scores
from diffusion_rl.training.checkpoint import load_checkpoint, save_checkpoint

NAME = "hopper-medium-v2"
SIZE = ["--dataset", NAME, "--horizon", "4", "--n_diffusion_steps", "3", "--seed", "0"]
TRAIN = [*SIZE, "--dim_mults", "(1,)", "--n_saves", "2", "--save_freq", "3", "--batch_size", "4", "--sample_freq", "0"]
PLAN = [*SIZE, "--max_episode_length", "4", "--batch_size", "3"]


@pytest.fixture(scope="module", autouse=True)
def folder(tmp_path_factory):
    """A working directory with three episodes of Hopper's dimensions under D4RL's file name, and trained models."""
    draw, n, folder = NoiseSource(0), 60, tmp_path_factory.mktemp("planners")
    ends = np.isin(np.arange(n), (19, 39, 59))
    with h5py.File(folder / "hopper_medium-v2.hdf5", "w") as file:
        file["observations"] = draw.normal((n, 11))
        file["actions"] = draw.uniform((n, 3), -1, 1)
        file["rewards"] = draw.normal((n,))
        file["terminals"] = ends & (np.arange(n) == 19)
        file["timeouts"] = ends & (np.arange(n) != 19)
    before, environment = os.getcwd(), os.environ.get("D4RL_DATASET_DIR")
    os.environ["D4RL_DATASET_DIR"] = str(folder)
    os.chdir(folder)
    with eagerly():
        diffuser.train([*TRAIN, "--n_train_steps", "6"])
        diffuser.train_values([*TRAIN, "--n_train_steps", "3", "--discount", "0.997"])
    yield folder
    os.chdir(before)
    if environment is None:
        del os.environ["D4RL_DATASET_DIR"]
    else:
        os.environ["D4RL_DATASET_DIR"] = environment


@pytest.fixture
def trained(folder):
    return folder / "logs" / NAME / "diffusion" / "defaults_H4_T3"


def test_what_training_leaves(trained):
    names = {path.name for path in trained.iterdir()}
    assert {"args.json", "diff.txt", "metrics.jsonl", "state_0.safetensors", "state_6.safetensors"} <= names
    for part in ("dataset", "model", "diffusion", "trainer", "render"):
        facts = json.loads((trained / f"{part}_config.json").read_text())
        assert pickle.loads((trained / f"{part}_config.pkl").read_bytes()) == facts


def test_plans_and_results(folder, capsys):
    diffuser.plan_guided(PLAN)
    rollout = json.loads((folder / "logs" / NAME / "plans" / "H4_T3_d0.997" / "0" / "rollout.json").read_text())
    assert sorted(rollout) == ["epoch_diffusion", "epoch_value", "return", "score", "step", "term"]
    assert (rollout["epoch_diffusion"], rollout["epoch_value"]) == (6, 3) and isinstance(rollout["term"], bool)
    diffuser.plan_unguided([*PLAN, "--n_envs", "2", "--n_exec", "2"])  # with the model of states and actions
    unguided = folder / "logs" / NAME / "plans" / "unguided_H4_T3"
    second = json.loads((unguided / "0-1" / "rollout.json").read_text())
    assert sorted(second) == ["epoch_diffusion", "return", "score", "step", "term"]
    assert len(json.loads((unguided / "0" / "action_stats.json").read_text())["std"]) == 3
    assert json.loads((unguided / "0" / "latency.json").read_text())["milliseconds_per_decision"] > 0
    capsys.readouterr()
    commands.read_results(["--logbase", "logs"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 and lines[2].endswith("| 2 scores ")
    commands.read_results([])
    found = capsys.readouterr()
    assert found.out.splitlines() == lines and "below logs/pretrained: those below logs" in found.err


@pytest.mark.slow
@pytest.mark.skipif(not any(map(find_library, ("EGL", "OSMesa"))), reason="no library that renders off-screen")
def test_plans_are_filmed(folder):
    pytest.importorskip("imageio_ffmpeg")
    diffuser.plan_guided([*PLAN, "--render", "True", "--vis_freq", "2", "--suffix", "film"])
    films = folder / "logs" / NAME / "plans" / "H4_T3_d0.997" / "film"
    assert all((films / name).stat().st_size for name in ("0_plan.mp4", "0.png", "2_plan.mp4", "2.png", "rollout.mp4"))
    first = frames(films / "0_plan.mp4")
    assert len(first) == 4 and first[0].shape == (240, 640, 3)  # planned beside simulated


def test_actions_alone_are_never_guided(folder):
    with eagerly():
        diffuser.train([*TRAIN, "--n_train_steps", "1", "--diffusion_type", "actions_only"])
    assert (folder / "logs" / NAME / "diffusion" / "actions_H4_T3" / "state_1.safetensors").is_file()
    diffuser.plan_unguided([*PLAN, "--aggregate", "medoid", "--suffix", "1"])
    with pytest.raises(UserError, match="actions only"):
        diffuser.plan_guided([*PLAN, "--diffusion_loadpath", "f:diffusion/actions_H{horizon}_T{n_diffusion_steps}"])


def test_what_resuming_cannot_change(folder):
    parts = [*TRAIN, "--logbase", "parts"]
    with eagerly():
        diffuser.train([*parts, "--n_train_steps", "1"])
    with pytest.raises(UserError, match="that run has seed=0 .now 9., which resuming cannot change"):
        place = parts.index("--seed") + 1
        diffuser.train([*parts[:place], "9", *parts[place + 1 :], "--n_train_steps", "6", "--resume", "True"])
    with pytest.raises(UserError, match="that run has diffusion.loss_type=l2 .now l1., which resuming cannot change"):
        diffuser.train([*parts, "--n_train_steps", "6", "--resume", "True", "--loss_type", "l1"])
    with pytest.raises(UserError, match="--resume True"):
        diffuser.train([*parts, "--n_train_steps", "6"])


def test_planners_are_not_exported(trained, tmp_path):
    with pytest.raises(UserError, match=r"state_6.safetensors is a planner's .diffuser., which runs in scripts"):
        open_policy(trained / "state_6.safetensors")


def test_what_is_not_finite_is_neither_saved_nor_loaded(folder, trained):
    with eagerly(), pytest.raises(UserError, match="no longer finite|the loss is nan|the loss is inf"):
        ruined = ["--logbase", "ruined", "--n_train_steps", "9", "--learning_rate", "1e38"]
        diffuser.train([*TRAIN, *ruined])
    for path in (folder / "ruined").rglob("state_*"):
        assert all(np.isfinite(each).all() for each in load_checkpoint(path).tensors.values())
    checkpoint, bad = load_checkpoint(trained / "state_6.safetensors"), folder / "bad"
    name = next(name for name in checkpoint.tensors if name.startswith("ema."))
    checkpoint.tensors[name][...] = np.nan
    save_checkpoint(bad / "state_6.safetensors", checkpoint.tensors, checkpoint.metadata)
    with pytest.raises(UserError, match="bad/state_6.safetensors: weight .* is not finite"):
        load_experiment(bad)


@pytest.mark.parametrize(
    ("part", "change"),
    [
        ("model", {"dim_mults": [1, 10**6]}),
        ("model", {"transition_dim": 10**9}),
        ("model", {"horizon": 10**9}),
        ("model", {"class": "os.system"}),
        ("model", {"nothing": 1}),
        ("model", {"dim_mults": "x"}),
        ("diffusion", {"n_timesteps": 10**9}),
        ("diffusion", {"observation_dim": -1}),
        ("diffusion", {"loss_weights": 3}),
        ("dataset", {"normalizer": "os.system"}),
    ],
)
def test_facts_of_a_checkpoint_that_do_not_fit_its_weights(tmp_path, trained, part, change):
    checkpoint = load_checkpoint(trained / "state_6.safetensors")
    checkpoint.metadata["description"][part] |= change
    save_checkpoint(tmp_path / "state_6.safetensors", checkpoint.tensors, checkpoint.metadata)
    with pytest.raises(UserError):
        load_experiment(tmp_path)


def test_the_last_steps_have_a_tenth_of_the_rate(folder):
    final = []
    for base, runs in {
        "decayed": [["6", "--lr_decay_steps", "2"]],
        "by_hand": [["4"], ["6", "--lr_scale", "0.1", "--resume", "True"]],
        "resumed": [["6", "--lr_decay_steps", "2"], ["6", "--lr_decay_steps", "2", "--resume", "3"]],
    }.items():
        for n_train_steps, *more in runs:
            with eagerly():
                diffuser.train([*TRAIN, "--logbase", base, "--n_train_steps", n_train_steps, *more])
        state = load_checkpoint(folder / base / NAME / "diffusion" / "defaults_H4_T3" / "state_6.safetensors")
        final.append(state.select("model."))
    for other in final[1:]:
        for name, value in final[0].items():
            np.testing.assert_array_equal(value, other[name], err_msg=name)


def test_what_is_missing_is_named(trained):
    with pytest.raises(UserError, match="train a model first"):
        diffuser.plan_guided([*PLAN, "--logbase", "elsewhere"])
    with pytest.raises(
        UserError,
        match="walker2d_expert-v2.hdf5 is not here .*: get it from http.*make_gym_data.py walker2d --flavour expert",
    ):
        diffuser.train(["--dataset", "walker2d-expert-v2", *TRAIN[2:]])
    assert not (trained.parents[2] / "walker2d-expert-v2").exists()
    with pytest.raises(UserError, match="no checkpoint 5 in .* there are 0, 3, 6"):
        load_experiment(trained, epoch="5")
    with pytest.raises(UserError, match=r"defaults_H4_T3_d0.99; there are .*--discount"):
        diffuser.plan_guided([*PLAN, "--discount", "0.99"])


def test_the_documents_commands_follow_each_other(folder, capsys):
    """Values are trained with another discount than plans look for by default: the only ones there are taken."""
    own = ["--logbase", "as_spelled"]
    with eagerly():
        diffuser.train([*TRAIN, *own, "--n_train_steps", "1"])
    with pytest.raises(UserError, match="train a value .python scripts/train_values.py., or plan without one"):
        diffuser.plan_guided([*PLAN, *own])
    with eagerly():
        diffuser.train_values([*TRAIN, *own, "--n_train_steps", "1"])
    capsys.readouterr()
    plain = [*PLAN[:2], *PLAN[6:], *own]  # without the model's horizon and steps
    diffuser.plan_guided(plain)
    said = capsys.readouterr().out
    assert "no diffusion/defaults_H32_T20: planning with diffusion/defaults_H4_T3, the only one there" in said
    assert "no values/defaults_H4_T3_d0.997: planning with values/defaults_H4_T3_d0.99, the only one there" in said
    assert (folder / "as_spelled" / NAME / "plans" / "H4_T3_d0.99" / "0" / "rollout.json").is_file()
    diffuser.plan_unguided([*plain, "--suffix", "u"])
    assert "no diffusion/actions_H32_T20: planning with diffusion/defaults_H4_T3, the only" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"defaults_H4_T3_d0.997; there are values/defaults_H4_T3_d0.99: .*--discount"):
        diffuser.plan_guided([*plain, "--discount", "0.997"])
    with pytest.raises(UserError, match="no checkpoint in .*diffusion/actions_H8_T20; there are"):
        diffuser.plan_unguided([*plain, "--horizon", "8"])
    with eagerly():
        diffuser.train_values([*TRAIN, *own, "--n_train_steps", "1", "--discount", "0.9"])
    with pytest.raises(UserError, match=r"there are .*_d0.9, .*_d0.99: choose one with --discount"):
        diffuser.plan_guided(plain)
    diffuser.plan_guided([*plain, "--discount", "0.9"])


@pytest.mark.slow
def test_pictures_of_samples_leave_the_training_as_it_is(folder, capsys):
    """Equal weights with and without; resumed, the same pictures."""
    place = TRAIN.index("--sample_freq")
    lines = [*TRAIN[:place], "--n_train_steps", "6", "--renderer", "utils.LineRenderer", "--n_reference", "2"]
    runs = {
        "plain": [["--sample_freq", "0"]],
        "drawn": [["--sample_freq", "2"]],
        "again": [["--sample_freq", "2", "--stop_at", "3"], ["--sample_freq", "2", "--resume", "True"]],
    }
    found, pictures = [], []
    for base, parts in runs.items():
        for part in parts:
            with eagerly():
                diffuser.train([*lines, "--logbase", base, *part])
        run = folder / base / NAME / "diffusion" / "defaults_H4_T3"
        found.append(load_checkpoint(run / "state_6.safetensors"))
        pictures.append({path.name: path.read_bytes() for path in run.glob("*.png")})
    for other in found[1:]:
        for name, value in found[0].tensors.items():
            if name != "train.shown":
                np.testing.assert_array_equal(value, other.tensors[name], err_msg=name)
        assert found[0].metadata["train"]["noise"] == other.metadata["train"]["noise"]
    assert found[1].metadata["train"] == found[2].metadata["train"]
    names = {"_sample-reference.png", *(f"sample-{step}-{i}.png" for step in (0, 2, 4) for i in (0, 1))}
    assert not pictures[0] and {*pictures[1]} == names and pictures[1] == pictures[2]
    with pytest.raises(UserError, match="a value has no samples"):
        diffuser.train_values([*TRAIN[:place], "--sample_freq", "2"])


def test_plans_are_drawn_as_lines_where_nothing_renders(tmp_path, monkeypatch):
    def nothing(self, path):
        raise UserError("cannot render here")

    monkeypatch.setattr(LocomotionVectorEnv, "recorder", nothing)
    said, draw = [], NoiseSource(0)
    renderer = Renderer("utils.MuJoCoRenderer", NAME, tmp_path, said.append)
    for name in ("one.png", "two.png"):
        renderer.composite(name, draw.normal((2, 4, 11)), draw.normal((2, 4, 3)))
    assert said == ["cannot render here: plans are drawn as lines"]
    assert all((tmp_path / name).stat().st_size > 1000 for name in ("one.png", "two.png"))


@pytest.mark.skipif(not any(map(find_library, ("EGL", "OSMesa"))), reason="no library that renders off-screen")
@pytest.mark.parametrize("steps", [8, 1])
def test_plans_are_drawn_by_mujoco(tmp_path, steps):
    """Planned states, or where actions alone are planned what the simulator makes of them."""
    draw = NoiseSource(0)
    observations = 0.1 * draw.normal((2, steps, 11)) + np.append(1.25, np.zeros(10))
    Renderer("utils.MuJoCoRenderer", NAME, tmp_path).composite("x.png", observations, draw.uniform((2, 8, 3), -1, 1))
    assert imread(tmp_path / "x.png").shape[:2] == (2 * 240, 6 * 320)


def test_scores_with_home_made_data_are_marked(tmp_path, capsys):
    for dataset, made in (("hopper-medium-v2", True), ("hopper-medium-expert-v2", False)):
        trial = tmp_path / dataset / "plans" / "x" / "0"
        trial.mkdir(parents=True)
        (trial / "rollout.json").write_text(json.dumps({"score": 0.99, "epoch_value": 1}))
        (trial / "args.json").write_text(json.dumps({"home_made_data": made}))
    commands.table(["--logbase", str(tmp_path)])
    printed = capsys.readouterr().out
    assert r"$99.0^\dagger$ \scriptsize" in printed and r"$99.0$ \scriptsize" in printed
    assert "Averages are over what all have: hopper-medium-v2, hopper-medium-expert-v2." in printed
    assert "52.7 &" in printed  # behaviour cloning's average over these two
    (tmp_path / "hopper-medium-v2" / "plans" / "x" / "0" / "args.json").write_text("[1]")
    commands.table(["--logbase", str(tmp_path)])
    assert "dagger" not in capsys.readouterr().out


def test_scores_are_drawn_beside_each_other(tmp_path):
    for name, scores in (("guided", (0.5, 0.7)), ("single", (0.4, 0.4))):
        for i, score in enumerate(scores):
            trial = tmp_path / "hopper-medium-expert-v2" / "plans" / name / str(i)
            trial.mkdir(parents=True)
            (trial / "rollout.json").write_text(json.dumps({"score": score}))
    bars = bars_of(tmp_path, ["single=one plan"], ["cloned: 2:hopper-medium-expert-v2=30,1"])
    assert bars == [
        ("hopper-medium-expert-v2", "one plan", 40, 0, 2),
        ("hopper-medium-expert-v2", "cloned: 2", 30, 1, 0),
    ]
    assert [(bar.label, round(bar.mean)) for bar in bars_of(tmp_path, [])] == [("guided", 60), ("single", 40)]
    picture = plan_scores(bars, tmp_path / "scores.png", "the command")
    assert picture.stat().st_size > 5000
    assert picture.with_suffix(".csv").read_text().splitlines()[0] == "# made by: the command"
    with pytest.raises(UserError, match="no finished plans"):
        bars_of(tmp_path, ["other=x"])
    with pytest.raises(UserError, match="MEAN,ERROR"):
        bars_of(tmp_path, [], ["cloned:hopper-medium-expert-v2=30"])
