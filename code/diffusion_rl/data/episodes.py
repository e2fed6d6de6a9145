"""Whole episodes as stacked arrays: the npz contract that every source is turned into.

Shape letters: N transitions, T episodes, O observation, A action, C,Hi,Wi image.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np

from diffusion_rl.core.errors import UserError

NORMALIZATION_KEYS = ("obs_min", "obs_max", "action_min", "action_max")
_RANGE_EPSILON = 1e-6  # keeps a constant dimension finite; part of the reference's file format


@dataclass(frozen=True)
class Episodes:
    """states [N,O], actions [N,A], traj_lengths [T] with sum N; optional rewards, terminals [N], images [N,C,Hi,Wi].

    Episodes stand one after the other. `terminals` marks the last step of an episode that really ended; the last step
    of an episode that was cut by a time limit is not marked.
    """

    states: np.ndarray
    actions: np.ndarray
    traj_lengths: np.ndarray
    rewards: np.ndarray | None = None
    terminals: np.ndarray | None = None
    images: np.ndarray | None = None

    @property
    def starts(self) -> np.ndarray:
        """First row of each episode [T]."""
        return np.concatenate([[0], np.cumsum(self.traj_lengths)[:-1]]).astype(np.int64)

    @property
    def returns(self) -> np.ndarray:
        """Undiscounted return of each episode [T], float64. Needs rewards."""
        so_far = np.concatenate([[0.0], np.cumsum(self.rewards, dtype=np.float64)])
        return so_far[self.starts + self.traj_lengths] - so_far[self.starts]

    def select(self, episodes: Sequence[int] | np.ndarray) -> Episodes:
        """The given episodes, in the given order."""
        lengths = np.asarray(self.traj_lengths)[episodes]
        starts = self.starts[episodes]
        rows = np.repeat(starts - np.cumsum(lengths) + lengths, lengths) + np.arange(lengths.sum())
        chosen = {f.name: _take(getattr(self, f.name), rows) for f in fields(self) if f.name != "traj_lengths"}
        return Episodes(traj_lengths=lengths, **chosen)

    def arrays(self) -> dict[str, np.ndarray]:
        """The arrays that are there, by their names in the file."""
        return {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) is not None}


def _take(array: np.ndarray | None, rows: np.ndarray) -> np.ndarray | None:
    return None if array is None else array[rows]


@dataclass(frozen=True)
class Normalization:
    """Minimum and maximum of every observation [O] and action [A] dimension, in the source's dtype."""

    obs_min: np.ndarray
    obs_max: np.ndarray
    action_min: np.ndarray
    action_max: np.ndarray

    @classmethod
    def of(cls, episodes: Episodes) -> Normalization:
        return cls(
            obs_min=episodes.states.min(axis=0),
            obs_max=episodes.states.max(axis=0),
            action_min=episodes.actions.min(axis=0),
            action_max=episodes.actions.max(axis=0),
        )

    def apply(self, episodes: Episodes) -> Episodes:
        """Scale states and actions to [-1, 1]."""
        return replace(
            episodes,
            states=_scale(episodes.states, self.obs_min, self.obs_max),
            actions=_scale(episodes.actions, self.action_min, self.action_max),
        )

    def undo(self, scaled: Episodes) -> Episodes:
        """Back to the source's units."""
        return replace(
            scaled,
            states=(scaled.states + 1) / 2 * (self.obs_max - self.obs_min + _RANGE_EPSILON) + self.obs_min,
            actions=(scaled.actions + 1) / 2 * (self.action_max - self.action_min + _RANGE_EPSILON) + self.action_min,
        )


def _scale(x: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    return 2 * (x - low) / (high - low + _RANGE_EPSILON) - 1


def split_episodes(
    raw: Mapping[str, np.ndarray], timeouts: np.ndarray | None, name: str, limit: int | None = None
) -> Episodes:
    """Cut flat arrays into episodes at terminals and time-outs; what follows the last end is dropped.

    raw: states [N,O], actions [N,A], rewards [N], terminals [N]; timeouts [N] or None. `name` is for error messages.
    limit: steps after which an episode is over, where no time-outs are recorded.
    """
    done = np.asarray(raw["terminals"]).astype(bool).reshape(-1)
    if timeouts is not None:
        done = done | np.asarray(timeouts).astype(bool).reshape(-1)
    elif limit is not None:
        rows = np.arange(len(done))
        began = np.maximum.accumulate(np.where(np.append(True, done[:-1]), rows, 0))
        done = done | ((rows - began) % limit == limit - 1)
    ends = np.flatnonzero(done) + 1
    if not len(ends):
        raise UserError(f"{name}: no terminal and no time-out in {len(done)} transitions, so no episode is complete")
    kept = {k: np.asarray(v)[: ends[-1]] for k, v in raw.items()}
    return Episodes(traj_lengths=np.diff(np.concatenate([[0], ends])), **kept)


def read_npz(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """All arrays of an npz file; a missing or damaged file, or one with Python objects inside, is one clear line."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no such file: {path}")
    try:
        with np.load(path, allow_pickle=False) as z:
            return {k: z[k] for k in z.files}
    except Exception as error:  # numpy, zipfile and zlib raise half a dozen kinds for damaged files
        raise UserError(f"{path} is damaged or not an npz of plain arrays ({error}); fetch or make it again") from error


def load_episodes(path: str | os.PathLike, max_n_episodes: int | None = None) -> Episodes:
    """Read and check a `train.npz`/`val.npz`, keeping the first `max_n_episodes` episodes."""
    arrays = read_npz(path)
    missing = [k for k in ("states", "actions", "traj_lengths") if k not in arrays]
    if missing:
        raise UserError(f"{path}: missing {', '.join(missing)} (found {', '.join(sorted(arrays)) or 'nothing'})")
    known = {f.name for f in fields(Episodes)}
    lengths = arrays["traj_lengths"]
    if lengths.ndim != 1 or not np.issubdtype(lengths.dtype, np.integer) or (len(lengths) and lengths.min() < 0):
        raise UserError(
            f"{path}: traj_lengths must be a 1-D array of non-negative integers, got {lengths.dtype} {lengths.shape}"
        )
    lengths = lengths.astype(np.int64)[:max_n_episodes]
    total = int(lengths.sum())
    for key in sorted(known & arrays.keys() - {"traj_lengths"}):
        if arrays[key].ndim == 0 or len(arrays[key]) < total:
            rows = "a scalar" if arrays[key].ndim == 0 else f"{len(arrays[key])} rows"
            raise UserError(f"{path}: {key} has {rows}, but traj_lengths adds up to {total}")
    episodes = Episodes(
        traj_lengths=lengths, **{k: v[:total] for k, v in arrays.items() if k in known and k != "traj_lengths"}
    )
    check(episodes, str(path))
    return episodes


def load_unscaled(directory: str | os.PathLike) -> Episodes:
    """The episodes of a folder with `train.npz` and `normalization.npz`, in the source's units."""
    directory = Path(directory)
    episodes, bounds = load_episodes(directory / "train.npz"), read_npz(directory / "normalization.npz")
    if missing := [key for key in NORMALIZATION_KEYS if key not in bounds]:
        raise UserError(f"{directory / 'normalization.npz'} lacks {', '.join(missing)}")
    return Normalization(**{key: bounds[key] for key in NORMALIZATION_KEYS}).undo(episodes)


def check(episodes: Episodes, name: str) -> None:
    """Raise UserError, naming the first thing wrong."""
    for key, array in episodes.arrays().items():
        dims = {"states": 2, "actions": 2, "images": 4}.get(key, 1)
        if array.ndim != dims:
            raise UserError(f"{name}: {key} must have {dims} dimensions, got shape {array.shape}")
        if np.issubdtype(array.dtype, np.inexact) and not np.isfinite(array).all():
            row = int(np.flatnonzero(~np.isfinite(array.reshape(len(array), -1)).all(axis=1))[0])
            raise UserError(f"{name}: {key} holds NaN or infinity (first in row {row}); remove that episode")
    if not len(episodes.states):
        raise UserError(f"{name}: no transitions in it")


def save_episodes(
    directory: str | os.PathLike, episodes: Mapping[str, Episodes], normalization: Normalization
) -> list[Path]:
    """Write `<split>.npz` for each split and `normalization.npz`; each file appears whole or not at all."""
    directory = Path(directory)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        paths = [write_npz(directory / f"{split}.npz", e.arrays()) for split, e in episodes.items()]
        statistics = {k: getattr(normalization, k) for k in NORMALIZATION_KEYS}
        return [*paths, write_npz(directory / "normalization.npz", statistics)]
    except OSError as error:
        raise UserError(f"cannot write the data set to {directory}: {error.strerror or error}") from error


def write_npz(path: Path, arrays: Mapping[str, np.ndarray]) -> Path:
    """Write an npz file whole or not at all."""
    partial = path.with_name(f".{path.name}.part")
    try:
        with open(partial, "wb") as f:
            np.savez_compressed(f, **arrays)
            f.flush()
            os.fsync(f.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return path
