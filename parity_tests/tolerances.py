"""The gates of the ladder, each beside what was measured (worst deviation over the shipped goldens, on a 2-core x86 machine).

Deviations are relative to the largest magnitude of the compared array; gradients to the largest gradient entry of the
whole model (some gradients are zero in theory).
"""

from __future__ import annotations

# rung: (float32 gate, float64 gate)
GATES: dict[int, tuple[float, float]] = {
    0: (0.0, 0.0),  # configuration values: exact
    1: (1e-6, 1e-12),  # layers, schedules, learning rates, reward scaling, data
    2: (1e-5, 1e-12),  # whole networks
    3: (1e-5, 1e-10),  # losses, samplers, log-probabilities, advantages
    4: (1e-5, 1e-10),  # gradients
    5: (1e-5, 1e-12),  # optimizer steps, clipping, moving averages
    6: (1e-4, 1e-9),  # many training steps
    7: (1e-4, 1e-8),  # whole iterations of an algorithm
}

# In float32 nobody can be closer to the reference than its own rounding: its recorded float32-float64 deviation, with
# a margin for another order of summation.
ROUNDING_MARGIN = 8.0

# Differences of nearly equal numbers: their relative deviation says nothing, so they are compared absolutely
# (ratio and advantages are of order one).
ABSOLUTE = ("approx_kl", "pg_loss", "explained_var", "clipfrac")
SMALLEST_SCALE = 1e-8


def gate(rung: int, dtype: str, own_rounding: float = 0.0) -> float:
    """The largest deviation allowed on a rung in a precision."""
    single, double = GATES[rung]
    return double if dtype == "float64" else max(single, ROUNDING_MARGIN * own_rounding)


def absolute_scale(name: str, magnitude: float) -> float:
    """What a deviation is divided by: the array's magnitude, or at least one for the differences above."""
    if name.rsplit(".", 1)[-1].rsplit("/", 1)[-1] in ABSOLUTE:
        return max(magnitude, 1.0)
    return max(magnitude, SMALLEST_SCALE)
