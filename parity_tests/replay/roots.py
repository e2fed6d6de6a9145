"""Square roots in float32 as the recording's processor took them.

torch takes float32 roots from a vector library that misses the nearest number now and then, and where it does differs
from processor to processor: of 500 roots that the shipped recordings hold 91 were missed; on an Intel Xeon with AVX-512
torch misses none. A miss is one unit in the last place (6e-8), which whole agents and exact likelihoods carry on to
1e-8 in float64. So roots are, in this order: this machine's torch's, if it has every recorded one; the nearest, where
that is within a quarter of a unit (none of these was missed); the one that fits another recorded table; the recorded
one. What then is open are two neighbours for each number, of which the recorded float64 results choose (`settled`).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from parity_tests import tolerances

NEVER_MISSED = 0.25  # units in the last place between the nearest number and the root
MOST_OPEN = 16
Array = np.ndarray


class Roots:
    """The recorder's square roots.

    Args:
        missed: numbers, of the open ones, whose root is not the nearest number but the second nearest.

    Attributes:
        open: numbers that were asked for and whose root no table tells.
    """

    def __init__(self, missed: frozenset[float] = frozenset()):
        self.missed, self.open = missed, dict[float, None]()
        self.known: dict[float, float] = {}
        self.torch_is_recorders = False

    def read(self, tables: Mapping[str, Array]) -> None:
        """Learn the roots that stand in recorded float32 schedule tables."""
        self.known = _recorded_pairs(tables)
        self.torch_is_recorders = _torch_has(self.known)

    def __call__(self, x: Array, fits: Callable[[Array], Array] | None = None, used: bool = True) -> Array:
        """float32 [K] -> float32 [K].

        Args:
            fits: which of K candidates agree with another recorded table.
            used: False where the result does not depend on these roots, so that none of them counts as open.
        """
        if self.torch_is_recorders:
            return _torch_root(x)
        nearest, second = neighbours(x)
        beyond = np.abs(np.sqrt(x.astype(np.float64)) - nearest) > NEVER_MISSED * np.spacing(nearest)
        agree = [np.ones(len(x), bool) if fits is None else fits(root) for root in (nearest, second)]
        missed = beyond & agree[1] & ~agree[0]
        for i in np.flatnonzero(beyond & agree[1] & agree[0]):
            number = float(x[i])
            missed[i] = self.known.get(number, nearest[i]) != nearest[i] or number in self.missed
            if used and number not in self.known:
                self.open[number] = None
        return np.where(missed, second, nearest)


def neighbours(x: Array) -> tuple[Array, Array]:
    """The float32 number nearest to the root of each, and the second nearest."""
    nearest, exact = np.sqrt(x), np.sqrt(x.astype(np.float64))
    return nearest, np.nextafter(nearest, np.where(exact > nearest, np.inf, -np.inf).astype(np.float32))


def settled(
    roots: Roots,
    ours: Mapping[str, Any],
    outputs: Callable[[Roots], Mapping[str, Any]],
    recorded: Mapping[str, Array],
) -> Roots:
    """The choice of the open roots that brings ours nearest to what was recorded in float64.

    Each root moves the outputs by so little that the effects of several add up.

    Args:
        roots: with which a model was built that gave `ours`; none is chosen where more than `MOST_OPEN` are open.
        outputs: ours with other roots, under the names of `recorded`.
        recorded: float64 arrays of the reference.
    """
    numbers = list(roots.open)
    if not 0 < len(numbers) <= MOST_OPEN:
        return roots
    at_first = _deviations(ours, recorded)
    effects = [_deviations(outputs(Roots(roots.missed ^ {n})), recorded) - at_first for n in numbers]
    choices = (np.arange(2 ** len(numbers))[:, None] >> np.arange(len(numbers))) & 1
    best = choices[np.argmin(np.abs(at_first + choices @ np.stack(effects)).max(axis=1))]
    return Roots(roots.missed ^ {number for number, other in zip(numbers, best, strict=True) if other})


def _deviations(ours: Mapping[str, Any], recorded: Mapping[str, Array]) -> Array:
    """All deviations in one row, each array's relative to its largest magnitude; infinite entries are left out."""
    parts = []
    for name, value in recorded.items():
        finite = np.isfinite(value)
        scale = tolerances.absolute_scale(name, np.max(np.abs(value[finite]), initial=0.0))
        parts.append((np.asarray(ours[name], np.float64) - value)[finite] / scale)
    return np.concatenate(parts)


def _recorded_pairs(tables: Mapping[str, Array]) -> dict[float, float]:
    """Every number whose root stands in the tables."""
    if "alphas_cumprod" not in tables:
        return {}
    one, abar = np.float32(1), tables["alphas_cumprod"]
    pairs = [
        (abar, "sqrt_alphas_cumprod"),
        (one - abar, "sqrt_one_minus_alphas_cumprod"),
        (one / abar, "sqrt_recip_alphas_cumprod"),
        (one / abar - one, "sqrt_recipm1_alphas_cumprod"),
    ]
    return {float(x): float(r) for xs, name in pairs for x, r in zip(xs, tables[name], strict=True)}


def _torch_root(x: Array) -> Array:
    import torch

    return torch.sqrt(torch.from_numpy(np.array(x))).numpy()


def _torch_has(known: Mapping[float, float]) -> bool:
    """Whether torch is installed and gives all of these roots on this machine."""
    if not known or not importlib.util.find_spec("torch"):
        return False
    numbers, recorded = (np.array(list(x), np.float32) for x in (known, known.values()))
    return np.array_equal(_torch_root(numbers), recorded)
