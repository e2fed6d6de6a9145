"""Describes a data set's folder and checks whether it can be trained on."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from diffusion_rl.core.errors import UserError
from diffusion_rl.data.episodes import SCALED, Episodes, check_scaled, inner_terminals, load_episodes
from diffusion_rl.data.normalizers import read_bounds

_CONSTANT = 1e-5  # a range below this, in raw units, is blown up by the scaling


def validate(directory: str | os.PathLike) -> Iterator[str]:
    """Yields lines about `train.npz`, `val.npz` (if any) and `normalization.npz`. Raises UserError for any fault."""
    directory = Path(directory)
    if not os.path.isdir(directory):
        raise UserError(f"no such folder: {directory}")
    splits = {name: load_episodes(directory / f"{name}.npz") for name in _split_names(directory)}
    for name, episodes in splits.items():
        yield from _describe(f"{name}.npz", episodes)
        if (dims := _dims(episodes)) != _dims(splits["train"]):
            raise UserError(
                f"{name}.npz has dimensions {dims}, train.npz {_dims(splits['train'])}: convert them together"
            )
    yield from _check_normalization(directory / "normalization.npz", splits["train"])


def _dims(episodes: Episodes) -> tuple[int, int]:
    """Returns the sizes O and A."""
    return episodes.states.shape[1], episodes.actions.shape[1]


def _split_names(directory: Path) -> list[str]:
    return ["train"] + (["val"] if (directory / "val.npz").exists() else [])


def _describe(name: str, episodes: Episodes) -> Iterator[str]:
    lengths = episodes.traj_lengths
    check_scaled(episodes, name, SCALED)
    if episodes.terminals is not None and len(inside := inner_terminals(episodes)):
        raise UserError(
            f"{name}: {len(inside)} terminals lie inside episodes; traj_lengths must end an episode at each"
        )
    yield (
        f"{name}: {len(lengths)} episodes, {lengths.sum()} transitions, lengths {lengths.min()} to {lengths.max()} "
        f"(mean {lengths.mean():.1f})"
    )
    for key in ("states", "actions"):
        array = getattr(episodes, key)
        low, high = array.min(axis=0), array.max(axis=0)
        yield f"  {key} {array.shape[1]} dimensions, {array.dtype}, values {low.min():.4f} to {high.max():.4f}"
        constant = np.flatnonzero(high - low < 1e-12)
        if len(constant):
            yield f"  {key}: constant dimensions {', '.join(map(str, constant))}"
    if episodes.images is not None:
        yield f"  images {episodes.images.shape[1:]}, uint8"
    if episodes.rewards is None or episodes.terminals is None:
        yield "  rewards or terminals are missing: good for pre-training, not for Q-learning"
    elif lengths.min() > 0:
        yield from _describe_rewards(episodes)


def _describe_rewards(episodes: Episodes) -> Iterator[str]:
    returns, ended = episodes.returns, np.asarray(episodes.terminals, bool)
    last = episodes.starts + episodes.traj_lengths - 1
    yield f"  return {returns.mean():.1f} +- {returns.std():.1f}, {returns.min():.1f} to {returns.max():.1f}"
    yield f"  {int(ended[last].sum())} episodes end with a terminal, {int((~ended[last]).sum())} were cut"


def _check_normalization(path: Path, episodes: Episodes) -> Iterator[str]:
    dims = dict(zip(("obs", "action"), _dims(episodes), strict=True))
    bounds = read_bounds(path, *dims.values())
    for prefix, dim in dims.items():
        low, high = bounds[f"{prefix}_min"], bounds[f"{prefix}_max"]
        flat = np.flatnonzero(high - low < _CONSTANT)
        note = f"; nearly constant dimensions {', '.join(map(str, flat))}" if len(flat) else ""
        yield f"{path.name}: {prefix} {dim} dimensions, {low.min():.4g} to {high.max():.4g}{note}"
