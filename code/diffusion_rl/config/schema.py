"""What the options of a program may be: each is described once, and one checker reads the descriptions.

KINDS = {"batch_size": BATCH, "clip": positive(null=True), "loss": one_of("l1", "l2")}
check_ranges(values, KINDS, FLAGS, relations=(at_most("n_exec", "horizon"),))
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import PurePath
from typing import Any

import numpy as np

from diffusion_rl.core.errors import UserError

_NUMBERS = (int, float, np.integer, np.floating)
_TYPES = {"text": str, "true or false": bool, "list": list, "tuple": tuple, "mapping": dict, "value": object}
LONGEST_PART = 200  # of a path, in bytes; file systems take 255, and files get suffixes
LONGEST_NAME = 2000
ABSENT: Any = object()  # stands for "no default"


# ---------- kinds of values ----------


@dataclass(frozen=True)
class Kind:
    """The values that an option takes. Infinities, not-a-number and booleans are no numbers; 1e6 is a whole one.

    Attributes:
        type: "number", "whole number", or one of `_TYPES`.
        null: None is allowed, too.
        many: a list (or tuple) of such values, one at least.
        least, most: bounds of numbers.
        open: `least` itself is not in the range.
        words: the texts that are allowed; none: all.
        pattern, hint: a regular expression of further texts, and what it allows in words.
    """

    type: str = "number"
    null: bool = False
    many: bool = False
    least: float = -math.inf
    most: float = math.inf
    open: bool = False
    words: tuple[str, ...] = ()
    pattern: str = ""
    hint: str = ""

    @property
    def name(self) -> str:
        """Returns the type in words: "a whole number"."""
        if self.many:
            return f"a list of {self.type}s"
        return self.type if self.type == "true or false" else f"a {self.type}"

    def fits(self, value: Any) -> bool:
        """Returns whether a value is of the type, in or out of its bounds."""
        if value is None:
            return self.null
        if self.many:
            return isinstance(value, list | tuple)
        if self.type in _TYPES or (self.words and isinstance(value, str)):
            return isinstance(value, _TYPES.get(self.type, str))
        if not isinstance(value, _NUMBERS) or isinstance(value, bool):
            return False
        return self.type == "number" or isinstance(value, int) or (_finite(value) and value == int(value))

    def holds(self, value: Any) -> bool:
        """Returns whether a value is allowed."""
        if value is None:
            return self.null
        if self.many:
            one = replace(self, many=False)
            return self.fits(value) and len(value) > 0 and all(map(one.holds, value))
        if self.words and isinstance(value, str):
            return value in self.words or bool(self.pattern and re.fullmatch(self.pattern, value))
        if not self.fits(value) or self.type in _TYPES:
            return self.fits(value)
        return _finite(value) and bool(self.least <= value <= self.most) and not (self.open and value == self.least)

    def __str__(self) -> str:
        text = self.name
        if math.isfinite(self.least) and math.isfinite(self.most) and not self.open:
            text += f" from {self.least:.15g} to {self.most:.15g}"
        else:
            text += f" {'above' if self.open else 'of at least'} {self.least:.15g}" if math.isfinite(self.least) else ""
            text += " and" if math.isfinite(self.least) and math.isfinite(self.most) else ""
            text += f" of at most {self.most:.15g}" if math.isfinite(self.most) else ""
        return text + (" (or none)" if self.null else "")

    @property
    def cure(self) -> str:
        """Returns the end of the line about a value that is not allowed."""
        if self.words:
            return f"choose {'' if self.hint else 'one of '}{', '.join(self.words)}{self.hint}"
        return f"{self} is needed here"


def whole(least: float = -math.inf, most: float = math.inf, null: bool = False, many: bool = False) -> Kind:
    """Allows whole numbers, bounds included."""
    return Kind("whole number", null, many, least, most)


def number(least: float = -math.inf, most: float = math.inf, null: bool = False, many: bool = False) -> Kind:
    """Allows numbers, bounds included."""
    return Kind("number", null, many, least, most)


def positive(most: float = math.inf, null: bool = False) -> Kind:
    """Allows numbers above 0."""
    return Kind("number", null, least=0, most=most, open=True)


def one_of(*words: str) -> Kind:
    """Allows one of these words."""
    return Kind("text", words=words)


def step_or(*words: str) -> Kind:
    """Allows the number of a training step, or one of these words."""
    return Kind("whole number", least=0, words=words, hint=" or a step")


TEXT, TEXT_OR_NONE = Kind("text"), Kind("text", null=True)
FLAG = Kind("true or false")
LIST = Kind("list")
MAPPING_OR_NONE = Kind("mapping", null=True)
ANY = Kind("value", null=True)
DEVICE = Kind("text", True, words=("cpu", "cuda"), pattern=r"(cpu|cuda|gpu)(:\d{1,4})?", hint=" or cuda:<number>")
SEED = whole(0, 2**63 - 1)
SHARE = number(0, 1)  # a probability, a discount, a decay
LARGEST_SEED = 2**31 - 1  # that every generator takes
LARGEST_BATCH = 2**20
LARGEST_STEPS = 10**12
BATCH = whole(1, LARGEST_BATCH)
ENVS = whole(1, 10_000)
STEPS = whole(1, LARGEST_STEPS)
WIDTH = whole(1, 2**16)  # of a layer
HORIZON = whole(1, 100_000)
DIFFUSION_STEPS = whole(1, 100_000)
FREQUENCY_OR_OFF = whole(0, LARGEST_STEPS)  # 0: never
RATE = positive(1e38)  # of learning


def kind_like(value: Any) -> Kind:
    """Returns the kind of the values that may stand in the place of a default, where nothing else describes the
    option."""
    kinds = {bool: FLAG, int: whole(), float: number(), str: TEXT, list: LIST, tuple: Kind("tuple")}
    return kinds.get(type(value), ANY)


# ---------- options and relations ----------


@dataclass(frozen=True)
class Option:
    """An option of a program.

    Attributes:
        meaning: one sentence.
        kind: the values that it may have.
        default: its value where no file and no command line names it; ABSENT where a file always does.
    """

    meaning: str
    kind: Kind = ANY
    default: Any = ABSENT


@dataclass(frozen=True)
class Relation:
    """What values must be to each other.

    Attributes:
        keys: whose values are compared; where one is missing or None there is no relation.
        holds: given these values, whether it holds.
        rule: it in words.
    """

    keys: tuple[str, ...]
    holds: Callable[..., bool]
    rule: str


def at_most(key: str, limit: str) -> Relation:
    """Demands that the value of `key` is not above that of `limit`."""
    return Relation((key, limit), lambda value, most: value <= most, f"{key} must be at most {limit}")


def multiple(key: str, of: str) -> Relation:
    """Demands that the value of `key` is a multiple of that of `of` (0 is one of all)."""
    return Relation(
        (key, of),
        lambda value, part: not value or bool(part and value % part == 0),
        f"{key} must be a multiple of {of}",
    )


def multiple_of(key: str, factor: int, why: str = "") -> Relation:
    """Demands that the value of `key` is a multiple of a number."""
    rule = f"{key} must be {'even' if factor == 2 else f'a multiple of {factor}'}{why}"
    return Relation((key,), lambda value: value % factor == 0, rule)


# ---------- checks ----------


@dataclass(frozen=True)
class Spelling:
    """How a program's users write options; calling it gives a key with its value.

    Attributes:
        pair, name: formats of a key with its value, and of a key alone.
        wrong: format of the line about a value of another type: pair, key, value (its repr), kind, type.
        example: format of what follows it where there is a default.
        flag, none: what FLAG and None are called.
    """

    pair: str
    name: str = "{}"
    wrong: str = "{pair}: {kind} is needed here"
    example: str = ""
    flag: str = "true or false"
    none: str = "null"

    def __call__(self, key: str, value: Any) -> str:
        return self.pair.format(key, shown(value))

    def text(self, value: Any) -> str:
        """Returns a value as it is written."""
        if value is None or isinstance(value, bool):
            return self.none if value is None else self.flag.split(" or ")[not value]
        return shown(value)


PAIRS = Spelling("{}={}")
FLAGS = Spelling("--{} {}", "--{}", example=" (write it like {})", flag="True or False", none="None")
FILE = Spelling("{}: {}", wrong="{key}: {value} is no {type}")
HYDRA = Spelling("{}={}", wrong="{pair}: not {kind}", example=" (such as {})")


def check_kind(key: str, value: Any, kind: Kind, spelling: Spelling, default: Any = None) -> None:
    """Raises UserError for a value that is not of the type of its option; a default is shown as an example."""
    if kind.fits(value):
        return
    words = {"pair": spelling(key, value), "key": key, "value": repr(value) if isinstance(value, str) else shown(value)}
    name = spelling.flag if kind.type == FLAG.type else kind.name
    line = spelling.wrong.format(**words, kind=name, type=name.removeprefix("a "))
    raise UserError(line + ("" if default is None else spelling.example.format(default)))


def check_ranges(
    values: Mapping[str, Any],
    kinds: Mapping[str, Kind],
    spelling: Callable[[str, Any], str] = PAIRS,
    relations: Sequence[Relation] = (),
) -> None:
    """Checks values against what they may be, then the relations; keys that are not in `values` are left out.

    Args:
        values: by key; of nested configurations by dotted key (`config.instantiate.flatten`).
        spelling: gives a key and a value as the user writes them: "--{} {}".format, "{}={}".format, "{}: {}".format.

    Raises:
        UserError: naming the key, its value and what is allowed.
    """
    for key, kind in kinds.items():
        if key in values and not kind.holds(values[key]):
            raise UserError(f"{spelling(key, shown(values[key]))}: {kind.cure}")
    for relation in relations:
        held = [values.get(key) for key in relation.keys]
        if None not in held and not relation.holds(*held):
            pairs = ", ".join(spelling(key, shown(value)) for key, value in zip(relation.keys, held, strict=True))
            raise UserError(f"{pairs}: {relation.rule}")


def unknown_option(key: str, known: Iterable[str], what: str, spelling: Spelling) -> UserError:
    """Returns the error about an option that does not exist, with the nearest that do.

    what: owns the options: "diffusion", "this command".
    """
    hint = did_you_mean(key, known, spelling.name) or "; --help lists them all"
    return UserError(f"{spelling.name.format(shown(key))} is no option of {what}{hint}")


def did_you_mean(word: str, known: Iterable[str], name: str = "{}", cutoff: float = 0.6) -> str:
    """Returns the end of a line about an unknown word: "; did you mean …?" with up to three near ones, or nothing.

    name: format of a word in the line.
    """
    near = near_words(word, known, cutoff)
    return f"; did you mean {' or '.join(map(name.format, near))}?" if near else ""


def near_words(word: str, known: Iterable[str], cutoff: float = 0.6) -> list[str]:
    """Returns the up to three known words that are spelt most like a word."""
    return difflib.get_close_matches(word, sorted(known), n=3, cutoff=cutoff)


def _finite(value: Any) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number beyond the floating-point ones
        return False


def shown(value: Any) -> str:
    """Returns a value on one line of bearable length."""
    try:
        text = " ".join(str(value).split())
    except ValueError:  # thousands of digits, which Python refuses to write
        return "(a number of thousands of digits)"
    return text if len(text) <= 80 else f"{text[:77]}..."


def require_range(
    name: str, value: float, least: float = -math.inf, most: float = math.inf, *, above: float = -math.inf
) -> None:
    """Raises UserError unless a finite value is at least `least`, at most `most` and greater than `above`."""
    if math.isfinite(value) and least <= value <= most and value > above:
        return
    lower = f"at least {least:g}" if least > -math.inf else f"above {above:g}" if above > -math.inf else ""
    upper = f"at most {most:.10g}" if most < math.inf else ""
    raise UserError(f"{name} {value} must be {' and '.join(filter(None, (lower, upper))) or 'a finite number'}")


def require_seed(value: int) -> None:
    """Raises UserError unless `--seed` is one that every generator takes."""
    require_range("--seed", value, 0, LARGEST_SEED)


def require_inside(name: str, what: str) -> None:
    """Checks that a name leads to a place below the folder that it is put in.

    Args:
        name: one or more parts of a path, "plans/H32" say.
        what: the name as the user wrote it, to begin the error with.

    Raises:
        UserError: it is absolute, has ".." or characters that no file name has, or is too long.
    """
    parts = PurePath(name).parts
    what = what if len(what) <= 120 else f"{what[:117]}..."
    if PurePath(name).is_absolute() or ".." in parts:
        raise UserError(f"{what}: leads out of its folder; give a name without .. and not beginning with /")
    if not name.isprintable():
        raise UserError(f"{what!r}: has characters that a file name cannot have")
    if len(name.encode(errors="replace")) > LONGEST_NAME or any(
        len(part.encode(errors="replace")) > LONGEST_PART for part in parts
    ):
        raise UserError(f"{what}: is too long for a file name ({LONGEST_PART} bytes between slashes)")
