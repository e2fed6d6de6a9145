"""Finds the data sets of D4RL's tasks, and home-made ones like them, on this machine by name.

Environment: D4RL_DATASET_DIR   the folder of D4RL's own files (default: ~/.d4rl/datasets)
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from diffusion_rl.core.errors import UserError
from diffusion_rl.core.places import data_folder
from diffusion_rl.data import assets, sources
from diffusion_rl.data.episodes import Episodes, load_unscaled
from diffusion_rl.data.plan_windows import flat_of, read_flat
from diffusion_rl.tasks.registry import D4RL_FILES, TASKS, TaskSpec, d4rl_file, task_named

Say = Callable[[str], None]


class Found(NamedTuple):
    """Where a data set lies. home_made: for this repository, in the place of D4RL's."""

    path: Path
    home_made: bool = False


def find_data(name: str, data_dir: str | None = None) -> Found:
    """Finds a data set.

    Looks in `data_dir` (a file of D4RL or Minari, or a folder with train.npz), then for D4RL's file in
    D4RL_DATASET_DIR, then among the data that ship with this repository or are made with it; else downloads D4RL's.

    Raises:
        UserError: there is none; the message says where to get it.
    """
    if data_dir:
        return Found(Path(data_dir))
    for path in _d4rl_paths(name):
        if path.is_file():
            return Found(assets.unchanged(path))
    task = task_named(name)
    if task is not None and task.simulator == "robomimic":
        if _is_npz(own := data_folder(f"robomimic/{name}")):
            return Found(own)
        maker = "render" if name.endswith("-img") else "make"
        command = f"python script/dataset/{maker}_robomimic_demos.py {task.name}"
        raise UserError(f"no data for {name}: make them ({command}) or name a folder with --data_dir (looked in {own})")
    own = data_folder(f"gym/{name}")
    for path in (data_folder("maze2d") / f"{name}.hdf5", own):
        if path.is_file() or _is_npz(path):
            return Found(path, home_made=True)
    if asset := d4rl_assets().get(name):
        return Found(assets.fetch(asset))
    places = f"{_d4rl_folder()} and {own}"
    raise UserError(f"no data for {name} in {places}: put it there, or name a file or folder with --data_dir")


def find_episodes(name: str, data_dir: str | None = None, say: Say = print) -> Episodes:
    """Finds the complete episodes of a data set, in the environment's units, where `find_data` finds it."""
    return _read(_said(name, data_dir, say))


def find_flat(name: str, data_dir: str | None = None, say: Say = print) -> dict[str, np.ndarray]:
    """Finds the rows of a data set as flat arrays (see `data.plan_windows`).

    Of a file in D4RL's layout these are all rows; of anything else that `find_episodes` finds, complete episodes.
    """
    path = _said(name, data_dir, say)
    if path.is_file() and path.suffix in (".hdf5", ".h5") and (flat := read_flat(path)) is not None:
        return flat
    return flat_of(_read(path))


def d4rl_assets() -> dict[str, assets.Asset]:
    """Returns D4RL's files, by the names of the data sets."""
    return {name: _d4rl_asset(task, name) for task in TASKS for name in task.d4rl_files}


def _d4rl_asset(task: TaskSpec, name: str) -> assets.Asset:
    instead, maker = "name a file or folder with --data_dir", None
    if task.made_returns:
        flavour = name.removeprefix(f"{task.name}-").removesuffix("-v2")
        maker = f"make_gym_data.py {task.name} --flavour {flavour}"
    elif task.name.startswith("maze2d"):
        maker = f"make_maze2d_data.py {name}"
    if maker:
        instead += f", or make home-made data with `python script/dataset/{maker}`"
    remote = task.d4rl_files[name]
    return assets.Asset(Path(remote).name, f"{D4RL_FILES}/{remote}", _d4rl_folder(), instead=instead)


def _said(name: str, data_dir: str | None, say: Say) -> Path:
    path, home_made = find_data(name, data_dir)
    if not data_dir:
        say(f"data: {path}" + " (made for this repository; not D4RL's)" * home_made)
    return path


def _d4rl_folder() -> Path:
    return Path(os.environ.get("D4RL_DATASET_DIR", "~/.d4rl/datasets")).expanduser()


def _d4rl_paths(name: str) -> Iterator[Path]:
    """Yields where a file of D4RL may lie: under D4RL's name for it, or the data set's own."""
    if remote := d4rl_file(name):
        yield _d4rl_folder() / Path(remote).name
    yield _d4rl_folder() / f"{name}.hdf5"


def _is_npz(folder: Path) -> bool:
    return (folder / "train.npz").is_file()


def _read(path: Path) -> Episodes:
    return load_unscaled(path) if _is_npz(path) else sources.load(path)[0]
