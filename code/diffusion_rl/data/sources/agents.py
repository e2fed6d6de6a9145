"""Published data of several agents, as folders of npy files.

    MPE                 <data>/mpe/<scenario>/<quality>/seed_<k>_data/{obs,acs,rews,dones}_<agent>.npy     [T,…]
    SMAC                <data>/smac/<map>/<quality>/{obs,legals,rewards,actions,path_lengths}.npy          [T,N,…]
    MA-MuJoCo and kin   the same without legals, below mamujoco/, mahalfcheetah/

A data set is called <scenario>-<quality>: simple_spread-medium, 3m-Good, 2ant-Good.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from diffusion_rl.core.errors import UserError
from diffusion_rl.data.agent_windows import AgentEpisodes
from diffusion_rl.data.assets import data_dir
from diffusion_rl.data.episodes import Episodes, check

KINDS = ("mpe", "smac", "smacv2", "mamujoco", "mahalfcheetah")


def load(
    kind: str, name: str, root: str | None, max_path_length: int, discrete: bool = False, say=print
) -> AgentEpisodes:
    """The episodes of a data set; what was found is told.

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
    folder = Path(root or data_dir()) / kind / scenario / quality
    if not scenario or not folder.is_dir():
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


def _array(path: Path) -> np.ndarray:
    try:
        return np.load(path, allow_pickle=False)
    except FileNotFoundError:
        raise UserError(f"{path} is missing") from None
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{path} is no npy file of numbers ({error})") from error


def _mpe(folder: Path, max_path_length: int, discrete: bool) -> AgentEpisodes:
    """Of all seeds, one after the other."""
    seeds = sorted(folder.glob("seed_*_data"), key=lambda p: int(re.sub(r"\D", "", p.name) or 0))
    if not seeds:
        raise UserError(f"{folder} holds no seed_<k>_data folder")
    parts = [_mpe_seed(seed, max_path_length, discrete) for seed in seeds]
    episodes = Episodes(*(np.concatenate([part[i] for part in parts]) for i in range(5)))
    return AgentEpisodes(episodes, parts[0][5], discrete)


def _mpe_seed(folder: Path, max_path_length: int, discrete: bool) -> tuple:
    n = len(list(folder.glob("obs_*.npy")))
    if not n:
        raise UserError(f"{folder} holds no obs_<agent>.npy")
    fields = {
        key: [_array(folder / f"{key}_{agent}.npy") for agent in range(n)] for key in ("obs", "acs", "rews", "dones")
    }
    _same_length(folder, {f"{key}_{i}": array for key, arrays in fields.items() for i, array in enumerate(arrays)})
    length = len(fields["obs"][0])
    actions = [_one_hot(a.reshape(length, -1)) if discrete else a.reshape(length, -1) for a in fields["acs"]]
    dones = np.any([d.reshape(length) for d in fields["dones"]], axis=0)
    if not dones.any():  # time limits only
        dones = (np.arange(length) + 1) % max_path_length == 0
    ends = np.flatnonzero(dones) + 1
    if not len(ends):
        raise UserError(f"{folder}: no episode ends within its {length} steps; set max_path_length")
    used, lengths = ends[-1], np.diff(np.concatenate([[0], ends]))
    columns = np.concatenate(fields["obs"], axis=1), np.concatenate(actions, axis=1)
    rewards = np.mean([r.reshape(length) for r in fields["rews"]], axis=0)
    cut = [x[:used].astype(np.float32) for x in columns]
    return *cut, lengths, rewards[:used].astype(np.float32), np.zeros(used, bool), n  # their ends are time limits


def _smac(folder: Path, max_path_length: int, discrete: bool) -> AgentEpisodes:
    arrays = {key: _array(folder / f"{key}.npy") for key in ("obs", "actions", "rewards", "path_lengths")}
    if discrete:
        arrays["legals"] = _array(folder / "legals.npy")
    lengths = arrays.pop("path_lengths").reshape(-1).astype(np.int64)
    _same_length(folder, arrays)
    length, n = arrays["obs"].shape[:2]
    if arrays["obs"].ndim != 3 or lengths.sum() != length:
        raise UserError(f"{folder}: path_lengths add up to {lengths.sum()}; {_shapes(arrays)}; obs must be [T,N,O]")
    actions, legal = arrays["actions"].reshape(length, n, -1), None
    if discrete:
        legal = arrays["legals"].reshape(length, n, -1)
        actions = np.eye(legal.shape[-1], dtype=np.float32)[actions[..., 0].astype(np.int64)]
        legal = legal.reshape(length, -1).astype(np.float32)
    terminals = np.zeros(length, bool)
    terminals[np.cumsum(lengths) - 1] = lengths < max_path_length
    rewards = arrays["rewards"].reshape(length, -1).mean(axis=1)
    flat = (x.reshape(length, -1).astype(np.float32) for x in (arrays["obs"], actions))
    return AgentEpisodes(Episodes(*flat, lengths, rewards.astype(np.float32), terminals), n, discrete, legal)


def _one_hot(indices: np.ndarray) -> np.ndarray:
    return np.eye(int(indices.max()) + 1, dtype=np.float32)[indices[:, 0].astype(np.int64)]


def _same_length(folder: Path, arrays: Mapping[str, np.ndarray]) -> None:
    if len({len(array) for array in arrays.values()}) != 1:
        raise UserError(f"{folder}: arrays of different lengths: {_shapes(arrays)}")


def _shapes(arrays: Mapping[str, np.ndarray]) -> str:
    return ", ".join(f"{name} {list(array.shape)}" for name, array in arrays.items())
