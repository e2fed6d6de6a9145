"""The rows of Diffuser: decisions and training steps, at the sizes of the reference's configurations."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from workloads import Row

SAMPLES, DENOISING, GUIDE_STEPS, BATCH, MICRO_BATCHES = 64, 20, 2, 32, 2
TRAINING_STEPS = 5  # in a call
KINDS = ("unguided", "guided", "training", "value training")


class Case(NamedTuple):
    """A task: horizon, sizes, networks, guidance."""

    horizon: int
    observation_dim: int
    action_dim: int
    dim_mults: tuple[int, ...]
    attention: bool
    scale: float
    t_stopgrad: int

    @property
    def transition_dim(self) -> int:
        return self.observation_dim + self.action_dim


CASES = {
    "hopper": Case(32, 11, 3, (1, 2, 4, 8), False, 0.1, 2),
    "halfcheetah": Case(4, 17, 6, (1, 4, 8), True, 0.001, 4),
}


def rows() -> dict[str, Row]:
    """The rows of the table, by the names of their workloads."""
    table = {}
    for name, case in CASES.items():
        sizes = f"{name}, horizon {case.horizon}"
        titles = {
            "unguided": f"{sizes}: unguided decision, {SAMPLES} plans",
            "guided": f"{sizes}: guided decision, {SAMPLES} plans",
            "training": f"{sizes}: {TRAINING_STEPS} training steps of {MICRO_BATCHES} x {BATCH}",
            "value training": f"{sizes}: {TRAINING_STEPS} training steps of the value",
        }
        for kind in KINDS:
            key = f"{name} {kind}"
            table[key] = Row(titles[kind], key, key, 1, 5)
    return table


def numbers(*shape: int, seed: int = 0) -> Any:
    """Normal draws."""
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
