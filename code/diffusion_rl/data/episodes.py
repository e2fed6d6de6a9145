"""Whole episodes as stacked arrays: the npz contract that every source is turned into.

Shape letters: N transitions, T episodes, O observation, A action, C,Hi,Wi image.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from diffusion_rl.core.errors import UserError, listed
from diffusion_rl.core.npz import names_in, read_npz, write_npz
from diffusion_rl.data.normalizers import MinMaxNormalizer

log = logging.getLogger(__name__)

SCALED = 1.001  # what the scaling reaches, and some rounding
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
        """Returns the first row of each episode [T]."""
        return np.concatenate([[0], np.cumsum(self.traj_lengths)[:-1]]).astype(np.int64)

    @property
    def returns(self) -> np.ndarray:
        """Returns the undiscounted return of each episode [T], float64. Needs rewards."""
        so_far = np.concatenate([[0.0], np.cumsum(np.asarray(self.rewards), dtype=np.float64)])
        return so_far[self.starts + self.traj_lengths] - so_far[self.starts]

    def require_rewards(self, name: str) -> np.ndarray:
        """Returns the rewards [N]. Raises UserError where there are none, of which no value can be learned."""
        if self.rewards is None:
            raise UserError(f"{name}: no rewards in it, so no values can be learned; convert the data set anew")
        if not np.any(self.rewards):
            log.warning("%s: every reward is 0, so there is nothing to learn of values", name)
        return self.rewards

    def select(self, episodes: Sequence[int] | np.ndarray) -> Episodes:
        """Takes the episodes with these numbers [n], in this order."""
        lengths = np.asarray(self.traj_lengths)[episodes]
        starts = self.starts[episodes]
        rows = np.repeat(starts - np.cumsum(lengths) + lengths, lengths) + np.arange(lengths.sum())
        chosen: dict[str, Any] = {
            f.name: _take(getattr(self, f.name), rows) for f in fields(self) if f.name != "traj_lengths"
        }
        return Episodes(traj_lengths=lengths, **chosen)

    def arrays(self) -> dict[str, np.ndarray]:
        """Returns the arrays that are present, by their names in the file."""
        return {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) is not None}


def _take(array: np.ndarray | None, rows: np.ndarray) -> np.ndarray | None:
    return None if array is None else array[rows]


def bounds_of(episodes: Episodes) -> MinMaxNormalizer:
    """Takes the bounds of all observations and actions, in the source's dtype."""
    return MinMaxNormalizer.fit(episodes.states, episodes.actions)


def scale_episodes(episodes: Episodes, bounds: MinMaxNormalizer) -> Episodes:
    """Maps states and actions to [-1, 1]."""
    return _mapped(episodes, bounds, lambda x, low, span: 2 * (x - low) / span - 1)


def unscale_episodes(episodes: Episodes, bounds: MinMaxNormalizer) -> Episodes:
    """Maps states and actions back to the source's units."""
    return _mapped(episodes, bounds, lambda x, low, span: (x + 1) / 2 * span + low)


def _mapped(episodes: Episodes, bounds: MinMaxNormalizer, function: Callable[..., np.ndarray]) -> Episodes:
    """Applies function(x, low, span) to states and actions, where `span` is the width of their range."""

    def apply(x: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
        return function(x, low, high - low + _RANGE_EPSILON)

    return replace(
        episodes,
        states=apply(episodes.states, bounds.obs_min, bounds.obs_max),
        actions=apply(episodes.actions, bounds.action_min, bounds.action_max),
    )


def join(parts: Sequence[Mapping[str, np.ndarray]], name: str) -> Episodes:
    """Joins single episodes, {field of `Episodes`: [L,…]}, one after the other.

    Args:
        name: of the data, for messages.

    Raises:
        UserError: there are none, they differ in shape, or they are no data to learn from (see `check`).
    """
    if not parts:
        raise UserError(f"{name}: no episodes in it")
    for key in parts[0]:
        if len({part[key].shape[1:] for part in parts}) != 1:
            raise UserError(f"{name}: episodes differ in the shape of their {key}")
    columns = {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
    episodes = Episodes(traj_lengths=np.array([len(part["actions"]) for part in parts]), **columns)
    check(episodes, name)
    return episodes


def split_episodes(
    raw: Mapping[str, np.ndarray], timeouts: np.ndarray | None, name: str, limit: int | None = None
) -> Episodes:
    """Cuts flat arrays into episodes at terminals and time-outs; what follows the last end is dropped.

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


def save_scaled(directory: str | os.PathLike, raw: Episodes) -> None:
    """Writes `train.npz`, scaled to [-1, 1] by the ranges of these episodes, and `normalization.npz`."""
    bounds = bounds_of(raw)
    save_episodes(directory, {"train": scale_episodes(raw, bounds)}, bounds)


def load_episodes(path: str | os.PathLike, max_n_episodes: int | None = None, scaled: bool = False) -> Episodes:
    """Reads and checks a `train.npz`/`val.npz`, keeping the first `max_n_episodes` episodes; logs how many are left
    out.

    scaled: states and actions must be in [-1, 1] (see `check_scaled`).
    """
    arrays = read_npz(path, [f.name for f in fields(Episodes)])
    missing = [k for k in ("states", "actions", "traj_lengths") if k not in arrays]
    if missing:
        raise UserError(f"{path}: missing {', '.join(missing)} (found {listed(names_in(path))})")
    lengths = arrays.pop("traj_lengths")
    if lengths.ndim != 1 or not np.issubdtype(lengths.dtype, np.integer) or (len(lengths) and lengths.min() < 0):
        raise UserError(
            f"{path}: traj_lengths must be a 1-D array of non-negative integers, got {lengths.dtype} {lengths.shape}"
        )
    everything = sum(lengths.tolist())  # in Python's integers, which do not overflow
    for key, array in sorted(arrays.items()):
        if array.ndim == 0 or len(array) != everything:
            rows = "a scalar" if array.ndim == 0 else f"{len(array)} rows"
            raise UserError(f"{path}: {key} has {rows}, but traj_lengths adds up to {everything}")
    kept = lengths.astype(np.int64)[:max_n_episodes]
    if len(kept) < len(lengths):
        log.warning("%s: the first %d of %d episodes are used (max_n_episodes)", path, len(kept), len(lengths))
    total = int(kept.sum())
    episodes = Episodes(traj_lengths=kept, **{k: v[:total] for k, v in arrays.items()})
    check(episodes, str(path))
    if scaled:
        check_scaled(episodes, str(path))
    return episodes


def load_unscaled(directory: str | os.PathLike) -> Episodes:
    """Reads the episodes of a folder with `train.npz` and `normalization.npz`, in the source's units."""
    directory = Path(directory)
    episodes = load_episodes(directory / "train.npz", scaled=True)
    dims = episodes.states.shape[1], episodes.actions.shape[1]
    return unscale_episodes(episodes, MinMaxNormalizer.from_npz(directory / "normalization.npz", *dims))


_DIMENSIONS = {"states": 2, "actions": 2, "images": 4}  # of the arrays; the others have one


def check(episodes: Episodes, name: str) -> None:
    """Raises UserError naming the first thing wrong: shapes, types, NaN, terminals inside episodes."""
    if not len(episodes.states):
        raise UserError(f"{name}: no transitions in it")
    for key, array in episodes.arrays().items():
        dims = _DIMENSIONS.get(key, 1)
        if array.ndim != dims:
            raise UserError(f"{name}: {key} must have {dims} dimensions, got shape {array.shape}")
        if 0 in array.shape[1:]:
            raise UserError(f"{name}: {key} of shape {array.shape} hold nothing")
        if np.issubdtype(array.dtype, np.inexact) and not np.isfinite(array).all():
            row = int(np.flatnonzero(~np.isfinite(array.reshape(len(array), -1)).all(axis=1))[0])
            raise UserError(f"{name}: {key} holds NaN or infinity (first in row {row}); remove that episode")
    if not np.issubdtype(episodes.actions.dtype, np.floating):
        raise UserError(
            f"{name}: actions are of type {episodes.actions.dtype}, as choices of a discrete space are, and only "
            "continuous ones are supported; if they are values on a scale, save them as float32"
        )
    if episodes.images is not None and episodes.images.dtype != np.uint8:
        raise UserError(f"{name}: images must be uint8, got {episodes.images.dtype}; save them as 0 to 255")
    if episodes.actions.shape[1] == 1 and episodes.actions.max() >= 2 and _whole(episodes.actions):
        log.warning("%s: its actions, whole numbers from 0 on, look like choices of a discrete space", name)
    _check_terminals(episodes, name)


def _whole(x: np.ndarray) -> bool:
    return bool(x.min() >= 0 and (x == np.floor(x)).all())


def _check_terminals(episodes: Episodes, name: str) -> None:
    """Raises UserError where an episode goes on after a terminal; warns of several at its end (lasting success)."""
    if episodes.terminals is None:
        return
    inside = inner_terminals(episodes)
    later = inside[~np.asarray(episodes.terminals, bool)[inside + 1]]
    if len(later):
        raise UserError(
            f"{name}: an episode goes on after its terminal in row {later[0]}; traj_lengths must end it there"
        )
    if len(inside):
        log.warning("%s: %d terminals lie inside episodes, before the last one of each", name, len(inside))


def inner_terminals(episodes: Episodes) -> np.ndarray:
    """Finds the rows [n] of terminals that are not the last of their episodes."""
    lengths = np.asarray(episodes.traj_lengths)
    inner = np.array(episodes.terminals, bool)
    inner[(episodes.starts + lengths - 1)[lengths > 0]] = False
    return np.flatnonzero(inner)


def check_scaled(episodes: Episodes, name: str, limit: float = 5.0) -> None:
    """Raises UserError where states or actions exceed `limit`; warns where they exceed 1, as when they were scaled with
    the ranges of other data."""
    for key in ("states", "actions"):
        array = getattr(episodes, key)
        low, high = array.min(axis=0), array.max(axis=0)
        worst = int(np.argmax(np.maximum(np.abs(low), np.abs(high))))
        reach = f"dimension {worst} reaches from {low[worst]:.4g} to {high[worst]:.4g}"
        if max(-low[worst], high[worst]) > limit:
            raise UserError(
                f"{name}: {key} must be scaled to [-1, 1], but {reach}; use python script/dataset/convert.py, or "
                "2 * (x - min) / (max - min + 1e-6) - 1"
            )
        if max(-low[worst], high[worst]) > SCALED:
            log.warning("%s: %s should be scaled to [-1, 1], but %s", name, key, reach)


def save_episodes(
    directory: str | os.PathLike, episodes: Mapping[str, Episodes], normalization: MinMaxNormalizer
) -> list[Path]:
    """Writes `<split>.npz` for each split and `normalization.npz`; each file appears whole or not at all."""
    directory = Path(directory)
    paths = [write_npz(directory / f"{split}.npz", e.arrays()) for split, e in episodes.items()]
    return [*paths, write_npz(directory / "normalization.npz", asdict(normalization))]
