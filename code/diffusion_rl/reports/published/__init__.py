"""What others have published, as numbers: the CSV files beside this one, whose first lines say where they come from."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from diffusion_rl.tasks.registry import tasks_of

READING_ERROR = {"episode_return": 20.0, "success_rate": 0.01}


@dataclass(frozen=True)
class PublishedCurve:
    """A curve read off a figure: env_steps [N], values [N]."""

    env_steps: np.ndarray
    values: np.ndarray


@dataclass(frozen=True)
class FinalValue:
    """Values at the right edge `env_steps` of the figures; None where there is none."""

    env_steps: int
    replication: float | None
    original: float | None


def metric_of(task: str) -> str:
    """Returns the column of the metrics that the published values of a task are comparable with."""
    return "success_rate" if tasks_of(name=task, by_success=True) else "episode_return"


def curves() -> dict[tuple[str, str], PublishedCurve]:
    """Returns the replication's curves by (task, algorithm), such as ("hopper", "DPPO")."""
    points: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for row in rows("curves.csv"):
        point = (float(row["environment_steps"]), float(row["value"]))
        points.setdefault((row["task"], row["algorithm"]), []).append(point)
    return {key: PublishedCurve(*np.array(sorted(values)).T) for key, values in points.items()}


def final_values() -> dict[tuple[str, str], FinalValue]:
    """Returns final values by (task, algorithm)."""
    return {
        (row["task"], row["algorithm"]): FinalValue(
            int(row["environment_steps"]), _number(row["replication"]), _number(row["original"])
        )
        for row in rows("final_values.csv")
    }


def _number(text: str) -> float | None:
    return float(text) if text else None


def rows(name: str) -> list[dict[str, str]]:
    """Returns the rows of a CSV file of this folder, without its comments."""
    lines = (Path(__file__).parent / name).read_text().splitlines()
    return list(csv.DictReader(line for line in lines if not line.startswith("#")))
