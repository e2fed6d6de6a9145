"""Ranges and relations of the numbers of a command line or configuration, checked before anything starts.

RANGES = {"batch_size": whole(1, 2**20), "learning_rate": positive(), "seed": SEED, "clip": number(0, 1, null=True)}
RELATIONS = (at_most("n_exec", "horizon"), multiple("eval_freq", "save_freq"))

check_ranges(values, RANGES, "--{} {}".format, RELATIONS)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from diffusion_rl.core.errors import UserError

_NUMBERS = (int, float, np.integer, np.floating)
Spelling = Callable[[str, Any], str]  # how a key with its value is written where the user wrote it


@dataclass(frozen=True)
class Range:
    """What a number may be. Infinities, not-a-number and booleans are in no range; 1e6 is a whole number as well.

    Attributes:
        least, most: bounds.
        whole: only whole numbers.
        open: `least` itself is not in the range.
        null: None is allowed, too.
        many: a list (or tuple) of such numbers, one at least.
    """

    least: float = -math.inf
    most: float = math.inf
    whole: bool = False
    open: bool = False
    null: bool = False
    many: bool = False

    def holds(self, value: Any) -> bool:
        """Whether a value is in the range."""
        if value is None:
            return self.null
        if self.many:
            return isinstance(value, list | tuple) and len(value) > 0 and all(map(self._holds, value))
        return self._holds(value)

    def _holds(self, value: Any) -> bool:
        if not isinstance(value, _NUMBERS) or isinstance(value, bool) or not _finite(value):
            return False
        if self.whole and value != int(value):
            return False
        return bool(self.least <= value <= self.most) and not (self.open and value == self.least)

    def __str__(self) -> str:
        kind = "whole number" if self.whole else "number"
        text = f"a list of {kind}s" if self.many else f"a {kind}"
        if math.isfinite(self.least) and math.isfinite(self.most) and not self.open:
            text += f" from {self.least:.15g} to {self.most:.15g}"
        else:
            text += f" {'above' if self.open else 'of at least'} {self.least:.15g}" if math.isfinite(self.least) else ""
            text += " and" if math.isfinite(self.least) and math.isfinite(self.most) else ""
            text += f" of at most {self.most:.15g}" if math.isfinite(self.most) else ""
        return text + (" (or none)" if self.null else "")


def whole(least: float = -math.inf, most: float = math.inf, null: bool = False, many: bool = False) -> Range:
    """A whole number."""
    return Range(least, most, whole=True, null=null, many=many)


def number(least: float = -math.inf, most: float = math.inf, null: bool = False, many: bool = False) -> Range:
    """A number, bounds included."""
    return Range(least, most, null=null, many=many)


def positive(most: float = math.inf, null: bool = False) -> Range:
    """A number above 0."""
    return Range(0, most, open=True, null=null)


SEED = whole(0, 2**63 - 1)
SHARE = number(0, 1)  # a probability, a discount, a decay
LARGEST_SEED = 2**31 - 1  # that every generator takes
LARGEST_BATCH = 2**20
LARGEST_ENVS = 10_000
LARGEST_STEPS = 10**12
BATCH = whole(1, LARGEST_BATCH)
ENVS = whole(1, LARGEST_ENVS)
STEPS = whole(1, LARGEST_STEPS)
FREQUENCY = STEPS  # every so many steps
WIDTH = whole(1, 2**16)  # of a layer
HORIZON = whole(1, 100_000)
DIFFUSION_STEPS = whole(1, 100_000)
FREQUENCY_OR_OFF = whole(0, LARGEST_STEPS)  # 0: never


@dataclass(frozen=True)
class Relation:
    """What numbers must be to each other.

    Attributes:
        keys: whose values are compared; where one is missing or None there is no relation.
        holds: given these values, whether it holds.
        rule: it in words.
    """

    keys: tuple[str, ...]
    holds: Callable[..., bool]
    rule: str


def at_most(key: str, limit: str) -> Relation:
    """The value of `key` is not above that of `limit`."""
    return Relation((key, limit), lambda value, most: value <= most, f"{key} must be at most {limit}")


def multiple(key: str, of: str) -> Relation:
    """The value of `key` is a multiple of that of `of` (0 is one of all)."""
    return Relation(
        (key, of),
        lambda value, part: not value or bool(part and value % part == 0),
        f"{key} must be a multiple of {of}",
    )


def check_ranges(
    values: Mapping[str, Any],
    ranges: Mapping[str, Range],
    spelling: Spelling = "{}={}".format,
    relations: Sequence[Relation] = (),
) -> None:
    """Check values against their ranges, then the relations; keys that are not in `values` are left out.

    Args:
        values: by key; of nested configurations by dotted key (`config.instantiate.flatten`).
        spelling: a key and a value as the user writes them: "--{} {}".format, "{}={}".format, "{}: {}".format.

    Raises:
        UserError: naming the key, its value and what is allowed.
    """
    for key, allowed in ranges.items():
        if key in values and not allowed.holds(values[key]):
            raise UserError(f"{spelling(key, shown(values[key]))}: {allowed} is needed here")
    for relation in relations:
        held = [values.get(key) for key in relation.keys]
        if None not in held and not relation.holds(*held):
            pairs = ", ".join(spelling(key, shown(value)) for key, value in zip(relation.keys, held, strict=True))
            raise UserError(f"{pairs}: {relation.rule}")


def _finite(value: Any) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number beyond the floating-point ones
        return False


def shown(value: Any) -> str:
    """A value on one line of bearable length."""
    try:
        text = " ".join(str(value).split())
    except ValueError:  # thousands of digits, which Python refuses to write
        return "(a number of thousands of digits)"
    return text if len(text) <= 80 else f"{text[:77]}..."


def require_range(
    name: str, value: float, least: float = -math.inf, most: float = math.inf, *, above: float = -math.inf
) -> None:
    """Raise UserError unless a finite value is at least `least`, at most `most` and greater than `above`."""
    if math.isfinite(value) and least <= value <= most and value > above:
        return
    lower = f"at least {least:g}" if least > -math.inf else f"above {above:g}" if above > -math.inf else ""
    upper = f"at most {most:.10g}" if most < math.inf else ""
    raise UserError(f"{name} {value} must be {' and '.join(filter(None, (lower, upper))) or 'a finite number'}")


def require_seed(value: int) -> None:
    """Raise UserError unless `--seed` is one that every generator takes."""
    require_range("--seed", value, 0, LARGEST_SEED)
