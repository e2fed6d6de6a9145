"""Published data of several agents, as folders of npy files.

    MPE                 <data>/mpe/<scenario>/<quality>/seed_<k>_data/{obs,acs,rews,dones}_<agent>.npy     [T,…]
    SMAC                <data>/smac/<map>/<quality>/{obs,legals,rewards,actions,path_lengths}.npy          [T,N,…]
    MA-MuJoCo and kin   the same without legals, below mamujoco/, mahalfcheetah/

A data set is called <scenario>-<quality>: simple_spread-medium, 3m-Good, 2ant-Good.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from diffusion_rl.core.errors import UserError
from diffusion_rl.core.npz import read_npy
from diffusion_rl.core.places import data_dir
from diffusion_rl.data.agent_windows import AgentEpisodes
from diffusion_rl.data.episodes import Episodes, check

_MOST_ACTIONS = 10_000
KINDS = ("mpe", "smac", "smacv2", "mamujoco", "mahalfcheetah")


def load(
    kind: str,
    name: str,
    root: str | None,
    max_path_length: int,
    discrete: bool = False,
    say: Callable[[str], None] = print,
) -> AgentEpisodes:
    """Reads the episodes of a data set and says what it found.

    Args:
        root: the folder that holds <kind>/; None: that of the data which ship with this repository.
        max_path_length: length of the episodes where the data do not mark their ends.
        discrete: actions are indices (of SMAC they always are).

    Raises:
        UserError: no such data, or arrays that do not fit together, with the shapes that were found.
    """
    if kind not in KINDS:
        raise UserError(f"env_type {kind!r} is unknown: choose toy, d4rl or one of {', '.join(KINDS)}")
    scenario, _, quality = name.rpartition("-")
    if {"/", "\\", "\0"} & set(name) or ".." in (scenario, quality):
        raise UserError(f"dataset={name!r} must be a name of the form <scenario>-<quality>, not a path")
    folder = Path(root or data_dir()) / kind / scenario / quality
    if not scenario or not os.path.isdir(folder):
        cure = "python script/dataset/make_mpe_data.py makes simple_spread-medium" if kind == "mpe" else "put it there"
        raise UserError(f"no data for {name}: {folder} is no folder; {cure}, or name another data_dir")
    read = _mpe if kind == "mpe" else _smac
    data = read(folder, max_path_length, discrete or kind.startswith("smac"))
    episodes = data.episodes
    check(episodes, str(folder))
    say(
        f"data: {folder}: {len(episodes.traj_lengths)} episodes, {len(episodes.states)} steps, {data.n_agents} agents "
        f"with {data.obs_dim} observations and {data.action_dim} {'discrete ' * data.discrete}actions"
    )
    return data


def _mpe(folder: Path, max_path_length: int, discrete: bool) -> AgentEpisodes:
    """Reads the episodes of all seeds, one after the other."""
    seeds = sorted(folder.glob("seed_*_data"), key=lambda path: (len(path.name), path.name))  # 2 before 10
    if not seeds:
        raise UserError(f"{folder} holds no seed_<k>_data folder")
    parts = [_mpe_seed(seed, max_path_length, discrete) for seed in seeds]
    if len({(part[0].shape[1:], part[1].shape[1:], part[5]) for part in parts}) != 1:
        raise UserError(f"{folder}: its seeds differ in the numbers of agents, observations or actions")
    episodes = Episodes(*(np.concatenate([part[i] for part in parts]) for i in range(5)))
    return AgentEpisodes(episodes, parts[0][5], discrete)


def _mpe_seed(folder: Path, max_path_length: int, discrete: bool) -> tuple:
    n = len(list(folder.glob("obs_*.npy")))
    if not n:
        raise UserError(f"{folder} holds no obs_<agent>.npy")
    fields = {
        key: [read_npy(folder / f"{key}_{agent}.npy") for agent in range(n)] for key in ("obs", "acs", "rews", "dones")
    }
    _same_length(folder, {f"{key}_{i}": array for key, arrays in fields.items() for i, array in enumerate(arrays)})
    length = len(fields["obs"][0])
    if any(array.size != length for key in ("rews", "dones") for array in fields[key]):
        raise UserError(f"{folder}: rews and dones need one value for each of the {length} steps")
    if not discrete:
        _require_continuous(folder, fields["acs"])
    observations = [x.reshape(length, -1) for x in fields["obs"]]
    actions = [a.reshape(length, -1) for a in fields["acs"]]
    if discrete:
        actions = [_one_hot(a, folder) for a in actions]
    dones = np.any([d.reshape(length) for d in fields["dones"]], axis=0)
    if not dones.any():  # time limits only
        dones = (np.arange(length) + 1) % max_path_length == 0
    ends = np.flatnonzero(dones) + 1
    if not len(ends):
        raise UserError(f"{folder}: no episode ends within its {length} steps; set max_path_length")
    used, lengths = ends[-1], np.diff(np.concatenate([[0], ends]))
    columns = np.concatenate(observations, axis=1), np.concatenate(actions, axis=1)
    rewards = np.mean([r.reshape(length) for r in fields["rews"]], axis=0)
    cut = [x[:used].astype(np.float32) for x in columns]
    return *cut, lengths, rewards[:used].astype(np.float32), np.zeros(used, bool), n  # their ends are time limits


def _smac(folder: Path, max_path_length: int, discrete: bool) -> AgentEpisodes:
    arrays = {key: read_npy(folder / f"{key}.npy") for key in ("obs", "actions", "rewards", "path_lengths")}
    if discrete:
        arrays["legals"] = read_npy(folder / "legals.npy")
    path_lengths = arrays.pop("path_lengths").reshape(-1)
    _same_length(folder, arrays)
    total = sum(path_lengths.tolist())
    if arrays["obs"].ndim != 3 or total != len(arrays["obs"]) or path_lengths.min() < 1 or (path_lengths % 1).any():
        raise UserError(
            f"{folder}: path_lengths add up to {total}; {_shapes(arrays)}; obs must be [T,N,O], path_lengths whole "
            "numbers above 0"
        )
    lengths, (length, n) = path_lengths.astype(np.int64), arrays["obs"].shape[:2]
    for key in ("obs", *(arrays.keys() - {"obs", "rewards"})):
        if not arrays[key].size or arrays[key].size % (length * n):
            raise UserError(f"{folder}: {key} is not [T,N,…]: {_shapes(arrays)}")
    actions: np.ndarray = arrays["actions"].reshape(length, n, -1)
    legal: np.ndarray | None = None
    if not discrete:
        _require_continuous(folder, [actions])
    else:
        legal = arrays["legals"].reshape(length, -1).astype(np.float32)
        actions = _one_hot(actions[..., 0], folder, legal.shape[-1] // n)
    terminals = np.zeros(length, bool)
    terminals[np.cumsum(lengths) - 1] = lengths < max_path_length
    rewards = arrays["rewards"].reshape(length, -1).mean(axis=1)
    obs, actions = (x.reshape(length, -1).astype(np.float32) for x in (arrays["obs"], actions))
    return AgentEpisodes(Episodes(obs, actions, lengths, rewards.astype(np.float32), terminals), n, discrete, legal)


def _require_continuous(folder: Path, actions: Sequence[np.ndarray]) -> None:
    if any(array.dtype.kind != "f" for array in actions):
        raise UserError(f"{folder}: its actions are choices of a discrete space: set discrete_action=true")


def _one_hot(indices: np.ndarray, folder: Path, count: int | None = None) -> np.ndarray:
    """Turns indices [T,1] or [T,N] of `count` actions (default: as many as occur) into [T,…,count]."""
    most = _MOST_ACTIONS if count is None else count
    if not np.isfinite(indices).all() or indices.min() < 0 or indices.max() >= most or (indices % 1).any():
        raise UserError(f"{folder}: actions must be whole numbers from 0 to {most - 1}, to choose among as many")
    chosen = indices.astype(np.int64)
    if count is None:
        return np.eye(int(chosen.max()) + 1, dtype=np.float32)[chosen[:, 0]]
    return np.eye(count, dtype=np.float32)[chosen]


def _same_length(folder: Path, arrays: Mapping[str, np.ndarray]) -> None:
    lengths = {array.shape[:1] for array in arrays.values()}
    if len(lengths) != 1 or lengths & {(), (0,)}:
        raise UserError(f"{folder}: arrays of different lengths: {_shapes(arrays)}")


def _shapes(arrays: Mapping[str, np.ndarray]) -> str:
    return ", ".join(f"{name} {list(array.shape)}" for name, array in arrays.items())
