"""robomimic's HDF5 (Mandlekar et al. 2021, arXiv:2108.03298): `data/demo_<i>` for each demonstration.

A demonstration holds `obs/<key> [L,...]`, `actions [L,A]` and `rewards [L]`; pictures are `obs/<camera>_image
[L,Hi,Wi,3]` in bytes. Its `dones` are left aside: success ends no episode, so nothing here is terminal.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from diffusion_rl.core.errors import UserError, listed
from diffusion_rl.data.episodes import Episodes, join
from diffusion_rl.data.hdf5 import Group

_DEMO = re.compile(r"demo_([0-9]{1,18})")
IMAGE_SUFFIX = "_image"


def low_dim_keys(n_arms: int, with_object: bool) -> list[str]:
    """Lists the entries of the state, in order: pose of each arm's hand and its fingers, and the object."""
    parts = ("eef_pos", "eef_quat", "gripper_qpos")
    return [f"robot{i}_{part}" for i in range(n_arms) for part in parts] + ["object"] * with_object


def recognises(file: Group) -> bool:
    """Whether the file has this layout."""
    data = file.group("data")
    return data is not None and bool(_demos(data))


def _demos(data: Group) -> list[str]:
    """Lists the demonstrations in numerical order."""
    matches = sorted(filter(None, map(_DEMO.fullmatch, data.names())), key=lambda match: int(match[1]))
    return [match[0] for match in matches if data.group(match[0]) is not None]


def read(
    file: Group,
    obs_keys: Sequence[str] = (),
    cameras: Sequence[str] = (),
    max_episodes: int | None = None,
    filter_key: str = "",
) -> Episodes:
    """Reads demonstrations in numerical order, at most `max_episodes`; with `filter_key` those of `mask/<filter_key>`.

    obs_keys: entries of the state; by default those that the reference takes, `object` only where there are no
    cameras. cameras: whose pictures to read, one after the other in the channels.
    """
    data = file.group("data")
    assert data is not None
    names = _demos(data)
    if filter_key:
        chosen = _mask(file, filter_key)
        names = [name for name in names if name in chosen]
    demos = [data.group(key) for key in names[:max_episodes]]
    if not demos:
        raise UserError(f"{file.where}: no demonstration is left of {filter_key or f'max_episodes={max_episodes}'}")
    if not obs_keys:
        n_arms = 2 if demos[0] is not None and "obs/robot1_eef_pos" in demos[0] else 1
        obs_keys = low_dim_keys(n_arms, with_object=not cameras)
    parts = [_demo(group, obs_keys, cameras) for group in demos if group is not None]
    return join(parts, file.where)


def _mask(file: Group, filter_key: str) -> set[str]:
    """Returns the names of demonstrations that the file lists under a filter key."""
    masks = file.group("mask")
    if masks is None or not masks.is_array(filter_key):
        there = listed(masks.names()) if masks else "none"
        raise UserError(f"{file.where} has no filter key {filter_key!r}; there: {there}")
    return set(masks.texts(filter_key))


def _demo(group: Group, obs_keys: Sequence[str], cameras: Sequence[str]) -> dict[str, np.ndarray]:
    pictures = [f"obs/{camera}{IMAGE_SUFFIX}" for camera in cameras]
    dims = {f"obs/{key}": 2 for key in obs_keys} | dict.fromkeys(pictures, 4) | {"actions": 2, "rewards": 1}
    if missing := [key for key in dims if key not in group]:
        obs = group.group("obs")
        raise UserError(f"{group.where}: missing {', '.join(missing)} (obs holds {listed(obs.names() if obs else ())})")
    arrays = {key: group.array(key) for key in dims}
    if len({len(array) for array in arrays.values()}) != 1:
        raise UserError(f"{group.where}: its arrays have different lengths")
    if odd := [key for key, array in arrays.items() if len(array.shape) != dims[key]]:
        raise UserError(
            f"{group.where}: {odd[0]} has shape {list(arrays[odd[0]].shape)}, not {dims[odd[0]]} dimensions"
        )
    if len({arrays[key].shape[1:3] for key in pictures}) > 1:
        raise UserError(f"{group.where}: its cameras have pictures of different sizes")
    columns = {
        "states": np.concatenate([arrays[f"obs/{key}"].read() for key in obs_keys], axis=1),
        "actions": arrays["actions"].read(),
        "rewards": arrays["rewards"].read(),
        "terminals": np.zeros(len(arrays["actions"]), bool),
    }
    if cameras:
        columns["images"] = np.concatenate([np.moveaxis(arrays[key].read(), -1, 1) for key in pictures], axis=1)
    return columns
