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


def own_rounding(golden: Any, name: str) -> float:
    """How far the reference's float32 array ("out/loss", "grad/weight") is from its float64 twin; 0 without a twin."""
    prefix, rest = name.split("/", 1)
    twin = golden.arrays.get(f"{prefix}64/{rest}")
    if twin is None:
        return 0.0
    with np.errstate(invalid="ignore"):  # -inf minus -inf
        difference = np.abs(golden.arrays[name].astype(np.float64) - twin.astype(np.float64))
    return float(np.max(difference[np.isfinite(difference)], initial=0.0))


def gradients_rounding(golden: Any, scale: float) -> float:
    """The same for all gradients of a case together; `scale` is the largest of them.

    Where the float64 gradients were too large for the file, it keeps how far the float32 ones were from them.
    """
    if golden.meta.get("grad64_omitted"):
        return scale * golden.meta["dev_f32_f64"]["grad_global"]
    return max(own_rounding(golden, "grad/" + name) for name in golden.group("grad"))


# Filled by every comparison of the process; parity_tests/report.py reads it.
DEVIATIONS: list[Deviation] = []


class Comparison:
    """Compares the arrays of one case in one precision; the first one beyond its gate raises `Mismatch`.

    Args:
        case: name for messages.
        rung: which rung of the ladder the outputs belong to.
        dtype: "float32" or "float64": the precision that ours computed in.
    """

    def __init__(self, case: str, rung: int, dtype: str):
        self.case, self.rung, self.dtype = case, rung, dtype

    def check(
        self,
        name: str,
        ours: Any,
        theirs: Any,
        *,
        quantity: str | None = None,
        rung: int | None = None,
        scale: float | None = None,
        rounding: float = 0.0,
        gate: float | None = None,
    ) -> None:
        """Compare one array.

        Args:
            scale: instead of the reference array's own largest magnitude.
            rounding: how far the reference's own float32 is from its float64: nobody can be closer in float32.
        """
        rung = self.rung if rung is None else rung
        ours, theirs = np.asarray(ours), np.asarray(theirs)
        if ours.shape != theirs.shape:
            raise Mismatch(f"{self.case} [{self.dtype}] {name}: shape {ours.shape}, the reference has {theirs.shape}")
        if theirs.size == 0:
            return
        ours, theirs = ours.astype(np.float64), theirs.astype(np.float64)
        finite = np.isfinite(theirs)
        if scale is None:
            scale = tolerances.absolute_scale(name, float(np.max(np.abs(theirs[finite]), initial=0.0)))
        if gate is None:
            gate = tolerances.gate(rung, self.dtype, rounding / scale)
        special = (ours == theirs) | (np.isnan(ours) & np.isnan(theirs))
        wrong_special = (finite != np.isfinite(ours)) | (~finite & ~special)
        if wrong_special.any():
            self._fail(name, ours, theirs, wrong_special, float("inf"), gate)
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
