"""The exploration figure of the avoiding task: its numbers by hand, and the command with the shipped policies."""

from __future__ import annotations

import csv
import importlib.util
from typing import Any

import numpy as np
import pytest

from diffusion_rl.reports import exploration

HAS_SIMULATOR = all(importlib.util.find_spec(name) for name in ("mujoco", "robosuite"))
THROUGH_5 = np.array([[0.52, -0.28], [0.6, -0.1], [0.36, 0.08], [0.3, 0.26], [0.3, 0.41]])
THROUGH_6 = np.array([[0.52, -0.28], [0.6, -0.1], [0.36, 0.08], [0.43, 0.26], [0.43, 0.41]])


def test_numbers_by_hand() -> None:
    # Two paths through gap 5, 0.02 m apart from the first row on, so their deviation from the mean is 0.01 m in each
    # row; one through gap 6 that collided; one that stops before the third row.
    aside = THROUGH_5 + [[0, 0], [0.02, 0], [0.02, 0], [0.02, 0], [0.02, 0]]
    panel = exploration.Panel(
        "m1", "diffusion", [THROUGH_5, aside, THROUGH_6, THROUGH_5[:3]], np.array([False, False, True, False])
    )
    numbers = exploration.measure(panel, [THROUGH_5, THROUGH_6])
    assert numbers.distinct_modes == 1 and numbers.taken == {(1, 2, 5): 2}
    assert numbers.finishing == 0.5 and numbers.colliding == 0.25
    assert numbers.spread == pytest.approx(10.0)
    # Only `aside` leaves the data: by 0.02 m in four of five positions; a mean over four paths.
    assert numbers.off_data == pytest.approx(1e3 * (0.8 * 0.02) / 4)


def test_figure_and_table(tmp_path) -> None:
    data = exploration.Panel("m1", "data", [THROUGH_5, THROUGH_6], np.zeros(2, bool))
    wild = exploration.Panel("m1", "gaussian", [THROUGH_6[:2]], np.ones(1, bool))
    path, text = exploration.draw([data, wild], tmp_path / "a.png", "python a")
    assert path.read_bytes().startswith(b"\x89PNG") and "2 distinct modes (1-2-5: 1, 1-2-6: 1)" in text
    lines = path.with_suffix(".csv").read_text().splitlines()
    rows = list(csv.DictReader(line for line in lines if not line.startswith("#")))
    assert lines[0] == "# made by: python a"
    assert [(row["policy"], row["finishing"], row["colliding"]) for row in rows] == [
        ("data", "1.0", "0.0"),
        ("gaussian", "0.0", "1.0"),
    ]


@pytest.mark.skipif(not HAS_SIMULATOR, reason='needs pip install -e ".[d3il]"')
def test_the_shipped_policies(tmp_path, monkeypatch, capsys) -> None:
    from diffusion_rl.cli.exploration import add_command
    from diffusion_rl.cli.figures import main

    output = str(tmp_path / "exploration.png")
    arguments = ["exploration", "--mode", "m1", "--policy", "gmm", "--paths", "4"]
    monkeypatch.setattr("sys.argv", ["make_figures.py", *arguments, "--output", output])
    assert main([add_command]) == 0
    printed = capsys.readouterr().out
    assert "m1 data" in printed and "m1 gmm" in printed and output in printed


class Silent:
    """A recorder of nothing."""

    def add(self, state: Any) -> None: ...

    def close(self) -> None: ...


@pytest.mark.skipif(not HAS_SIMULATOR, reason='needs pip install -e ".[d3il]"')
@pytest.mark.parametrize("policy", [pytest.param("diffusion", marks=pytest.mark.slow), "gaussian", "gmm"])
def test_fine_tuning_as_configured(tmp_path, policy, monkeypatch) -> None:
    from diffusion_rl.cli import app
    from diffusion_rl.config.compose import compose
    from diffusion_rl.envs.d3il_avoiding import AvoidingVectorEnv

    videos: list[str] = []
    monkeypatch.setattr(AvoidingVectorEnv, "recorder", lambda self, path: videos.append(path) or Silent())

    small = [
        "env.n_envs=2",
        "env.max_episode_steps=20",
        "train.n_train_itr=2",
        "train.update_epochs=1",
        "train.batch_size=50",
        "env.save_video=true",  # of ten environments, by default, but there are two
        "+tensorboard=false",
    ]
    config = compose(
        f"d3il/finetune/avoid_m1/ft_ppo_{policy}_mlp",
        [*small, f"logdir={tmp_path}", "+wandb.mode=disabled", "++env.render=False"],
    )
    del config.hydra
    rows = app.run(config)
    assert len(rows) == 2 and all(np.isfinite(row["episode_return"]) for row in rows)
    assert (tmp_path / "checkpoint" / "state_1.safetensors").exists()
    names = [f"itr-{itr}_trial-{trial}.mp4" for itr in (0, 1) for trial in (0, 1)]
    assert [path.rsplit("/", 1)[1] for path in videos] == names
