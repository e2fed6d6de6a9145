"""Comparing arrays with the recorded ones, and keeping the deviations for the report."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from parity_tests import tolerances


class Mismatch(AssertionError):
    """An array of ours is not the reference's."""


@dataclass(frozen=True)
class Deviation:
    """How far one quantity of one case is from the reference.

    `deviation` is relative to the largest magnitude of the reference's array (of the whole model, for gradients).
    """

    case: str
    rung: int
    quantity: str
    dtype: str
    deviation: float
    gate: float


# Filled by every comparison of the process; parity_tests/report.py reads it.
DEVIATIONS: list[Deviation] = []


class Comparison:
    """Compares the arrays of one case in one precision; the first one beyond its gate raises `Mismatch`.

    Args:
        case: name for messages.
        rung: which rung of the ladder the outputs belong to.
        dtype: "float32" or "float64": the precision that ours computed in.
        own_rounding: the reference's own float32-float64 deviation for this case: in float32 nobody can be closer.
    """

    def __init__(self, case: str, rung: int, dtype: str, own_rounding: float = 0.0):
        self.case, self.rung, self.dtype, self.own_rounding = case, rung, dtype, own_rounding

    def check(
        self,
        name: str,
        ours: Any,
        theirs: Any,
        *,
        quantity: str | None = None,
        rung: int | None = None,
        scale: float | None = None,
        own_rounding: float | None = None,
        gate: float | None = None,
    ) -> None:
        """Compare one array; `scale` replaces the reference array's own largest magnitude."""
        rung = self.rung if rung is None else rung
        ours, theirs = np.asarray(ours), np.asarray(theirs)
        if gate is None:
            rounding = self.own_rounding if own_rounding is None else own_rounding
            gate = tolerances.gate(rung, self.dtype, rounding)
        if ours.shape != theirs.shape:
            raise Mismatch(f"{self.case} [{self.dtype}] {name}: shape {ours.shape}, the reference has {theirs.shape}")
        if theirs.size == 0:
            return
        ours, theirs = ours.astype(np.float64), theirs.astype(np.float64)
        finite = np.isfinite(theirs)
        special = (ours == theirs) | (np.isnan(ours) & np.isnan(theirs))
        wrong_special = (finite != np.isfinite(ours)) | (~finite & ~special)
        if wrong_special.any():
            self._fail(name, ours, theirs, wrong_special, float("inf"), gate)
        if scale is None:
            scale = tolerances.absolute_scale(name, float(np.max(np.abs(theirs[finite]), initial=0.0)))
        error = np.where(finite, np.abs(np.where(finite, ours, 0) - np.where(finite, theirs, 0)), 0.0)
        deviation = float(error.max()) / scale
        DEVIATIONS.append(Deviation(self.case, rung, quantity or name, self.dtype, deviation, gate))
        if deviation > gate:
            self._fail(name, ours, theirs, error > gate * scale, deviation, gate)

    def check_all(self, ours: dict[str, Any], theirs: dict[str, np.ndarray], prefix: str = "", **options: Any) -> None:
        """Compare each array of `theirs`, in order; ours must have them all."""
        for name, value in theirs.items():
            if name not in ours:
                raise Mismatch(f"{self.case} [{self.dtype}] {prefix}{name}: ours gives no such output")
            self.check(prefix + name, ours[name], value, **options)

    def _fail(
        self, name: str, ours: np.ndarray, theirs: np.ndarray, wrong: np.ndarray, deviation: float, gate: float
    ) -> None:
        index = tuple(int(i) for i in np.argwhere(wrong)[0]) if wrong.ndim else ()
        at = f"[{', '.join(map(str, index))}]" if index else ""
        raise Mismatch(
            f"{self.case} [{self.dtype}]: first divergence in {name}{at}: ours {ours[index]:.17g}, "
            f"reference {theirs[index]:.17g} ({int(wrong.sum())} of {wrong.size} entries; "
            f"deviation {deviation:.2e}, gate {gate:.0e}).\n{self._advice(name)}"
        )

    def _advice(self, name: str) -> str:
        if self.dtype == "float64":
            return (
                "What next: in float64 this is wrong mathematics, not rounding. Look at how this output is computed, "
                f"then at its inputs, with `pytest parity_tests/test_goldens.py -k {self.case} -x --showlocals`; "
                "lower rungs that fail as well (networks, schedules) are the cause more often than this one."
            )
        return (
            "What next: if the float64 comparison of this case passes, this is rounding: compare the order of the "
            "operations with the formula in the docstring; otherwise mend that first. Gates live in "
            "parity_tests/tolerances.py."
        )
