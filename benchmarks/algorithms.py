"""The rows of `--algorithms`: one update of each algorithm with a replay buffer, at the sizes of its configuration.

Both sides get the same resolved configuration; its class paths are translated for the reference.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from workloads import Row

ROWS, ENVS = 20_000, 40  # of the replay buffer: one iteration of the default collection
UPDATES = 8  # in a call, of algorithms that make hundreds an iteration
CRITIC_SHARE = 4  # DAWR: an update of the critic to so many of the actor


class Case(NamedTuple):
    """An algorithm: title, configuration, overrides, updates in a call, whether ours works on them side by side."""

    title: str
    config: str
    overrides: tuple[str, ...] = ()
    updates: int = UPDATES
    side_by_side: bool = False  # one thread for each operation, as the algorithm's SIDE_BY_SIDE has it in training


def _hopper(title: str, short: str) -> Case:
    return Case(title, f"gym/finetune/hopper-v2/ft_{short}_diffusion_mlp", side_by_side=True)


CASES = {
    "rwr": _hopper("DRWR", "rwr"),
    "awr": _hopper("DAWR", "awr"),
    "dipo": _hopper("DIPO", "dipo"),
    "idql": _hopper("IDQL", "idql"),
    "dql": _hopper("DQL", "dql"),
    "qsm": _hopper("QSM", "qsm"),
    "sac": Case("SAC: one of both critics, two of the actor", "gym/scratch/halfcheetah-v2/sac_mlp", (), 1),
    "rlpd": Case("RLPD: 20 of ten critics, one of the actor", "gym/scratch/halfcheetah-v2/rlpd_mlp", (), 1),
    "calql": Case("Cal-QL, online", "gym/finetune/halfcheetah-v2/calql_mlp_online"),
    "ibrl": Case("IBRL: 5 of five critics, one of the actor", "gym/finetune/halfcheetah-v2/ibrl_mlp", (), 1),
}


def rows() -> dict[str, Row]:
    """The rows of the table, by the names of their workloads."""
    table = {}
    for name, case in CASES.items():
        count = f"{case.updates} updates" if case.updates > 1 else "an iteration's updates"
        key = f"{name} updates"
        table[key] = Row(f"{case.title}: {count}", key, key, 1, 3)
    return table


def experience(cfg: Any, seed: int = 0) -> dict[str, np.ndarray]:
    """Rows of a replay buffer, of every field that some algorithm reads."""
    g = np.random.default_rng(seed)
    chunk = (cfg["act_steps"], cfg["action_dim"])
    obs = (cfg["cond_steps"], cfg["obs_dim"])
    arrays = {
        "obs": g.uniform(-1, 1, (ROWS, *obs)),
        "next_obs": g.uniform(-1, 1, (ROWS, *obs)),
        "actions": g.uniform(-1, 1, (ROWS, *chunk)),
        "rewards": g.uniform(0, 1, ROWS),
        "terminated": g.integers(0, 2, ROWS),
        "returns": g.standard_normal(ROWS),
        "advantages": g.standard_normal(ROWS),
        "weights": g.uniform(0, 10, ROWS),
    }
    return {name: array.astype(np.float32) for name, array in arrays.items()}
