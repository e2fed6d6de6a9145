"""Data sets as flat arrays, every row of them: what DiffuserLite's windows are cut from."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np

from diffusion_rl.data.episodes import Episodes, check
from diffusion_rl.data.hdf5 import open_hdf5
from diffusion_rl.data.sources import d4rl

FIELDS = ("observations", "actions", "rewards", "terminals", "timeouts")
_KITCHEN = {
    "kitchen-partial-v0": "kitchen_microwave_kettle_light_slider-v0.hdf5",
    "kitchen-mixed-v0": "kitchen_microwave_kettle_bottomburner_light-v0.hdf5",
}


def remote_file(name: str) -> str | None:
    """Where D4RL keeps a data set that this algorithm knows, relative to the address of its files."""
    words = name.split("-")
    if name in _KITCHEN:
        return f"kitchen/{_KITCHEN[name]}"
    if words[0] == "antmaze" and len(words) == 4:
        maze = {"medium": "big-maze", "large": "hardest-maze"}.get(words[1])
        goals = {"play": "False", "diverse": "True"}.get(words[2])
        if maze and goals:
            return f"ant_maze_v2/Ant_maze_{maze}_noisy_multistart_True_multigoal_{goals}_sparse_fixed.hdf5"
    if words[0] in ("hopper", "halfcheetah", "walker2d") and words[-1] == "v2":
        return f"gym_mujoco_v2/{words[0]}_{'_'.join(words[1:-1])}-v2.hdf5"
    return None


def find_flat(
    name: str, data_dir: str | None, episodes: Callable[[str, str | None], Episodes], say: Callable[[str], None] = print
) -> dict[str, np.ndarray]:
    """The rows of a data set.

    Looked for in `data_dir` and under D4RL's file name in D4RL_DATASET_DIR (~/.d4rl/datasets); whatever else there is,
    `episodes` finds, of whose rows those in complete episodes are known.
    """
    folder = Path(os.environ.get("D4RL_DATASET_DIR", "~/.d4rl/datasets")).expanduser()
    remote = remote_file(name)
    path = Path(data_dir) if data_dir else folder / (Path(remote).name if remote else f"{name}.hdf5")
    if os.path.isfile(path) and path.suffix in (".hdf5", ".h5"):
        found = read_flat(path)
        if found is not None:
            say(f"data: {path}")
            return found
    return flat_of(episodes(name, data_dir))


def read_flat(path: Path) -> dict[str, np.ndarray] | None:
    """The arrays of a file in D4RL's layout; None where it has another."""
    with open_hdf5(path) as file:
        if not d4rl.recognises(file):
            return None
        flat = d4rl.read_columns(file, FIELDS)
    check(Episodes(flat["observations"], flat["actions"], np.array([len(flat["rewards"])]), flat["rewards"]), str(path))
    return flat


def flat_of(episodes: Episodes) -> dict[str, np.ndarray]:
    """Complete episodes with rewards as flat arrays; one that is not terminated ends with a time-out."""
    count, rewards = len(episodes.states), episodes.require_rewards("the data set")
    terminals = np.zeros(count, bool) if episodes.terminals is None else np.asarray(episodes.terminals, bool)
    timeouts = np.zeros(count, bool)
    last = episodes.starts + np.asarray(episodes.traj_lengths) - 1
    timeouts[last] = ~terminals[last]
    return dict(zip(FIELDS, (episodes.states, episodes.actions, rewards, terminals, timeouts), strict=True))


def transitions(flat: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Rows with the row after them, without those that a time-out ends: for Q-learning.

    Returns:
        "observations" [M,O], "actions" [M,A], "rewards" [M], "following" [M,O], "terminals" [M].
    """
    kept = np.flatnonzero(~flat["timeouts"][:-1].astype(bool))
    found = {field: flat[field][kept] for field in FIELDS[:-1]}
    return found | {"following": flat["observations"][kept + 1]}
