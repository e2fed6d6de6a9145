"""Data sets in Python: raw episodes in and out; scaling, bounds and files are taken care of."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from diffusion_rl.core.errors import UserError
from diffusion_rl.core.noise import NoiseSource
from diffusion_rl.core.places import data_folder
from diffusion_rl.data.convert import convert
from diffusion_rl.data.episodes import Episodes, bounds_of, check, join, load_unscaled, save_episodes
from diffusion_rl.data.sources import load

Episode = Mapping[str, np.ndarray]


def load_dataset(source: str | os.PathLike[str], *, obs_keys: Sequence[str] = (), filter_key: str = "") -> Episodes:
    """Reads a data set as episodes in the source's units.

    Args:
        source: a folder with train.npz and normalization.npz, here or in the data folder ("gym/hopper-medium-v2"); a
            file of D4RL, Minari or robomimic; Minari's or LeRobot's folder; or the name of a Minari data set that was
            downloaded ("mujoco/hopper/expert-v0").
        obs_keys: parts of dictionary observations, in order.
        filter_key: of robomimic's files: the name of the list of demonstrations to take ("train").

    Raises:
        UserError: there is none, it is damaged, or its layout is not known.
    """
    for folder in (Path(source).expanduser(), data_folder(source)):
        if (folder / "train.npz").is_file() and (folder / "normalization.npz").is_file():
            return load_unscaled(folder)
    return load(_found(source), obs_keys, filter_key=filter_key)[0]


def _found(source: str | os.PathLike[str]) -> Path:
    """Returns the file or folder of a source; a name that is none is looked for among Minari's downloads."""
    path = Path(source).expanduser()
    downloads = Path(os.environ.get("MINARI_DATASETS_PATH") or Path.home() / ".minari" / "datasets")
    if path.exists() or path.suffix or not re.fullmatch(r"[\w/-]+-v\d+", str(source)):
        return path
    if not (downloads / source).is_dir():
        raise UserError(f"{source} is no file or folder here and not among {downloads}: minari download {source}")
    return downloads / source


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
