"""Maze2D: the ball and the walls, the controller's data, and planning through a maze end to end."""

import json

import h5py
import numpy as np
import pytest
from tests.small_runs import eagerly

from diffusion_rl.cli import diffuser
from diffusion_rl.core.errors import UserError
from diffusion_rl.core.noise import NoiseSource
from diffusion_rl.envs.maze2d import LAYOUTS, OFFSET, Maze2D, goal_of
from diffusion_rl.methods.diffuser.maze2d import waypoint_data
from diffusion_rl.tasks.registry import normalized_score


def test_layouts():
    assert {size: Maze2D(f"maze2d-{size}-v1").cells.shape for size in LAYOUTS} == {
        "umaze": (5, 5), "medium": (8, 8), "large": (9, 12),
    }  # fmt: skip
    assert goal_of("maze2d-umaze-v1").tolist() == [1, 1] and goal_of("maze2d-large-v1").tolist() == [7, 9]
    with pytest.raises(UserError, match="there are maze2d-umaze-v1"):
        Maze2D("maze2d-huge-v1")


def test_walls_hold_the_ball():
    env = Maze2D("maze2d-umaze-v1")
    env.reset(NoiseSource(0), start=np.array([1, 1]))
    for _ in range(200):
        observation, _ = env.step(np.array([-1.0, 0.0]))
    # row 0 is wall up to half a cell from its centre, and the ball has a radius of 0.1
    assert observation[0] == pytest.approx(0.5 + OFFSET + 0.1, abs=0.05)


def test_shortest_ways():
    env = Maze2D("maze2d-umaze-v1")
    way = env.path(np.array([1.2, 1.0]), np.array([3.0, 1.0]))
    assert [tuple(cell) for cell in way] == [(1, 1), (1, 2), (1, 3), (2, 3), (3, 3), (3, 2), (3, 1)]


def test_the_controller_reaches_its_goals():
    data = waypoint_data(Maze2D("maze2d-umaze-v1"), 3000, NoiseSource(0))
    cells = {tuple(cell) for cell in np.rint(data["observations"][:, :2]).astype(int)}
    assert cells >= {(1, 1), (1, 2), (1, 3), (2, 3), (3, 3), (3, 2), (3, 1)}
    assert 0.05 < data["rewards"].mean() < 0.6 and np.abs(data["actions"]).max() <= 1


def test_scores():
    assert normalized_score("maze2d-umaze-v1", 161.86) == pytest.approx(1)


def test_planning_end_to_end(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with h5py.File(tmp_path / "maze.hdf5", "w") as file:
        for key, value in waypoint_data(Maze2D("maze2d-umaze-v1"), 3000, NoiseSource(0)).items():
            file[key] = value
    flags = ["--config", "config.maze2d", "--dataset", "maze2d-umaze-v1", "--horizon", "8", "--n_diffusion_steps", "2"]
    train = ["--dim_mults", "(1,)", "--n_train_steps", "1", "--n_saves", "1", "--n_reference", "7", "--seed", "0"]
    with eagerly():
        diffuser.train([*flags, *train, "--data_dir", "maze.hdf5"])
    drawn = {path.name for path in (tmp_path / "logs" / "maze2d-umaze-v1" / "diffusion" / "H8_T2").glob("*.png")}
    assert drawn == {"_sample-reference.png", "sample-0-0.png", "sample-0-1.png"}
    diffuser.plan_maze2d([*flags, "--conditional", "True", "--seed", "0", "--n_episodes", "2"])
    folder = tmp_path / "logs" / "maze2d-umaze-v1" / "plans" / "release_H8_T2_LimitsNormalizer_b1_condTrue" / "0"
    facts = json.loads((folder / "rollout.json").read_text())
    assert sorted(facts) == ["epoch_diffusion", "return", "score", "step", "term"] and facts["step"] == 299
    assert (folder / "0.png").is_file() and (folder / "rollout.png").is_file()
    assert (folder.with_name("0-1") / "rollout.json").is_file() and (folder / "plans.png").is_file()
