"""Scripted demonstrations of robomimic's tasks: what the commands write, and the data that ship."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from diffusion_rl.data.episodes import load_episodes, read_npz
from diffusion_rl.data.validate import validate
from diffusion_rl.generate import robomimic as demos

REPOSITORY = Path(__file__).resolve().parents[1]
SHIPPED = sorted(path.parent for path in (REPOSITORY / "data" / "robomimic").glob(f"*/{demos.SIMULATOR_FILE}"))


def run(script: str, *args) -> subprocess.CompletedProcess:
    command = [sys.executable, REPOSITORY / "script" / "dataset" / script, *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.slow
def test_from_the_command_line(tmp_path):
    pytest.importorskip("robosuite", reason='needs pip install -e ".[robomimic]"')
    states, pictures = tmp_path / "lift", tmp_path / "lift-img"
    options = ("lift", "--attempts", 2, "--seed", 5, "--noise", 0.1, "--shown", 1)
    ended = run("make_robomimic_demos.py", *options, "--out-dir", states)
    assert ended.returncode == 0, ended.stderr
    assert "lift 2/2: success" in ended.stdout and "2 episodes" in ended.stdout
    episodes, saved = load_episodes(states / "train.npz"), read_npz(states / demos.SIMULATOR_FILE)
    first = episodes.select([0])
    assert len(saved["states"]) == len(first.states) and saved["seed"] == 5
    assert episodes.returns.tolist() == [demos.HOLD + 1] * 2 and not episodes.terminals.any()
    measured = run("make_robomimic_demos.py", "lift", "--attempts", 1, "--measure", "--out-dir", tmp_path / "none")
    assert "so far 1 (100%)" in measured.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["lift"], "measuring writes nothing"

    ended = run("render_robomimic_demos.py", "lift", "--source", states, "--out-dir", pictures)
    assert ended.returncode == 0, ended.stderr
    seen = load_episodes(pictures / "train.npz")
    assert "pictures of the first 1 of 2 episodes" in ended.stdout
    assert seen.images.shape == (len(first.states), 3, 96, 96) and seen.images.std() > 20
    np.testing.assert_array_equal(seen.states, first.states[:, :9])
    np.testing.assert_array_equal(seen.actions, first.actions)
    assert any("images (3, 96, 96)" in line for line in validate(pictures))


@pytest.mark.parametrize("task", ["lift", "can", "square"])
def test_an_expert_succeeds_and_its_states_can_be_shown(task):
    """Observations of the saved simulator states are those that were recorded."""
    pytest.importorskip("robosuite", reason='needs pip install -e ".[robomimic]"')
    env = demos.make_env(task, seed=1)
    demonstration, success = demos.demonstrate(env, task, 1, demos.Settings(noise=0.1))
    assert success and len(demonstration.actions) < demos.STEPS[task]
    assert np.abs(demonstration.actions).max() <= 1
    for step in (0, 20, len(demonstration.actions) - 1):
        shown = np.concatenate(list(env.show(demonstration.simulator[step]).values()))
        # robosuite samples an observation a few physics steps before the end of an action
        np.testing.assert_allclose(shown, demonstration.states[step], atol=5e-3)
    env.close()


@pytest.mark.parametrize("folder", SHIPPED, ids=lambda folder: folder.name)
def test_the_shipped_data(folder):
    assert sum(path.stat().st_size for path in folder.glob("*.npz")) <= 8_000_000
    text = "\n".join(validate(folder))
    episodes, saved = load_episodes(folder / "train.npz"), read_npz(folder / demos.SIMULATOR_FILE)
    assert len(saved["states"]) in np.cumsum(episodes.traj_lengths) and episodes.returns.min() > 0
    found = f"| {folder.name} | {len(episodes.traj_lengths)} | {len(episodes.states)} |"
    assert found in (folder.parent / "README.md").read_text(), text
