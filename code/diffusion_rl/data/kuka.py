"""The data of the Kuka stacking task: a folder of `*.npy`, one trajectory [T,39] of states each.

Shape letters: N states, M windows, H horizon, D = 39.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from diffusion_rl.core.errors import UserError
from diffusion_rl.core.npz import read_npy
from diffusion_rl.data.normalizers import IdentityNormalizer, WideLimitsNormalizer
from diffusion_rl.data.trajectories import TrajectoryDataset
from diffusion_rl.data.windows import require_windows, windows_of
from diffusion_rl.tasks.kuka_stacking import STATE_DIM, stacked

EVERY, LONGEST = 2, 300  # frames: one out of so many, and at most so many of these


def read_trajectories(folder: str | Path) -> list[np.ndarray]:
    """Reads every second state of each file, at most 300, in the order of the files' names: float64 [T,39].

    Raises:
        UserError: there are no such files, or one of them holds anything but finite numbers [T,39].
    """
    paths = sorted(Path(folder).glob("*.npy"))
    if not paths:
        raise UserError(f"no *.npy in {folder}: unpack the trajectories there (kuka_dataset), or name --data_dir")
    return [_read(path) for path in paths]


def _read(path: Path) -> np.ndarray:
    states = read_npy(path, mmap=True)
    if states.ndim != 2 or states.shape[1] != STATE_DIM or not len(states):
        raise UserError(f"{path} has shape {states.shape}, a trajectory is [T,{STATE_DIM}]: remove it")
    states = np.array(states[::EVERY][:LONGEST], np.float64)
    if not np.isfinite(states).all():
        raise UserError(f"{path} has entries that are no numbers: remove it")
    return states


class StackingDataset(TrajectoryDataset):
    """Windows of H normalised states, whole inside their trajectories, and which pairs of blocks stand in them.

    The range that the normalizer maps to [-1, 1] includes 0 where a trajectory has fewer than 300 states: the
    reference takes it from arrays padded with zeros.

    Args:
        trajectories: [T,39] of up to 300 states each.
        horizon: H.
    """

    def __init__(self, trajectories: list[np.ndarray], horizon: int):
        self.horizon, self.normalizer = horizon, WideLimitsNormalizer.__name__
        self.observation_dim, self.action_dim = STATE_DIM, 0
        self.path_lengths = np.array([len(states) for states in trajectories], np.int64)
        self.starts = np.cumsum(self.path_lengths) - self.path_lengths
        ends = [bound for states in trajectories for bound in (states.min(axis=0), states.max(axis=0))]
        padding = np.zeros((1, STATE_DIM))
        if self.path_lengths.min() < LONGEST:
            ends.append(padding[0])
        fitted = WideLimitsNormalizer.fit(np.stack(ends))
        self.normalizers = {"observations": fitted, "actions": IdentityNormalizer({})}
        rows = [*trajectories, padding]  # the last row is padding, which these windows never reach
        self.transitions = np.concatenate([fitted.normalize(states).astype(np.float32) for states in rows])
        self.labels = np.concatenate([stacked(states) for states in rows])  # [N+1,12]
        self.condition_times, self.values, self.images = (), None, None
        self.rewards = np.zeros(len(self.transitions) - 1, np.float32)
        episodes, firsts = windows_of(self.path_lengths - horizon + 1)
        if not len(episodes):
            raise UserError(
                f"no trajectory has {horizon} states (the longest has {self.path_lengths.max()}, every second one "
                "counted): choose a smaller --horizon"
            )
        require_windows(self.path_lengths, episodes, horizon)
        self.windows = np.stack([episodes, firsts], axis=1)
