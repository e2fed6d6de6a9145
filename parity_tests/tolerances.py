"""The gates of the ladder, each beside what was measured: the worst deviation over the shipped recordings.

Deviations are relative to the largest magnitude of the compared array; gradients to the largest gradient entry of the
whole model (some gradients are zero in theory).

On drawn networks: values 1.1e-6 and 4.3e-15; gradients 2e-12 in float64, of a U-Net whose groups are single numbers:
their normalised value is zero, and rounding grows by 1 / sqrt(epsilon) = 316 a layer on its way back.
"""

from __future__ import annotations

# rung: (float32 gate, float64 gate)
GATES: dict[int, tuple[float, float]] = {
    0: (0.0, 0.0),  # configuration values: exact
    1: (1e-6, 1e-12),  # layers, schedules, rates, rewards, data; measured 1.5e-7 (sine of large angles 3.3e-6), 3.9e-16
    2: (1e-5, 1e-12),  # whole networks; measured 4.0e-7, 9.3e-16
    3: (1e-5, 1e-10),  # losses, samplers, log-probabilities, advantages; measured 4.5e-7, 7.8e-16
    4: (1e-5, 1e-10),  # gradients; measured 2.2e-7, 2.7e-15
    5: (1e-5, 1e-12),  # optimizer steps, clipping, moving averages; measured 9.4e-8, 1.7e-16
    6: (1e-4, 1e-9),  # many training steps; measured 3.0e-6, 5.5e-13
    7: (1e-4, 1e-8),  # whole iterations of an algorithm; measured 5.5e-6, 1.1e-14
}

# In float32 nobody can be closer to the reference than its own rounding: its recorded float32-float64 deviation, with
# a margin for another order of summation.
ROUNDING_MARGIN = 8.0

# Differences of nearly equal numbers: their relative deviation says nothing, so they are compared absolutely
# (ratio and advantages are of order one).
ABSOLUTE = ("approx_kl", "pg_loss", "_total_loss", "explained_var", "clipfrac", "clipfracs")
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
