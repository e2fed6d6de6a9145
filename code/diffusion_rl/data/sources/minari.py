"""Minari's HDF5 (`<data set>/data/main_data.hdf5`): a group `episode_<i>` for each episode.

A group holds `observations [L+1,O]` (or a group of such arrays), `actions [L,A]`, `rewards`, `terminations` and
`truncations [L]`. The last observation follows the last action; the npz contract has no place for it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from diffusion_rl.core.errors import UserError, listed
from diffusion_rl.core.files import read_json
from diffusion_rl.data.episodes import Episodes, join
from diffusion_rl.data.hdf5 import Array, Group

_EPISODE = re.compile(r"episode_([0-9]{1,18})")
_DISCRETE = ("Discrete", "MultiDiscrete", "MultiBinary")


def recognises(file: Group) -> bool:
    """Whether the file has this layout."""
    return any(map(_EPISODE.fullmatch, file.names()))


def file_in(folder: Path) -> Path:
    """Finds the data file in a Minari data set's folder."""
    for candidate in (folder / "main_data.hdf5", folder / "data" / "main_data.hdf5"):
        if candidate.is_file():
            return candidate
    raise UserError(f"{folder} holds no main_data.hdf5: give the file itself or a Minari data set's folder")


def read(file: Group, obs_keys: Sequence[str] = ()) -> Episodes:
    """Reads episodes in numerical order; `obs_keys` choose from dictionary observations."""
    _require_continuous(file.where)
    matches = sorted(filter(None, map(_EPISODE.fullmatch, file.names())), key=lambda match: int(match[1]))
    parts = [_episode(file, match[0], obs_keys) for match in matches]
    parts = [part for part in parts if len(part["actions"])]
    if not parts:
        raise UserError(f"{file.where}: every episode is empty")
    return join(parts, file.where)


def _require_continuous(where: str) -> None:
    """Raises UserError where the `metadata.json` beside the file says that actions are of a discrete space.

    Attributes of the file, which older data sets have instead, are not read: in a damaged file the library may never
    end to look for a text. The actions' type tells as much (see `data.episodes.check`).
    """
    beside = Path(where).with_name("metadata.json")
    facts = read_json(beside) if beside.exists() else None
    try:
        space = json.loads(facts["action_space"])  # type: ignore[index]
    except (ValueError, LookupError, TypeError, RecursionError):
        return
    kind = space.get("type") if isinstance(space, dict) else None
    if kind in _DISCRETE:
        raise UserError(f"{where}: its actions are of a {kind} space, and only continuous ones are supported")


def _episode(file: Group, key: str, obs_keys: Sequence[str]) -> dict[str, np.ndarray]:
    where, group = f"{file.where}: {key}", file.group(key)
    if group is None:
        raise UserError(f"{where} is no group: get the file again")
    missing = [k for k in ("observations", "actions", "rewards", "terminations") if k not in group]
    if missing:
        raise UserError(f"{where}: missing {', '.join(missing)} (found {listed(group.names())})")
    if not group.is_array("actions"):
        raise UserError(f"{where}: actions are a dictionary; only arrays are supported")
    observations = _observations(group, where, obs_keys)
    actions, rewards, terminals = (group.array(k) for k in ("actions", "rewards", "terminations"))
    steps, seen = len(actions), {len(part) for part in observations}
    if len(seen) != 1 or not seen <= {steps, steps + 1} or rewards.shape != (steps,) or terminals.shape != (steps,):
        raise UserError(
            f"{where}: {' or '.join(map(str, sorted(seen)))} observations, {steps} actions, rewards "
            f"{list(rewards.shape)} and terminations {list(terminals.shape)} do not fit together"
        )
    rows = [_flat(part.read())[:steps] for part in observations]
    return {
        "states": rows[0] if len(rows) == 1 else np.concatenate(rows, axis=1),
        "actions": _flat(actions.read()),
        "rewards": rewards.read(),
        "terminals": terminals.read().astype(bool),
    }


def _flat(x: np.ndarray) -> np.ndarray:
    """Flattens [L,…] to [L,D]."""
    return x.reshape(len(x), -1) if len(x) else x.reshape(0, 1)


def _observations(group: Group, where: str, obs_keys: Sequence[str]) -> list[Array]:
    """Finds the arrays of a state: `observations`, or those of `obs_keys` in the group of that name."""
    parts = group.group("observations")
    if parts is None:
        return [group.array("observations")]
    unknown = [k for k in obs_keys if k not in parts]
    if not obs_keys or unknown:
        problem = f"no such observation: {', '.join(unknown)}" if unknown else "observations are a dictionary"
        raise UserError(f"{where}: {problem}; choose with --obs-keys from {listed(parts.names(), 40)}")
    return [parts.array(k) for k in obs_keys]
