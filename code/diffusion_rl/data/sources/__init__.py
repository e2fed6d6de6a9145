"""Readers of other people's file layouts: each gives `data.episodes.Episodes` with the values untouched."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from diffusion_rl.core.errors import UserError, listed
from diffusion_rl.data.episodes import Episodes, bounds_of, load_episodes
from diffusion_rl.data.hdf5 import open_hdf5
from diffusion_rl.data.normalizers import MinMaxNormalizer
from diffusion_rl.data.sources import d4rl, lerobot, minari, robomimic


def load(
    path: str | os.PathLike,
    obs_keys: Sequence[str] = (),
    cameras: Sequence[str] = (),
    max_episodes: int | None = None,
    filter_key: str = "",
) -> tuple[Episodes, MinMaxNormalizer]:
    """Reads complete episodes and the ranges of everything in a file, whose layout is recognised.

    Args:
        path: HDF5 of D4RL, Minari (or Minari's folder) or robomimic, an npz of unscaled arrays, or LeRobot's folder.
        obs_keys: which entries of dictionary observations to concatenate, in this order.
        cameras, max_episodes: of robomimic's files, whose ranges are those of the episodes that are read.
        filter_key: of robomimic's files: only the demonstrations that they list under this name ("train").

    Raises:
        UserError: the layout is none of these, or the data are damaged.
    """
    path = Path(path)
    if os.path.isdir(path) and lerobot.recognises(path):
        _require_robomimic(path, filter_key)
        episodes = lerobot.read(path, obs_keys)
        return episodes, bounds_of(episodes)
    if os.path.isdir(path):
        path = minari.file_in(path)
    if path.suffix == ".npz":
        _require_robomimic(path, filter_key)
        episodes = load_episodes(path)
        return episodes, bounds_of(episodes)
    with open_hdf5(path, "an HDF5 or npz file") as file:
        if robomimic.recognises(file):
            episodes = robomimic.read(file, obs_keys, cameras, max_episodes, filter_key)
            return episodes, bounds_of(episodes)
        _require_robomimic(path, filter_key)
        if d4rl.recognises(file):
            return d4rl.read(file)
        if minari.recognises(file):
            episodes = minari.read(file, obs_keys)
            return episodes, bounds_of(episodes)
        names = listed(file.names())
    raise UserError(
        f"{path}: neither D4RL's layout (observations, actions, rewards, terminals), Minari's (episode_0, …) nor "
        f"robomimic's (data/demo_0, …); found {names}"
    )


def _require_robomimic(path: Path, filter_key: str) -> None:
    if filter_key:
        raise UserError(f"{path} is no file of robomimic, so it lists no demonstrations as {filter_key!r}")
