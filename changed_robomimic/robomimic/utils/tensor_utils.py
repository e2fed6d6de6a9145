"""Operations on nested dicts, lists and tuples of arrays."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np


def map_ndarray(x: Any, func: Callable[[np.ndarray], Any]) -> Any:
    """`x` with `func` applied to every array in it; dicts, lists and tuples keep their types."""
    if isinstance(x, np.ndarray):
        return func(x)
    if isinstance(x, Mapping):
        return type(x)((key, map_ndarray(value, func)) for key, value in x.items())
    if isinstance(x, (list, tuple)):
        return type(x)(map_ndarray(value, func) for value in x)
    return x


def clone(x: Any) -> Any:
    """Copies of all arrays."""
    return map_ndarray(x, np.copy)


def to_batch(x: Any) -> Any:
    """[...] -> [1, ...] everywhere."""
    return map_ndarray(x, lambda array: array[None])


def to_sequence(x: Any) -> Any:
    """[B, ...] -> [B, 1, ...] everywhere."""
    return map_ndarray(x, lambda array: array[:, None])


def index_at_time(x: Any, ind: Any) -> Any:
    """[B, T, ...] -> [B, ...]: row b at time ind[b]."""
    return map_ndarray(x, lambda array: array[np.arange(len(array)), np.asarray(ind)])


def join_dimensions(x: Any, begin_axis: int, end_axis: int) -> Any:
    """The axes begin_axis to end_axis (inclusive) made one everywhere."""

    def join(array: np.ndarray) -> np.ndarray:
        return array.reshape(*array.shape[:begin_axis], -1, *array.shape[end_axis + 1 :])

    return map_ndarray(x, join)


def get_shape(x: Any) -> Any:
    """The shape in place of every array."""
    return map_ndarray(x, lambda array: array.shape)
