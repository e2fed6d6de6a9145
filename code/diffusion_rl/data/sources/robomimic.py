"""robomimic's HDF5 (Mandlekar et al. 2021, arXiv:2108.03298): `data/demo_<i>` for each demonstration.

A demonstration holds `obs/<key> [L,...]`, `actions [L,A]` and `rewards [L]`; pictures are `obs/<camera>_image
[L,Hi,Wi,3]` in bytes. Its `dones` are left aside: success ends no episode, so nothing here is terminal.
"""

from __future__ import annotations

from collections.abc import Sequence

import h5py
import numpy as np

from diffusion_rl.core.errors import UserError
from diffusion_rl.data.episodes import Episodes, check

_PREFIX = "demo_"
IMAGE_SUFFIX = "_image"


def low_dim_keys(n_arms: int, with_object: bool) -> list[str]:
    """The entries of the state, in order: pose of each arm's hand and its fingers, and what else there is to know."""
    parts = ("eef_pos", "eef_quat", "gripper_qpos")
    return [f"robot{i}_{part}" for i in range(n_arms) for part in parts] + ["object"] * with_object


def recognises(file: h5py.File) -> bool:
    """Whether the file has this layout."""
    data = file.get("data")
    return isinstance(data, h5py.Group) and bool(_demos(data))


def _demos(data: h5py.Group) -> list[str]:
    """Names of the demonstrations in numerical order."""
    named = [key for key in data if key.startswith(_PREFIX) and key[len(_PREFIX) :].isdigit()]
    return sorted((key for key in named if isinstance(data[key], h5py.Group)), key=lambda key: int(key[len(_PREFIX) :]))


def read(
    file: h5py.File,
    name: str,
    obs_keys: Sequence[str] = (),
    cameras: Sequence[str] = (),
    max_episodes: int | None = None,
) -> Episodes:
    """Demonstrations in numerical order, the first `max_episodes`.

    obs_keys: entries of the state; by default those that the reference takes, `object` only where there are no
    cameras. cameras: whose pictures to read, one after the other in the channels. name: for messages.
    """
    data = file["data"]
    demos = _demos(data)[:max_episodes]
    if not obs_keys:
        n_arms = 2 if "robot1_eef_pos" in data[demos[0]].get("obs", ()) else 1
        obs_keys = low_dim_keys(n_arms, with_object=not cameras)
    parts = [_demo(data[key], f"{name}: data/{key}", obs_keys, cameras) for key in demos]
    columns = {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
    lengths = np.array([len(part["actions"]) for part in parts])
    episodes = Episodes(traj_lengths=lengths, terminals=np.zeros(lengths.sum(), bool), **columns)
    check(episodes, name)
    return episodes


def _demo(group: h5py.Group, name: str, obs_keys: Sequence[str], cameras: Sequence[str]) -> dict[str, np.ndarray]:
    names = [*(f"obs/{key}" for key in obs_keys), *(f"obs/{camera}{IMAGE_SUFFIX}" for camera in cameras)]
    missing = [key for key in (*names, "actions", "rewards") if key not in group]
    if missing:
        raise UserError(f"{name}: missing {', '.join(missing)} (obs holds {', '.join(sorted(group.get('obs', ())))})")
    if len({len(group[key]) for key in (*names, "actions", "rewards")}) != 1:
        raise UserError(f"{name}: its arrays have different lengths")
    columns = {
        "states": np.concatenate([group[f"obs/{key}"][()] for key in obs_keys], axis=1),
        "actions": group["actions"][()],
        "rewards": group["rewards"][()],
    }
    if cameras:
        pictures = [np.moveaxis(group[f"obs/{camera}{IMAGE_SUFFIX}"][()], -1, 1) for camera in cameras]
        columns["images"] = np.concatenate(pictures, axis=1)
    return columns
