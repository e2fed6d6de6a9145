"""Exponential moving averages of weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import tensorflow as tf

KEEP, COPY, AVERAGE = 0, 1, 2  # what happens to the averaged weights after a step


def ema_update(old: Any, new: Any, decay: float) -> Any:
    """Returns old * decay + (1 - decay) * new, for arrays or tensors of any shape."""
    return old * decay + (1 - decay) * new


def average_into(averaged: Sequence[Any], variables: Sequence[Any], decay: float) -> None:
    """Moves each averaged variable towards its original."""
    for mean, variable in zip(averaged, variables, strict=True):
        mean.assign(ema_update(mean, variable, decay))


def follow(averaged: Sequence[Any], variables: Sequence[Any], how: Any, decay: float) -> None:
    """Keeps the averaged variables (KEEP), copies the originals (COPY) or averages (AVERAGE). how: an int32 scalar."""

    def copied() -> tf.Tensor:
        for mean, variable in zip(averaged, variables, strict=True):
            mean.assign(variable)
        return how

    def moved() -> tf.Tensor:
        average_into(averaged, variables, decay)
        return how

    tf.switch_case(how, {COPY: copied, AVERAGE: moved, KEEP: lambda: how})
