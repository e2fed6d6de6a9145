"""Minari's HDF5 (`<data set>/data/main_data.hdf5`): a group `episode_<i>` for each episode.

A group holds `observations [L+1,O]` (or a group of such arrays), `actions [L,A]`, `rewards`, `terminations` and
`truncations [L]`. The last observation follows the last action; the npz contract has no place for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import h5py
import numpy as np

from diffusion_rl.core.errors import UserError
from diffusion_rl.data.episodes import Episodes, check

_PREFIX = "episode_"


def recognises(file: h5py.File) -> bool:
    """Whether the file has this layout."""
    return any(_is_episode(key) for key in file)


def _is_episode(key: str) -> bool:
    return key.startswith(_PREFIX) and key[len(_PREFIX) :].isdigit()


def file_in(folder: Path) -> Path:
    """The data file in a Minari data set's folder."""
    for candidate in (folder / "main_data.hdf5", folder / "data" / "main_data.hdf5"):
        if candidate.is_file():
            return candidate
    raise UserError(f"{folder} holds no main_data.hdf5: give the file itself or a Minari data set's folder")


def read(file: h5py.File, name: str, obs_keys: Sequence[str] = ()) -> Episodes:
    """Episodes in numerical order. `name` is for messages; `obs_keys` choose from dictionary observations."""
    keys = sorted((k for k in file if _is_episode(k)), key=lambda k: int(k[len(_PREFIX) :]))
    parts = [_episode(file[key], f"{name}: {key}", obs_keys) for key in keys]
    parts = [part for part in parts if len(part[1])]
    if not parts:
        raise UserError(f"{name}: every episode is empty")
    if len({(p[0].shape[1:], p[1].shape[1:]) for p in parts}) != 1:
        raise UserError(f"{name}: episodes differ in the shape of observations or actions")
    states, actions, rewards, terminals = (np.concatenate(column) for column in zip(*parts, strict=True))
    lengths = np.array([len(part[1]) for part in parts])
    episodes = Episodes(states=states, actions=actions, traj_lengths=lengths, rewards=rewards, terminals=terminals)
    check(episodes, name)
    return episodes


def _episode(group: h5py.Group, name: str, obs_keys: Sequence[str]) -> tuple[np.ndarray, ...]:
    missing = [k for k in ("observations", "actions", "rewards", "terminations") if k not in group]
    if missing:
        raise UserError(f"{name}: missing {', '.join(missing)} (found {', '.join(sorted(group))})")
    if isinstance(group["actions"], h5py.Group):
        raise UserError(f"{name}: actions are a dictionary; only arrays are supported")
    observations = _observations(group["observations"], name, obs_keys)
    actions, rewards, terminals = (group[k][()] for k in ("actions", "rewards", "terminations"))
    steps = len(actions)
    if len(observations) not in (steps, steps + 1) or len(rewards) != steps or len(terminals) != steps:
        raise UserError(
            f"{name}: {len(observations)} observations, {steps} actions, {len(rewards)} rewards and "
            f"{len(terminals)} terminations do not fit together"
        )
    return observations[:steps], actions.reshape(steps, -1), rewards, terminals.astype(bool)


def _observations(node: h5py.Dataset | h5py.Group, name: str, obs_keys: Sequence[str]) -> np.ndarray:
    if isinstance(node, h5py.Dataset):
        values = node[()]
        return values.reshape(len(values), -1)
    unknown = [k for k in obs_keys if k not in node]
    if not obs_keys or unknown:
        problem = f"no such observation: {', '.join(unknown)}" if unknown else "observations are a dictionary"
        raise UserError(f"{name}: {problem}; choose with --obs-keys from {', '.join(sorted(node))}")
    return np.concatenate([node[k][()].reshape(len(node[k]), -1) for k in obs_keys], axis=1)
