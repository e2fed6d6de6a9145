"""Finding what is not finite in what environments give. Imports no TensorFlow."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from diffusion_rl.core.errors import UserError


def fault(what: str, values: Any, step: int) -> str | None:
    """Says which entry of `values` is NaN or infinite; None if all are finite.

    Args:
        what: a name for the values.
        step: of the episode; 0 for its reset.
    """
    values = np.asarray(values)
    if values.dtype.kind != "f":
        return None
    finite = np.isfinite(values)
    if finite.all():
        return None
    entry = int(np.flatnonzero(~finite)[0])
    where = f"entry {entry} is {values.ravel()[entry]}" if values.ndim else f"it is {values}"
    when = f"in step {step} of the episode" if step else "after a reset"
    return f"its {what} is not finite {when} ({where}): mend the environment, or let it end the episode before"


def require_finite(
    name: str,
    observations: np.ndarray,
    rewards: np.ndarray,
    rows: Sequence[int] | np.ndarray,
    executed: Sequence[int] | np.ndarray,
    before: Sequence[int] | np.ndarray,
) -> None:
    """Raises UserError naming environment, step and entry if an executed step gave NaN or infinity.

    Args:
        name: of the environments.
        observations: [N, Ta, O];  rewards: [N, Ta].
        rows: [N] numbers of the environments;  executed: [N] how many steps of the chunk count.
        before: [N] steps of the episode before the chunk (-1: the chunk is the reset).
    """
    if np.isfinite(observations).all() and np.isfinite(rewards).all():
        return
    for i, row in enumerate(rows):
        for t in range(int(executed[i])):
            step = int(before[i]) + t + 1
            line = fault("observation", observations[i, t], step) or fault("reward", rewards[i, t], step)
            if line:
                raise UserError(f"environment {row} ({name}): {line}")
