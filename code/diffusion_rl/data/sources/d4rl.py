"""D4RL's HDF5: flat arrays `observations [N,O]`, `actions [N,A]`, `rewards`, `terminals` and `timeouts [N]`."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from diffusion_rl.core.errors import UserError, listed
from diffusion_rl.data.episodes import Episodes, bounds_of, check, split_episodes
from diffusion_rl.data.hdf5 import Group
from diffusion_rl.data.normalizers import MinMaxNormalizer
from diffusion_rl.tasks.registry import D4RL_STEPS

_NAMES = {"states": "observations", "actions": "actions", "rewards": "rewards", "terminals": "terminals"}


def recognises(file: Group) -> bool:
    """Whether the file has this layout."""
    return file.is_array("observations") and file.is_array("actions")


def read_columns(file: Group, names: Sequence[str]) -> dict[str, np.ndarray]:
    """Reads arrays of equal length by name: observations and actions [N,…], single numbers [N] otherwise."""
    if missing := [name for name in names if name not in file]:
        raise UserError(f"{file.where}: missing {', '.join(missing)} (found {listed(file.names())})")
    columns = {name: file.array(name) for name in names}
    sizes = {name: len(column) for name, column in columns.items()}
    if len(set(sizes.values())) != 1:
        raise UserError(f"{file.where}: arrays of different lengths: {sizes}")
    for name, column in columns.items():
        if name not in ("observations", "actions") and column.shape[1:] not in ((), (1,)):  # some files hold [N,1]
            raise UserError(f"{file.where}: {name} has shape {list(column.shape)}, but each step has one of them")
    arrays = {name: column.read() for name, column in columns.items()}
    return {k: v if k in ("observations", "actions") else v.reshape(-1) for k, v in arrays.items()}


def read(file: Group) -> tuple[Episodes, MinMaxNormalizer]:
    """Reads episodes cut at terminals and time-outs, and the ranges of all rows.

    Older files have no time-outs: there the limit of the locomotion tasks stands for them. An unfinished episode at the
    end is dropped but counts for the ranges, as in the reference.
    """
    names = [*_NAMES.values(), *(["timeouts"] if "timeouts" in file else [])]
    columns = read_columns(file, names)
    timeouts = columns.pop("timeouts", None)
    raw = {ours: columns[theirs] for ours, theirs in _NAMES.items()}
    raw["terminals"] = raw["terminals"].astype(bool)
    everything = Episodes(raw["states"], raw["actions"], np.array([len(raw["states"])]), raw["rewards"])
    check(everything, file.where)
    return split_episodes(raw, timeouts, file.where, D4RL_STEPS), bounds_of(everything)
