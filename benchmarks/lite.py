"""The rows of DiffuserLite: DiffuserLite's decisions and updates at the sizes of its configuration for HalfCheetah."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from workloads import Row

OBSERVATION, ACTION = 17, 6
STATES, STRIDES = (5, 5, 9), (32, 8, 1)  # of each level
NETWORK = {"emb_dim": 256, "d_model": 256, "n_heads": 8, "depth": 2}
BATCH, WEIGHT = 256, 10.0
TEMPERATURE = 0.5
STEPS = {"R1": 3, "R2": 1}


class Decision(NamedTuple):
    """A model, how many environments it decides for, and its guidance."""

    model: str
    n_envs: int
    guidance: float = 1.0

    @property
    def title(self) -> str:
        guided = f", guidance {self.guidance:g}" if self.guidance != 1 else ""
        return f"{self.model}, a decision for {self.n_envs} environment{'s' if self.n_envs > 1 else ''}{guided}"


DECISIONS = {
    "lite R1": Decision("R1", 1),
    "lite R2": Decision("R2", 1),
    "lite R1 guided": Decision("R1", 1, 2.0),
    "lite R2 guided": Decision("R2", 1, 2.0),
    "lite R1 of 50": Decision("R1", 50),
    "lite R2 of 50": Decision("R2", 50),
}
TRAINING, AT_ONCE = "lite update", 5  # updates in a call


def rows() -> dict[str, Row]:
    """The rows of the table, by the names of their workloads."""
    table = {name: Row(each.title, name, name, 20 if each.n_envs == 1 else 5, 8) for name, each in DECISIONS.items()}
    title = f"{AT_ONCE} updates of three levels and inverse dynamics, {BATCH} plans"
    table[TRAINING] = Row(title, TRAINING, TRAINING, 1, 6)
    return table


def observations(n_envs: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((n_envs, OBSERVATION)).astype(np.float32)


def plans(seed: int = 0) -> list[np.ndarray]:
    """Of each level, [B,H,O]."""
    g = np.random.default_rng(seed)
    return [g.standard_normal((BATCH, states, OBSERVATION)).astype(np.float32) for states in STATES]
