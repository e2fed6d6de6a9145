"""D4RL's HDF5: flat arrays `observations [N,O]`, `actions [N,A]`, `rewards`, `terminals` and `timeouts [N]`."""

from __future__ import annotations

import h5py
import numpy as np

from diffusion_rl.core.errors import UserError
from diffusion_rl.data.episodes import Episodes, Normalization, check, split_episodes

EPISODE_STEPS = 1000  # the limit of its locomotion tasks, whose older files have no `timeouts`
_NAMES = {"states": "observations", "actions": "actions", "rewards": "rewards", "terminals": "terminals"}


def recognises(file: h5py.File) -> bool:
    """Whether the file has this layout."""
    return isinstance(file.get("observations"), h5py.Dataset) and isinstance(file.get("actions"), h5py.Dataset)


def read(file: h5py.File, name: str) -> tuple[Episodes, Normalization]:
    """Episodes cut at terminals and time-outs (without these after 1000 steps), and the ranges of all rows.

    An unfinished episode at the end is dropped but counts for the ranges, as in the reference. `name` is for messages.
    """
    missing = [theirs for theirs in _NAMES.values() if theirs not in file]
    if missing:
        raise UserError(f"{name}: missing {', '.join(missing)} (found {', '.join(sorted(file))})")
    raw = {ours: file[theirs][()] for ours, theirs in _NAMES.items()}
    timeouts = file["timeouts"][()] if "timeouts" in file else None
    sizes = {k: len(v) for k, v in raw.items()} | ({} if timeouts is None else {"timeouts": len(timeouts)})
    if len(set(sizes.values())) != 1:
        raise UserError(f"{name}: arrays of different lengths: {sizes}")
    for key in ("rewards", "terminals"):
        raw[key] = np.asarray(raw[key]).reshape(len(raw[key]), -1)[:, 0]  # some files hold [N,1]
    raw["terminals"] = raw["terminals"].astype(bool)
    everything = Episodes(traj_lengths=np.array([len(raw["states"])]), **raw)
    check(everything, name)
    return split_episodes(raw, timeouts, name, EPISODE_STEPS), Normalization.of(everything)
