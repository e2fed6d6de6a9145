"""What scale.py varies: DPPO's default Hopper sizes, one at a time.

Shape letters: N rows of data, O observation, A action, T episodes.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
from workloads import ACTION, OBSERVATION

TUNED = 5  # fine-tuned denoising steps, where denoising steps vary
MINIBATCH, SAMPLES = 5_000, 1_000  # rows of an update, samples that they are drawn from
SEEING = 4  # environments whose cameras a policy sees
EPISODE = 1_000  # steps of the episodes of synthetic data


class Row(NamedTuple):
    """A line of the table.

    Attributes:
        varied: what grows, the panel of the figure.
        title: what is measured.
        sizes: smallest first.
        power: of the size, beyond which the cost should not grow.
        process: the row of `our_scale.py` whose processes measure it.
        part: what is measured there.
        quantity: "call", or "first" where the first one is meant, or "build", what comes before it.
    """

    varied: str
    title: str
    sizes: tuple[int, ...]
    power: float
    process: str
    part: str
    quantity: str = "call"


ENVIRONMENTS = (8, 40, 160, 320, 640)
DENOISING, WIDTHS, CHUNKS, HISTORIES = (5, 20, 50, 100), (256, 512, 1024, 2048), (4, 8, 16, 32), (1, 2, 4, 8)
DATA, REPLAY, CAMERAS = (10**4, 10**5, 10**6, 10**7), (10**4, 10**5, 10**6), (1, 2, 3)
_UPDATE = f"PPO minibatch of {MINIBATCH} rows"

ROWS = {
    "environments": Row("environments", "a decision", ENVIRONMENTS, 1, "environments", "decision"),
    "simulation": Row("environments", "a chunk step simulated", ENVIRONMENTS, 1, "environments", "step"),
    "denoising": Row("denoising steps", "a decision", DENOISING, 1, "denoising", "decision"),
    "compiling": Row(
        "denoising steps", "its first call, which compiles", DENOISING, 1, "denoising", "decision", "first"
    ),
    "denoising-update": Row("denoising steps", f"{_UPDATE}, {TUNED} tuned", DENOISING, 0, "denoising", "update"),
    "width": Row("width of the actor", "a decision", WIDTHS, 2, "width", "decision"),
    "width-update": Row("width of the actor", _UPDATE, WIDTHS, 2, "width", "update"),
    "chunk": Row("actions of a chunk", "a decision", CHUNKS, 1, "chunk", "decision"),
    "chunk-update": Row("actions of a chunk", _UPDATE, CHUNKS, 1, "chunk", "update"),
    "history": Row("observations of a history", "a decision", HISTORIES, 1, "history", "decision"),
    "history-update": Row("observations of a history", _UPDATE, HISTORIES, 1, "history", "update"),
    "data": Row("rows of data", "10 steps of pre-training", DATA, 0, "data", "steps"),
    "loading": Row("rows of data", "its start: data and networks", DATA, 1, "data", "steps", "build"),
    "replay": Row("rows of a replay buffer", "8 updates of IDQL", REPLAY, 0, "idql replay", "updates"),
    "replay-written": Row("rows of a replay buffer", "8 updates of DIPO", REPLAY, 0, "dipo replay", "updates"),
    "cameras": Row("cameras", f"a decision for {SEEING} environments", CAMERAS, 1, "cameras", "decision"),
}


def write_data(path: Path, count: int) -> Path:
    """Writes `count` rows of random demonstrations for Hopper, not compressed.

    states [N,O] and actions [N,A] in [-1, 1], traj_lengths [T].
    """
    g = np.random.default_rng(0)
    arrays = {
        name: g.random((count, width), np.float32) for name, width in (("states", OBSERVATION), ("actions", ACTION))
    }
    for array in arrays.values():
        array *= 2
        array -= 1
    lengths = np.full(-(-count // EPISODE), EPISODE)
    lengths[-1] -= lengths.sum() - count
    np.savez(path, traj_lengths=lengths, **arrays)  # type: ignore[arg-type]  # whose keywords are arrays
    return path
