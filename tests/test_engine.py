"""What the engine promises of every training: killed, interrupted, paused, out of disk or diverged, nothing is lost."""

import errno
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Container

import numpy as np
import pytest
import tensorflow as tf
from tests.engine_programs import FLOWS, PROGRAMS, prepare, surroundings
from tests.small_runs import assert_same_checkpoint, rows

from diffusion_rl.cli import figures
from diffusion_rl.cli.status import exit_status
from diffusion_rl.config.compose import REPOSITORY
from diffusion_rl.core.errors import UserError
from diffusion_rl.methods.diffuser_lite.domains import DOMAINS
from diffusion_rl.training.checkpoint import load_checkpoint, save_checkpoint
from diffusion_rl.training.loop import TrainingLoop
from diffusion_rl.training.run_dir import RunDir

QUICK_TO_KILL = ("Diffuser",)
QUICK_TO_FAIL = ("DPPO", "DiffuserLite")  # in how a run ends, the loops share the engine's code


def over_programs(quick: Container[str]) -> pytest.MarkDecorator:
    """Parametrises over all programs; those that are not quick are slow tests."""
    return pytest.mark.parametrize(
        "name", [pytest.param(n, marks=[pytest.mark.slow] * (n not in quick)) for n in PROGRAMS]
    )


every_program = over_programs(PROGRAMS.keys() - FLOWS)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder with everything that the programs read."""
    folder, before = tmp_path_factory.mktemp("engine"), os.environ.get("D4RL_DATASET_DIR")
    domain = DOMAINS["mujoco"]
    surroundings(folder)
    prepare(folder)
    yield folder
    tf.config.run_functions_eagerly(False)
    DOMAINS["mujoco"] = domain
    if before is None:
        del os.environ["D4RL_DATASET_DIR"]
    else:
        os.environ["D4RL_DATASET_DIR"] = before


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """name -> the folder of an uninterrupted run."""
    done = {}

    def run_once(name):
        if name not in done:
            done[name] = begun(name, data, tmp_path_factory.mktemp("whole"))
            PROGRAMS[name].train(data, done[name])
        return done[name]

    return run_once


def begun(name, data, folder):
    """The folder, with what the program's run begins from."""
    PROGRAMS[name].begin(data, folder)
    return folder


def assert_same_run(name, one, other):
    """The last state to the bit, and every row of the metrics."""
    program = PROGRAMS[name]
    first, second = (folder / program.run_dir for folder in (one, other))
    assert_same_checkpoint(first / program.last, second / program.last)
    assert rows(first) == rows(second)


def states(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*state_*.safetensors")}


def at_turn(monkeypatch, n, act):
    """Call `act(loop)` when the steps of the n-th turn of a loop have been made."""
    original, turns = TrainingLoop._log, []

    def log(self):
        turns.append(None)
        if len(turns) == n:
            act(self)
        original(self)

    monkeypatch.setattr(TrainingLoop, "_log", log)


@every_program
def test_every_run_has_the_same_folder(whole, name, tmp_path, monkeypatch):
    folder = whole(name) / PROGRAMS[name].run_dir
    assert {"config.yaml", "metrics.jsonl", "metrics.csv", ".lock"} <= {path.name for path in folder.iterdir()}
    drawn = tmp_path / "curve.png"
    monkeypatch.setattr(sys, "argv", ["make_figures.py", "learning_curve", str(folder), "--output", str(drawn)])
    if name not in ("RLPD", "DSRL"):  # their few steps end no episode
        assert figures.main() == 0 and drawn.stat().st_size > 10_000


@over_programs(QUICK_TO_FAIL)
def test_two_signals_are_one_and_two_runs_do_not_mix(data, whole, name, tmp_path, monkeypatch, capsys):
    program, folder = PROGRAMS[name], begun(name, data, tmp_path / "run")
    refused = []

    def stop(loop):
        with pytest.raises(UserError, match="another process is writing to .*: wait for it, stop it, or ") as error:
            program.train(data, folder, go_on=True)
        refused.append(str(error.value))
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)

    at_turn(monkeypatch, 2, stop)
    assert exit_status(lambda: program.train(data, folder)) == 130
    assert len(refused) == 1 and "\n" not in refused[0]
    line = capsys.readouterr().err.strip().splitlines()[-1]
    go_on = program.go_on.format(run_dir=folder / program.run_dir)
    found = re.fullmatch(rf"stopped by SIGTERM; state saved in (.*state_.*); go on with {re.escape(go_on)}", line)
    assert found and load_checkpoint(found[1]).metadata["keep"] in (True, False), line
    program.train(data, folder, go_on=True)
    assert_same_run(name, folder, whole(name))


@every_program
def test_a_run_in_two_phases_is_one_run(data, whole, name, tmp_path, capsys):
    program, folder = PROGRAMS[name], begun(name, data, tmp_path / "run")
    stop = 4 if name == "VAE" else 3
    program.train(data, folder, stop_at=stop)
    assert re.search(rf"stopped after {stop} of \d+ \w+s, as stop_at says; state saved in", capsys.readouterr().out)
    program.train(data, folder, go_on=True, stop_at=stop)  # nothing is left of this phase
    shutil.copytree(folder, tmp_path / "backup")
    shutil.rmtree(folder)
    shutil.copytree(tmp_path / "backup", folder)
    program.train(data, folder, go_on=True)
    assert_same_run(name, folder, whole(name))


@over_programs(QUICK_TO_FAIL)
def test_a_disk_that_is_full(data, whole, name, tmp_path, monkeypatch):
    program, folder = PROGRAMS[name], begun(name, data, tmp_path / "run")
    original, saved = RunDir._save, []

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def save(self, keep):
        if saved:
            monkeypatch.setattr(os, "fsync", full)
        original(self, keep)
        saved.append(states(folder))

    monkeypatch.setattr(RunDir, "_save", save)
    with pytest.raises(
        UserError, match="cannot write .*: No space left on device .*; nothing was overwritten"
    ) as error:
        program.train(data, folder)
    assert "\n" not in str(error.value) and states(folder) == saved[0]
    monkeypatch.undo()
    program.train(data, folder, go_on=True)
    assert_same_run(name, folder, whole(name))


@over_programs(QUICK_TO_FAIL)
def test_a_loss_that_is_not_a_number(data, whole, name, tmp_path, monkeypatch):
    program, folder = PROGRAMS[name], begun(name, data, tmp_path / "run")

    def diverge(loop):
        loop.check_finite({"the loss": np.array([0.5, np.nan])}, loop.number)

    at_turn(monkeypatch, 2, diverge)
    with pytest.raises(UserError, match=r"the loss is nan in \w+ \d+: lower .*; the last good state is ") as error:
        program.train(data, folder)
    assert "\n" not in str(error.value)
    monkeypatch.undo()
    program.train(data, folder, go_on=True)
    assert_same_run(name, folder, whole(name))


def test_a_folder_of_an_earlier_version_goes_on(data, whole, tmp_path):
    """There a signal wrote the state under the label of its step, and nothing said whether it was to stay."""
    program = PROGRAMS["Diffuser"]
    program.train(data, tmp_path, stop_at=4)
    folder = tmp_path / program.run_dir
    for path in folder.glob("state_*"):
        checkpoint = load_checkpoint(path)
        path.unlink()
        del checkpoint.metadata["keep"]
    checkpoint.metadata["config"].pop("stop_at")
    assert checkpoint.metadata["step"] in (3, 4)
    save_checkpoint(folder / "state_0.safetensors", checkpoint.tensors, checkpoint.metadata)
    (folder / "config.yaml").unlink()
    program.train(data, tmp_path, go_on=True)
    assert_same_run("Diffuser", tmp_path, whole("Diffuser"))


@pytest.mark.parametrize("name", ["DPPO", "Diffuser", "DiffuserLite"])
def test_weights_that_are_not_numbers_are_not_saved(data, name, tmp_path, monkeypatch):
    program, folder, original = PROGRAMS[name], begun(name, data, tmp_path / "run"), RunDir.remember
    saved = []

    def remember(self, number, tensors, metadata, keep):
        if saved:
            bad = next(key for key in tensors if ".weight" in key)
            tensors = {**tensors, bad: tensors[bad] * np.nan}
        original(self, number, tensors, metadata, keep)
        saved.append(number)

    monkeypatch.setattr(RunDir, "remember", remember)
    with pytest.raises(UserError, match="is no longer finite after .*: the training has diverged, lower .*; the last"):
        program.train(data, folder)
    for path in states(folder):
        assert all(np.isfinite(v).all() for v in load_checkpoint(path).tensors.values() if v.dtype.kind == "f")


@over_programs(QUICK_TO_KILL)
def test_killed_at_any_moment(data, whole, name, tmp_path):
    program, folder = PROGRAMS[name], begun(name, data, tmp_path / "run")
    command = [sys.executable, "-m", "tests.engine_programs", name, str(data), str(folder)]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": f"{REPOSITORY / 'code'}:{REPOSITORY}"}
    draw, metrics = random.Random(time.time_ns()), folder / program.run_dir / "metrics.jsonl"
    with subprocess.Popen(command, cwd=REPOSITORY, env=environment, stderr=subprocess.PIPE, text=True) as process:
        until = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < until and not (metrics.exists() and metrics.stat().st_size):
            time.sleep(0.002)
        time.sleep(draw.uniform(0, 0.3))
        process.kill()
    program.train(data, folder, go_on=True)
    assert_same_run(name, folder, whole(name))
