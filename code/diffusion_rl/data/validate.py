"""What is in a data set's folder, and whether it can be trained on."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from diffusion_rl.core.errors import UserError
from diffusion_rl.data.episodes import NORMALIZATION_KEYS, Episodes, load_episodes, read_npz

_CONSTANT = 1e-5  # a range below this, in raw units, is blown up by the scaling


def validate(directory: str | os.PathLike) -> Iterator[str]:
    """Lines about `train.npz`, `val.npz` (if any) and `normalization.npz`; UserError at the first thing wrong."""
    directory = Path(directory)
    if not directory.is_dir():
        raise UserError(f"no such folder: {directory}")
    splits = {name: load_episodes(directory / f"{name}.npz") for name in _split_names(directory)}
    for name, episodes in splits.items():
        yield from _describe(f"{name}.npz", episodes)
    yield from _check_normalization(directory / "normalization.npz", splits["train"])


def _split_names(directory: Path) -> list[str]:
    return ["train"] + (["val"] if (directory / "val.npz").exists() else [])


def _describe(name: str, episodes: Episodes) -> Iterator[str]:
    lengths = episodes.traj_lengths
    yield (
        f"{name}: {len(lengths)} episodes, {lengths.sum()} transitions, lengths {lengths.min()} to {lengths.max()} "
        f"(mean {lengths.mean():.1f})"
    )
    for key in ("states", "actions"):
        array = getattr(episodes, key)
        low, high = array.min(axis=0), array.max(axis=0)
        yield f"  {key} {array.shape[1]} dimensions, {array.dtype}, values {low.min():.4f} to {high.max():.4f}"
        if low.min() < -1.001 or high.max() > 1.001:
            worst = int(np.argmax(np.maximum(np.abs(low), np.abs(high))))
            raise UserError(
                f"{name}: {key} must be scaled to [-1, 1], but dimension {worst} reaches from {low[worst]:.4g} to "
                f"{high[worst]:.4g}; use script/dataset/convert.py, or 2 * (x - min) / (max - min + 1e-6) - 1"
            )
        constant = np.flatnonzero(high - low < 1e-12)
        if len(constant):
            yield f"  {key}: constant dimensions {', '.join(map(str, constant))}"
    if episodes.images is not None:
        if episodes.images.dtype != np.uint8:
            raise UserError(f"{name}: images must be uint8, got {episodes.images.dtype}")
        yield f"  images {episodes.images.shape[1:]}, uint8"
    if episodes.rewards is None or episodes.terminals is None:
        yield "  rewards or terminals are missing: good for pre-training, not for Q-learning"
    elif lengths.min() > 0:
        yield from _describe_rewards(name, episodes)


def _describe_rewards(name: str, episodes: Episodes) -> Iterator[str]:
    returns, ended = episodes.returns, np.asarray(episodes.terminals, bool)
    last = episodes.starts + episodes.traj_lengths - 1
    inside = int(ended.sum() - ended[last].sum())
    if inside:
        raise UserError(f"{name}: {inside} terminals lie inside episodes; traj_lengths must end an episode at each")
    yield f"  return {returns.mean():.1f} +- {returns.std():.1f}, {returns.min():.1f} to {returns.max():.1f}"
    yield f"  {int(ended[last].sum())} episodes end with a terminal, {int((~ended[last]).sum())} were cut"


def _check_normalization(path: Path, episodes: Episodes) -> Iterator[str]:
    statistics = read_npz(path)
    missing = [k for k in NORMALIZATION_KEYS if k not in statistics]
    if missing:
        raise UserError(f"{path}: missing {', '.join(missing)} (found {', '.join(sorted(statistics)) or 'nothing'})")
    for prefix, array in (("obs", episodes.states), ("action", episodes.actions)):
        low, high = statistics[f"{prefix}_min"], statistics[f"{prefix}_max"]
        dim = array.shape[1]
        for key, value in ((f"{prefix}_min", low), (f"{prefix}_max", high)):
            if value.shape != (dim,):
                raise UserError(f"{path}: {key} has shape {value.shape}, the data has {dim} dimensions")
            if not np.isfinite(value).all():
                raise UserError(f"{path}: {key} holds NaN or infinity")
        if (low > high).any():
            raise UserError(f"{path}: {prefix}_min exceeds {prefix}_max in dimension {int(np.argmax(low > high))}")
        flat = np.flatnonzero(high - low < _CONSTANT)
        note = f"; nearly constant dimensions {', '.join(map(str, flat))}" if len(flat) else ""
        yield f"{path.name}: {prefix} {dim} dimensions, {low.min():.4g} to {high.max():.4g}{note}"
