"""Cases whose arrays lie in one: those of `parity_tests/recorders`."""

from __future__ import annotations

import numpy as np

from parity_tests.replay.files import Golden


def unpacked(golden: Golden, group: str) -> dict[str, np.ndarray]:
    """The arrays of a group by name."""
    names = golden.meta["packed"][group]
    ends = np.cumsum([int(np.prod(shape)) for _, shape in names])
    parts = np.split(golden.arrays[f"{group}/packed"], ends[:-1])
    return {name: part.reshape(shape) for (name, shape), part in zip(names, parts, strict=True)}


def below(arrays: dict[str, np.ndarray], start: str) -> dict[str, np.ndarray]:
    """Those whose names begin so, without it."""
    return {name.removeprefix(start): value for name, value in arrays.items() if name.startswith(start)}
