"""Options as people write them: `--key value`, `key=value`, flags of argparse, `-e FILE`; and the help that lists them.

What a text means follows from the option (`config.schema`) and its default. Nothing is executed in any of it.
"""

from __future__ import annotations

import argparse
import ast
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from diffusion_rl.config.schema import (
    FLAG,
    FLAGS,
    PAIRS,
    Kind,
    Option,
    Spelling,
    check_kind,
    check_ranges,
    kind_like,
    shown,
    unknown_option,
)
from diffusion_rl.config.yaml_files import parse_yaml, read_yaml
from diffusion_rl.core.errors import UserError
from diffusion_rl.core.places import here_or_shipped
from diffusion_rl.core.programs import as_here

#: Keys of an experiment's `meta_data`, which every variant carries.
META_KEYS = ("exp_name", "script_path", "num_workers", "job_name", "exp_id", "arguments")


# ---------- command lines ----------


def split_help(arguments: Sequence[str]) -> tuple[bool, list[str]]:
    """Returns whether a command line asks for help, and the rest of it."""
    rest = [argument for argument in arguments if argument not in ("-h", "--help")]
    return len(rest) < len(arguments), rest


def pairs(arguments: Sequence[str]) -> dict[str, str]:
    """Returns `--key value …` as a dictionary; any number of dashes (or none) may stand before a key."""
    if len(arguments) % 2:
        raise UserError(f"{arguments[-1]} has no value: options are pairs, --key value")
    return _once(
        ((flag.lstrip("-"), value) for flag, value in zip(arguments[::2], arguments[1::2], strict=True)), FLAGS
    )


def assignments(arguments: Sequence[str]) -> dict[str, str]:
    """Returns `key=value …` as a dictionary."""
    for argument in arguments:
        if "=" not in argument:
            raise UserError(f"{argument}: options are written key=value")
    return _once(((key, text) for key, _, text in (argument.partition("=") for argument in arguments)), PAIRS)


def _once(items: Iterable[tuple[str, str]], spelling: Spelling) -> dict[str, str]:
    texts: dict[str, str] = {}
    for key, text in items:
        if key in texts:
            name = spelling.name.format(key)
            raise UserError(f"{name} stands twice ({shown(texts[key])} and {shown(text)}): give it once")
        texts[key] = text
    return texts


@dataclass(frozen=True)
class Syntax:
    """How values are written on a command line.

    Attributes:
        none: the texts that mean None, where it is allowed.
        literal: gives the value of a text that is no option of words; of a key and its text.
    """

    spelling: Spelling
    none: tuple[str, ...]
    literal: Callable[[str, str], Any]


def value_of(key: str, text: str, kind: Kind, default: Any, syntax: Syntax) -> Any:
    """Returns the value of an option that its text means, of the type of its default.

    Raises:
        UserError: it is of another type.
    """
    if text in syntax.none and (default is None or kind.null):
        return None
    if kind.type == "text":
        return text
    value = syntax.literal(key, text)
    if kind == FLAG and syntax is PYTHON:
        value = {"True": True, "False": False, "1": True, "0": False}.get(text, text)
    if (kind.many or kind.type in ("list", "tuple")) and isinstance(value, int | float):
        value = [value]
    if isinstance(default, list | tuple) and isinstance(value, list | tuple):
        value = type(default)(value)
    check_kind(key, value, kind, syntax.spelling, default)
    if type(default) is float and type(value) is int:
        return float(value)
    return as_whole(value, kind) if type(default) is int else value


def as_whole(value: Any, kind: Kind) -> Any:
    """Returns 1e6 as a whole number, where one is asked for; any other value as it is."""
    return int(value) if kind.type == "whole number" and isinstance(value, float) and value.is_integer() else value


def _python(key: str, text: str) -> Any:
    """Returns a number or a Python literal; any other text as it is."""
    for read in (int, float, ast.literal_eval):
        try:
            return read(text)
        except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
            continue
    return text


def _yaml(key: str, text: str) -> Any:
    return parse_yaml(text, PAIRS(key, text))


PYTHON = Syntax(FLAGS, ("None",), _python)
YAML = Syntax(PAIRS, ("null", "~", ""), _yaml)


def override(
    values: dict[str, Any],
    texts: Mapping[str, str],
    kinds: Mapping[str, Kind],
    syntax: Syntax,
    what: str,
    others: Sequence[str] = (),
) -> None:
    """Puts the values of a command line in the place of defaults.

    Args:
        kinds: what the values may be; one that is not among them is of the kind of its default.
        what, others: the owner of the options, for errors, and what it takes beside `values`.

    Raises:
        UserError: an option that does not exist, or a value of another type.
    """
    for key, text in texts.items():
        if key not in values:
            raise unknown_option(key, [*values, *others], what, syntax.spelling)
        values[key] = value_of(key, text, kinds.get(key) or kind_like(values[key]), values[key], syntax)


def flags(texts: Mapping[str, str], options: Mapping[str, Option], what: str) -> dict[str, Any]:
    """Returns the values of options that a table describes with their defaults, as `--key value` changes them.

    Raises:
        UserError: as `override` does, or a value that is not allowed.
    """
    values, kinds = {k: option.default for k, option in options.items()}, {k: o.kind for k, o in options.items()}
    override(values, texts, kinds, PYTHON, what)
    check_ranges(values, kinds, FLAGS)
    return values


class Arguments(argparse.ArgumentParser):
    """Flags whose mistakes are UserErrors: no abbreviations, and every option with a value only once."""

    def __init__(self, **kwargs: Any):
        super().__init__(allow_abbrev=False, **kwargs)
        self.register("action", None, _Once)

    def format_help(self) -> str:
        """Returns the help, with its commands as they are here."""
        return as_here(super().format_help())

    def error(self, message: str) -> NoReturn:
        """Raises UserError."""
        raise UserError(f"{message} (--help says what there is)")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Returns the arguments as attributes, and what is left; a command of several (a subparser) does so with its
        own."""
        self.given = set[str]()
        return super().parse_known_args(args, namespace)


class _Once(argparse.Action):
    def __call__(
        self, parser: Any, namespace: argparse.Namespace, values: str | Sequence[Any] | None, option: str | None = None
    ) -> None:
        if self.dest in parser.given:
            parser.error(f"{option or self.dest} stands twice: give it once")
        parser.given.add(self.dest)
        setattr(namespace, self.dest, values)


# ---------- experiments' files ----------


def experiment_arguments(description: str, epilog: str = "") -> Arguments:
    """Returns the parser of `-e FILE [-g GPU]`."""
    parser = Arguments(description=description, epilog=epilog, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-e", "--experiment", required=True, help="the experiment: a YAML file")
    parser.add_argument("-g", "--gpu", default="0", help="number of the GPU (default 0)")
    return parser


def gpu_number(text: str) -> str:
    """Returns what `-g` gives, for CUDA_VISIBLE_DEVICES: numbers with commas between, or nothing for no GPU."""
    if not re.fullmatch(r"-1|(\d{1,4}(,\d{1,4})*)?|((GPU|MIG)-[\w/-]+,?)+", text):
        raise UserError(f"-g {shown(text)}: give the number of a GPU")
    return text


def read_spec(path: Path) -> dict[str, Any]:
    """Returns a YAML mapping. Raises UserError for a file that is missing, damaged or no mapping of texts to values."""
    spec = read_yaml(here_or_shipped(path))
    if not isinstance(spec, dict):
        raise UserError(f"{path}: a mapping of keys to values is needed")
    _check_keys(spec, str(path))
    return spec


def _check_keys(node: Any, where: str) -> None:
    if not isinstance(node, Mapping):
        return
    for key, value in node.items():
        if not isinstance(key, str) or "." in key:
            raise UserError(f"{where}: the key {key!r} must be a text without a dot; nest mappings instead")
        _check_keys(value, f"{where}: {key}")


# ---------- help ----------


def help_rows(values: Mapping[str, Any], meaning: Mapping[str, str], spelling: Spelling = PAIRS) -> str:
    """Returns keys with values and meanings, a line each."""
    rows = [(spelling.name.format(key), spelling.text(value), meaning.get(key, "")) for key, value in values.items()]
    width = max((len(key) for key, _, _ in rows), default=0)
    return "\n".join(f"  {key:<{width}}  {value:<24}  {text}".rstrip() for key, value, text in rows)


def comments(*paths: Path) -> dict[str, str]:
    """Returns the comments beside the keys of YAML files, which say what these mean; of several, the first counts."""
    meanings_by_key: dict[str, str] = {}
    for path in paths:
        for key, text in re.findall(r"^ *([\w.]+):(?: .*?)? +# (.+)$", path.read_text(encoding="utf-8"), re.MULTILINE):
            meanings_by_key.setdefault(key, text)
    return meanings_by_key


def meanings(options: Mapping[str, Option]) -> dict[str, str]:
    """Returns the meaning of each option."""
    return {key: option.meaning for key, option in options.items()}
