"""What the recorders share: drawn numbers, tapes in the place of random functions, and the file of a case."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np


class Tape:
    """Stands in the place of random functions: draws numbers of its own, keeps them, and plays them again.

    Attributes:
        kept: (function, array) of every draw.
    """

    def __init__(self, seed: int):
        self.rng, self.position = np.random.default_rng(seed), 0
        self.kept: list[tuple[str, np.ndarray]] = []

    def rewind(self, position: int = 0) -> None:
        """Plays from there on what was drawn."""
        self.position = position

    def take(self, function: str, shape: Sequence[int]) -> np.ndarray:
        """Returns the next draw of "normal" or "uniform"."""
        if self.position == len(self.kept):
            draw = self.rng.normal(size=shape) if function == "normal" else self.rng.uniform(size=shape)
            self.kept.append((function, draw))
        kept, draw = self.kept[self.position]
        assert (kept, draw.shape) == (function, tuple(shape)), (kept, draw.shape, function, shape)
        self.position += 1
        return draw


def weights_like(shapes: Mapping[str, Sequence[int]], seed: int, scale_of: Callable[[str], bool]) -> dict[str, Any]:
    """Draws weights by name: matrices by the width of what they take, biases small, scales (by `scale_of`) near one."""
    rng, drawn = np.random.default_rng(seed), {}
    for name, shape in sorted(shapes.items()):
        values = rng.normal(size=shape)
        if scale_of(name):
            drawn[name] = 1 + 0.1 * values
        elif name.endswith("bias"):
            drawn[name] = 0.1 * values
        else:
            drawn[name] = values * (2 / (shape[-1] + shape[-2])) ** 0.5
    return drawn


def commit_of(checkout: str) -> str:
    """Returns the commit of a checkout."""
    command = ["git", "-C", checkout, "rev-parse", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def save(
    folder: str, name: str, meta: Mapping[str, Any], tape: Tape, given: Mapping[str, Any], **groups: Mapping[str, Any]
) -> None:
    """Writes a case in the format of `parity_tests/goldens`: arrays of the groups in, w, out64, grad64, and `meta`.

    Those of each group but the first are one array, `<group>/packed`; `packed` in `meta` has their names and shapes.
    """
    arrays = {f"in/{key}": np.asarray(value) for key, value in given.items()}
    draws = []
    for i, (function, draw) in enumerate(tape.kept):
        arrays[f"in/draw_{i:03d}"] = draw
        draws.append({"fn": function, "name": f"in/draw_{i:03d}"})
    packed: dict[str, list[tuple[str, tuple[int, ...]]]] = {}
    for group, values in groups.items():
        parts = {key: np.asarray(value) for key, value in values.items()}
        packed[group] = [(key, value.shape) for key, value in parts.items()]
        for key, value in parts.items():
            assert value.dtype == np.float64, f"{group}/{key} is {value.dtype}"
        arrays[f"{group}/packed"] = np.concatenate([value.reshape(-1) for value in parts.values()])
    path = Path(folder) / f"{name}.npz"
    text = json.dumps({"kind": "custom", **meta, "draws": draws, "packed": packed})
    np.savez_compressed(path, meta=np.array(text), **arrays)
    print(path, path.stat().st_size, "bytes")
