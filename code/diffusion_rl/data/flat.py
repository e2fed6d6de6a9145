"""Data sets as flat arrays, every row of them: what DiffuserLite's windows are cut from."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from diffusion_rl.data.episodes import Episodes, check
from diffusion_rl.data.hdf5 import open_hdf5
from diffusion_rl.data.sources import d4rl

FIELDS = ("observations", "actions", "rewards", "terminals", "timeouts")


def read_flat(path: Path) -> dict[str, np.ndarray] | None:
    """Reads the arrays of a file in D4RL's layout; None where it has another."""
    with open_hdf5(path) as file:
        if not d4rl.recognises(file):
            return None
        flat = d4rl.read_columns(file, FIELDS)
    check(Episodes(flat["observations"], flat["actions"], np.array([len(flat["rewards"])]), flat["rewards"]), str(path))
    return flat


def flat_of(episodes: Episodes) -> dict[str, np.ndarray]:
    """Turns complete episodes with rewards into flat arrays; one that is not terminated ends with a time-out."""
    count, rewards = len(episodes.states), episodes.require_rewards("the data set")
    terminals = np.zeros(count, bool) if episodes.terminals is None else np.asarray(episodes.terminals, bool)
    timeouts = np.zeros(count, bool)
    last = episodes.starts + np.asarray(episodes.traj_lengths) - 1
    timeouts[last] = ~terminals[last]
    return dict(zip(FIELDS, (episodes.states, episodes.actions, rewards, terminals, timeouts), strict=True))


def transitions(flat: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns rows with the row after each, for Q-learning, without those that a time-out ends.

    Returns:
        "observations" [M,O], "actions" [M,A], "rewards" [M], "following" [M,O], "terminals" [M].
    """
    kept = np.flatnonzero(~flat["timeouts"][:-1].astype(bool))
    rows = {field: flat[field][kept] for field in FIELDS[:-1]}
    return rows | {"following": flat["observations"][kept + 1]}
