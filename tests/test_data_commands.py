"""Command lines of the tools under script/dataset with what cannot work: one line, status 2, nothing written."""

import os
import runpy
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest

SCRIPTS = Path(__file__).resolve().parents[1] / "script" / "dataset"
MAZE = ("make_maze2d_data.py", "maze2d-umaze-v1", "--output", "out/m.hdf5", "--steps", "50")
AVOIDING = ("make_avoiding_demos.py", "m1", "--out-dir", "out")
CONVERT = ("convert.py", "good.hdf5", "out")
ROBOMIMIC = ("process_robomimic_dataset.py", "--load_path", "good.hdf5", "--save_dir", "out")
DEMOS = ("make_robomimic_demos.py", "lift", "--out-dir", "out")
MPE = ("make_mpe_data.py", "--data_dir", "out")

WRONG = [
    ([*MAZE, "--steps", "0"], "--steps 0 must be at least 1"),
    ([*MAZE, "--steps", "-5"], "--steps -5"),
    ([*MAZE, "--seed", "-1"], "--seed -1 must be at least 0"),
    ([*MAZE, "--seed", "99999999999"], "--seed 99999999999 must be at least 0 and at most 2147483647"),
    ([*MAZE, "--output", "."], "it is a folder"),
    ([*MAZE, "--output", "text/m.hdf5"], "cannot write text/m.hdf5"),
    ([*MAZE, "--output", "/proc/x/m.hdf5"], "cannot write /proc/x/m.hdf5"),
    (["make_maze2d_data.py", "../x"], "'../x' is no maze"),
    ([*AVOIDING, "--per-mode", "0"], "--per-mode 0"),
    ([*AVOIDING, "--seed", "-1"], "--seed -1"),
    ([*AVOIDING, "--recordings", "text"], "text holds no .pkl files"),
    ([*CONVERT, "--seed", "-1", "--val-split", "0.5"], "--seed -1"),
    ([*CONVERT, "--val-split", "nan"], "the validation share"),
    ([*CONVERT, "--val-split", "1"], "the validation share"),
    ([*CONVERT, "--max-episodes", "0"], "the number of episodes to take must be at least 1, got 0"),
    ([*CONVERT, "--max-episodes", "-3"], "the number of episodes to take"),
    (["convert.py", "text", "out"], "text is not an HDF5 or npz file"),
    (["convert.py", "pipe", "out"], "pipe is a named pipe"),
    (["convert.py", "good.hdf5", "text"], "cannot write text/train.npz"),
    ([*ROBOMIMIC, "--max_episodes", "0"], "the number of episodes to take"),
    ([*ROBOMIMIC, "--max_episodes", "-2"], "the number of episodes to take"),
    ([*ROBOMIMIC, "--seed", "-1"], "--seed -1"),
    (["validate.py", "text"], "no such folder: text"),
    (["validate.py", "."], "no such file: train.npz"),
    (["replay_avoiding.py", "text"], "text holds no .pkl files"),
    ([*MPE, "--episodes", "0"], "--episodes 0"),
    ([*MPE, "--episodes", "-1"], "--episodes -1"),
    ([*MPE, "--episodes", "10000000000"], "--episodes 10000000000"),
    (["make_mpe_data.py", "--data_dir", "text"], "cannot write text/mpe"),
    ([*DEMOS, "--attempts", "0"], "--attempts 0"),
    ([*DEMOS, "--noise", "-1"], "--noise -1"),
    ([*DEMOS, "--noise", "inf"], "--noise inf"),
    ([*DEMOS, "--speed", "0"], "--speed 0.0 must be above 0"),
    ([*DEMOS, "--speed", "2"], "--speed 2.0"),
    ([*DEMOS, "--out-dir", "text/x"], "cannot write text/x/train.npz"),
    (["render_robomimic_demos.py", "lift", "--source", "text", "--out-dir", "out"], "no such file: text/train.npz"),
]


def last_of_each_option(command):
    """The command with the last of an option that stands twice."""
    earlier = [i for i, word in enumerate(command) if word.startswith("--") and word in command[i + 1 :]]
    return [word for i, word in enumerate(command) if i not in earlier and i - 1 not in earlier]


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text").write_text("x")
    os.mkfifo(tmp_path / "pipe")
    with h5py.File(tmp_path / "good.hdf5", "w") as file:
        arrays = {"observations": np.zeros((20, 3)), "actions": np.zeros((20, 2)), "rewards": np.ones(20)}
        for name, value in (arrays | {"terminals": np.arange(20) == 19}).items():
            file[name] = value
    return tmp_path


@pytest.mark.parametrize(("command", "problem"), WRONG, ids=lambda value: value if isinstance(value, str) else None)
def test_what_cannot_work_is_one_line(command, problem, here, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", last_of_each_option(command))
    monkeypatch.setattr(sys, "path", list(sys.path))
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(SCRIPTS / command[0]), run_name="__main__")
    shown = capsys.readouterr()
    assert ended.value.code == 2 and shown.err.count("\n") == 1 and shown.err.startswith("error: "), shown.err
    assert problem in shown.err and not shown.out
    files = sorted(str(path.relative_to(here)) for path in here.rglob("*") if not path.is_dir())
    assert files == ["good.hdf5", "pipe", "text"]
