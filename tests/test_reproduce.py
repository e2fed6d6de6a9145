"""The papers' figures as runs: what is listed, started, kept and drawn; and that the committed figures are what their
files give."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from diffusion_rl.cli import reproduce
from diffusion_rl.config.compose import REPOSITORY, compose_job
from diffusion_rl.core.errors import UserError
from diffusion_rl.reports.metrics import MetricsWriter
from diffusion_rl.reports.runs import Run, algorithm_labels

FIGURES = yaml.safe_load((REPOSITORY / "cfg" / "reproductions.yaml").read_text())


@pytest.mark.parametrize("budget", reproduce.BUDGETS)
@pytest.mark.parametrize("figure", FIGURES)
def test_every_run_has_a_configuration_and_a_name_of_its_own(figure, budget):
    runs = reproduce.trainings(FIGURES[figure], budget)
    assert len({(run.name, run.seed) for run in runs}) == len(runs)
    for run in runs:
        folder, name = (word.partition("=")[2] for word in run.command[1:3])
        assert (REPOSITORY / folder / f"{name}.yaml").is_file(), run.command


@pytest.mark.parametrize("budget", reproduce.BUDGETS)
def test_one_name_stands_for_one_command_in_all_figures(budget):
    """But for its iterations: a figure may take less of a run than another one."""
    commands: dict[tuple[str, int], list[str]] = {}
    for figure in FIGURES.values():
        for run in reproduce.trainings(figure, budget):
            command = [word for word in run.command if not word.startswith("train.n_train_itr=")]
            assert commands.setdefault((run.name, run.seed), command) == command, run.name


@pytest.mark.slow
@pytest.mark.parametrize("figure", FIGURES)
def test_the_commands_are_accepted(figure):
    for run in reproduce.trainings(FIGURES[figure], "small"):
        if run.seed == 0:
            folder, name = (word.partition("=")[2] for word in run.command[1:3])
            compose_job(name, run.command[3:], folder=REPOSITORY / folder)


def test_variants_of_one_configuration_are_two_lines_of_a_figure():
    run = next(run for run in reproduce.trainings(FIGURES["dpoer"], "small") if run.name.endswith("_corrected"))
    assert "+model.mode=corrected" in run.command
    folder, name = (word.partition("=")[2] for word in run.command[1:3])
    config = compose_job(name, run.command[3:], folder=REPOSITORY / folder)
    runs = [Run(Path(), str(n), "hopper-medium-v2", "0", [], "DPOER") for n in (config["name"], "hopper-medium-v2_sac")]
    assert algorithm_labels(runs) == ["DPOER corrected", "DPOER"]


def make_run(folder, iterations):
    with MetricsWriter(folder, tensorboard=False) as metrics:
        for itr in range(iterations):
            row = {"itr": itr, "kind": "eval", "env_steps": 1000 * itr, "episode_return": float(itr)}
            metrics.write(row)
    (folder / "config.yaml").write_text("name: hopper_ppo\nenv_name: hopper-medium-v2\nseed: 0\n")


def test_a_run_is_done_wherever_its_metrics_are(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    runs = reproduce.trainings(FIGURES["dpoer"], "small")
    make_run(runs[0].folder, 12)
    assert runs[0].done() == 12 and runs[0] in reproduce.missing_of(runs)
    assert reproduce.collect(runs) == [runs[0].collected]
    shutil.rmtree(runs[0].folder)
    assert runs[0].done() == 12 and reproduce.collect(runs) == []
    make_run(runs[0].folder, 31)
    assert reproduce.collect(runs) == [runs[0].collected] and runs[0] not in reproduce.missing_of(runs)
    assert reproduce.main(["dpoer"]) == 0
    shown = capsys.readouterr().out
    assert "0: 31, 1: 0, 2: 0" in shown and f"1 of {len(runs)} runs done" in shown and "resume=auto" in shown
    assert reproduce.main(["dpoer", "--draw"]) == 0
    assert (tmp_path / "figure" / "reproductions" / "dpoer.csv").is_file()
    with pytest.raises(UserError, match="nothing is collected yet"):
        reproduce.main(["figure5", "--draw"])
    with pytest.raises(UserError, match="figure9: the figures are figure4, "):
        reproduce.main(["figure9"])


def test_committed_figures_are_what_their_files_give(tmp_path):
    """Draws all of them again elsewhere: numbers and captions are the same, byte for byte."""
    committed = REPOSITORY / "figure"
    shutil.copytree(committed, tmp_path / "figure")
    command = [sys.executable, str(REPOSITORY / "script" / "reproduce.py"), "--draw"]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("python script/make_figures.py ") >= 12
    for file in committed.rglob("*"):
        if file.suffix in (".csv", ".txt"):
            assert (tmp_path / file.relative_to(REPOSITORY)).read_bytes() == file.read_bytes(), file


@pytest.mark.slow
def test_what_is_missing_is_launched(tmp_path):
    """One tiny figure of two seeds, two runs at a time; a second launch has nothing to do."""
    group = {
        "config": "gym/finetune/hopper-v2/ft_ppo_diffusion_mlp",
        "more": "env.n_envs=2 train.n_steps=5 train.batch_size=20 train.val_freq=1",
        "seed": [0, 1],
        "minutes": 1,
        "small": {"train.n_train_itr": 2},
        "paper": {"train.n_train_itr": 3},
    }
    described = {"tiny": {"about": "a test", "draw": "compare", "groups": [group]}}
    (tmp_path / "cfg").mkdir()
    (tmp_path / "cfg" / "reproductions.yaml").write_text(yaml.safe_dump(described))
    program = [sys.executable, str(REPOSITORY / "script" / "reproduce.py"), "tiny"]

    def run(*flags):
        ended = subprocess.run([*program, *flags], cwd=tmp_path, capture_output=True, text=True)
        assert ended.returncode == 0, ended.stdout + ended.stderr
        return ended.stdout

    assert "2 of 2 runs done" in run("--launch", "--collect", "--workers", "2")
    kept = tmp_path / "figure" / "reproductions" / "runs"
    assert [p.parent.name for p in sorted(kept.rglob("metrics.jsonl"))] == ["0", "1"]
    assert "2 of 2 runs done" in run("--launch")
    assert "0 of 2 runs done" in run("--budget", "paper")
    assert "2 of 2 runs done" in run("--budget", "paper", "--launch")
    assert Path(tmp_path / "log" / "reproductions").is_dir()
