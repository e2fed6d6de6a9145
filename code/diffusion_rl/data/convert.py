"""Converts episodes of any source to the npz contract: choose, split, scale, write.

The steps and their order are the reference's: ranges come from the whole source, then the first episodes are taken,
then training ones drawn, then episodes without reward left out.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from diffusion_rl.core.errors import UserError
from diffusion_rl.core.noise import NoiseSource
from diffusion_rl.core.typing import Rng
from diffusion_rl.data.episodes import Episodes, bounds_of, save_episodes, scale_episodes
from diffusion_rl.data.normalizers import MinMaxNormalizer
from diffusion_rl.data.sources import load


@dataclass(frozen=True)
class Converted:
    """The result of `convert`: the splits, the statistics and how many episodes had no reward."""

    splits: dict[str, Episodes]
    normalization: MinMaxNormalizer
    skipped: int


def convert(
    episodes: Episodes,
    normalization: MinMaxNormalizer,
    *,
    max_episodes: int | None = None,
    val_split: float = 0.0,
    keep_unrewarded: bool = False,
    rng: Rng | None = None,
) -> Converted:
    """Scales to [-1, 1] and splits by whole episodes.

    max_episodes: take the first ones only. val_split: share of them for validation, drawn with `rng`.
    keep_unrewarded: keep episodes whose rewards add up to nothing positive, which the reference leaves out.
    """
    if not 0.0 <= val_split < 1.0:
        raise UserError(f"the validation share must be at least 0 and below 1, got {val_split}")
    if max_episodes is not None and max_episodes < 1:
        raise UserError(f"the number of episodes to take must be at least 1, got {max_episodes}")
    chosen = np.arange(len(episodes.traj_lengths))[:max_episodes]
    n_train = int(len(chosen) * (1 - val_split))
    in_train = np.ones(len(chosen), bool)
    if val_split:
        in_train[:] = False
        in_train[(rng or NoiseSource(0)).permutation(len(chosen))[:n_train]] = True
    keep = np.ones(len(chosen), bool)
    if not keep_unrewarded and episodes.rewards is not None:
        keep = episodes.returns[chosen] > 0
    splits = {"train": chosen[in_train & keep]} | ({"val": chosen[~in_train & keep]} if val_split else {})
    for split, which in splits.items():
        if not len(which):
            raise UserError(
                f"no episode left for {split} of {len(chosen)} ({int((~keep).sum())} have no reward: "
                f"--keep-unrewarded keeps them)"
            )
    scaled = scale_episodes(episodes, normalization)
    return Converted({k: scaled.select(v) for k, v in splits.items()}, normalization, int((~keep).sum()))


def convert_file(
    source: str | os.PathLike,
    out_dir: str | os.PathLike,
    obs_keys: Sequence[str] = (),
    *,
    kitchen_goal: np.ndarray | None = None,
    cameras: Sequence[str] = (),
    filter_key: str = "",
    **options: Any,
) -> Converted:
    """Reads `source`, converts it, and writes `train.npz` (`val.npz`) and `normalization.npz` into `out_dir`.

    kitchen_goal: [30]; the source is one of Minari's kitchen sets and gets D4RL's observations with this goal.
    cameras, filter_key: whose pictures, and which demonstrations, to take from a file of robomimic.
    """
    episodes, normalization = load(source, obs_keys, cameras, options.get("max_episodes"), filter_key)
    if kitchen_goal is not None:
        episodes = replace(episodes, states=kitchen_states(episodes.states, kitchen_goal))
        normalization = bounds_of(episodes)
    converted = convert(episodes, normalization, **options)
    save_episodes(out_dir, converted.splits, converted.normalization)
    return converted


def kitchen_states(states: np.ndarray, goal: np.ndarray) -> np.ndarray:
    """Turns observations of FrankaKitchen-v1 [N,59] into D4RL's [N,60].

    Those are positions and velocities of robot and objects; these both positions and the goal [30].
    """
    if states.shape[1:] != (59,):
        raise UserError(f"observations have {states.shape[1:]} entries, those of Minari's kitchen sets have 59")
    return np.concatenate([states[:, :9], states[:, 18:39], np.tile(goal, (len(states), 1))], axis=1)
