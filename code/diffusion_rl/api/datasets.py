"""Data sets in Python: raw episodes in and out; scaling, bounds and files are taken care of."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from diffusion_rl.core.noise import NoiseSource
from diffusion_rl.core.places import data_folder
from diffusion_rl.data.convert import convert
from diffusion_rl.data.episodes import Episodes, bounds_of, check, join, load_unscaled, save_episodes
from diffusion_rl.data.sources import load

Episode = Mapping[str, np.ndarray]


def load_dataset(source: str | os.PathLike[str], *, obs_keys: Sequence[str] = ()) -> Episodes:
    """Reads a data set as episodes in the source's units.

    Args:
        source: a folder with train.npz and normalization.npz, here or in the data folder ("gym/hopper-medium-v2"), or a
            file of D4RL, Minari (or its folder) or robomimic.
        obs_keys: parts of dictionary observations, in order.

    Raises:
        UserError: there is none, it is damaged, or its layout is not known.
    """
    for folder in (Path(source).expanduser(), data_folder(source)):
        if (folder / "train.npz").is_file() and (folder / "normalization.npz").is_file():
            return load_unscaled(folder)
    return load(source, obs_keys)[0]


def write_dataset(
    episodes: Iterable[Episode] | Episodes, out_dir: str | os.PathLike[str], *, val_split: float = 0.0, seed: int = 0
) -> list[Path]:
    """Writes raw episodes as the files that training reads: train.npz, normalization.npz and, for a share of the
    episodes drawn with `seed`, val.npz.

    Args:
        episodes: of L steps, {"states": [L,O], "actions": [L,A]} and optionally "rewards" [L], "terminals" [L] (true
            where an episode really ended) and "images" [L,C,Hi,Wi] bytes; or what `load_dataset` returned.

    Raises:
        UserError: shapes that do not fit together, NaN, or a folder that cannot be written.
    """
    name = "episodes"
    whole = episodes if isinstance(episodes, Episodes) else join([dict(one) for one in episodes], name)
    check(whole, name)
    made = convert(whole, bounds_of(whole), val_split=val_split, keep_unrewarded=True, rng=NoiseSource(seed))
    return save_episodes(out_dir, made.splits, made.normalization)
