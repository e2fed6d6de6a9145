"""Configurations as data: arithmetic in them, their keys, and objects from their `_target_`s."""

from __future__ import annotations

import ast
import functools
import importlib
import inspect
import math
import operator
import os
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import hydra.utils
from hydra.core.hydra_config import HydraConfig
from hydra.errors import InstantiationException
from omegaconf import DictConfig, ListConfig, OmegaConf

from diffusion_rl.core.errors import UserError
from diffusion_rl.core.places import data_dir

PACKAGE = "diffusion_rl."
Number = int | float

_BINARY: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
}
_UNARY: dict[type[ast.unaryop], Callable[[Any], Any]] = {ast.UAdd: operator.pos, ast.USub: operator.neg}
_FUNCTIONS: dict[str, Callable[..., Any]] = {"round": round, "int": int, "min": min, "max": max}
_LARGEST_EXPONENT = 100


def calc(expression: str) -> Number:
    """Returns the value of an arithmetic expression: numbers, + - * / // % **, round, int, min, max; Python's rules and
    types.

    Nothing else can be written in it, so reading a configuration never runs code.
    Raises ValueError naming what is not allowed.
    """
    try:
        return _value(ast.parse(str(expression).strip(), mode="eval").body)
    except (SyntaxError, ArithmeticError, TypeError, RecursionError) as error:
        raise ValueError(f"cannot calculate '{expression}': {error}") from error


def _value(node: ast.expr) -> Any:
    match node:
        case ast.Constant(value=int() | float() as value) if not isinstance(value, bool):
            return value
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _BINARY:
            a, b = _value(left), _value(right)
            if isinstance(op, ast.Pow) and (abs(a) > 1e9 or abs(b) > _LARGEST_EXPONENT):
                raise ValueError(f"the power {a}**{b} is too large")
            return _BINARY[type(op)](a, b)
        case ast.UnaryOp(op=op, operand=operand) if type(op) in _UNARY:
            return _UNARY[type(op)](_value(operand))
        case ast.Call(func=ast.Name(id=name), args=arguments, keywords=[]) if name in _FUNCTIONS:
            return _FUNCTIONS[name](*map(_value, arguments))
    allowed = "numbers, + - * / // % **, " + ", ".join(_FUNCTIONS)
    raise ValueError(f"'{ast.unparse(node)}' is not arithmetic (allowed: {allowed})")


def register_resolvers() -> None:
    """Makes `${calc:'…'}` known to OmegaConf, and what the reference's configurations use. Safe to call again.

    Its `${eval:'…'}` is Python's eval there; here it is arithmetic only, as calc is. Its environment variables have the
    defaults of this package's configurations.
    """
    for name in ("calc", "eval"):
        OmegaConf.register_new_resolver(name, calc, replace=True)
    for name, rounded in (("round_up", math.ceil), ("round_down", math.floor)):
        OmegaConf.register_new_resolver(name, functools.partial(_rounded, rounded), replace=True)
    OmegaConf.register_new_resolver("oc.env", _environment, replace=True)


def _rounded(rounded: Callable[[Number], int], value: Any) -> int:
    return rounded(calc(str(value)))


def _environment(name: str, default: Any = ...) -> Any:
    """Returns an environment variable, else the default, else what stands for those of the reference that are not
    set."""
    if default is ...:
        data = "data" if Path("data").exists() else str(data_dir())
        default = {"DPPO_DATA_DIR": data, "DPPO_LOG_DIR": "log", "DPPO_WANDB_ENTITY": None}.get(name, ...)
    if name not in os.environ and default is ...:
        raise UserError(f"the configuration needs the environment variable {name}, which is not set")
    value = os.environ.get(name, default)
    return None if value is None else str(value)


def set_by_user(key: str) -> bool:
    """Returns whether the command line or the configuration file that it names says `key` itself, rather than a file
    that this one includes. True outside a command line."""
    if not HydraConfig.initialized():
        return True
    hydra_config = HydraConfig.get()
    if any(text.lstrip("+~").startswith(f"{key}=") for text in hydra_config.overrides.task):
        return True
    folders = [Path(source.path) for source in hydra_config.runtime.config_sources if source.schema == "file"]
    files = [folder / f"{hydra_config.job.config_name}.yaml" for folder in folders]
    named = next((file for file in files if file.is_file()), None)
    return named is not None and OmegaConf.select(OmegaConf.load(named), key, throw_on_missing=False) is not None


def flatten(node: Any, prefix: str = "") -> dict[str, Any]:
    """Returns nested mappings as {"a.b": value}. Lists are values; an empty mapping is the value {}."""
    flat: dict[str, Any] = {}
    for key, value in plain(node).items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def targets(node: Any, prefix: str = "") -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yields (dotted path, mapping) of each mapping with a `_target_`, from the top down, in mappings and lists."""
    content = plain(node)
    if isinstance(content, Mapping):
        if "_target_" in content:
            yield prefix, content
        items: Any = content.items()
    elif isinstance(content, list):
        items = enumerate(content)
    else:
        return
    for key, value in items:
        yield from targets(value, f"{prefix}.{key}" if prefix else str(key))


def plain(node: Any) -> Any:
    """Returns the node of a configuration as plain, resolved mappings and lists; anything else as it is."""
    return OmegaConf.to_container(node, resolve=True) if isinstance(node, DictConfig | ListConfig) else node


def instantiate(node: Any, **arguments: Any) -> Any:
    """Returns the object that `node` (from the user's own command line and files) describes.

    A UserError from inside comes out as itself; anything else that prevents building becomes one.
    """
    try:
        return hydra.utils.instantiate(node, **arguments)
    except InstantiationException as error:
        cause: BaseException | None = error
        while cause is not None:
            if isinstance(cause, UserError):
                raise cause from error
            cause = cause.__cause__
        raise UserError(first_line(error)) from error


def instantiate_trusted(node: Any, allowed: Collection[str], own: Collection[str] = ()) -> Any:
    """Builds what a configuration out of a checkpoint describes: classes of the closed list `allowed` only, and those
    of `own`, which whoever reads the checkpoint named.

    Raises UserError for any other `_target_`, before anything is imported or built, and for an interpolation or a
    Hydra directive, which a saved (resolved) configuration has no need of.
    """
    content = OmegaConf.to_container(node, resolve=False) if isinstance(node, DictConfig | ListConfig) else node
    for where, text in _strings(content):
        if "${" in text:
            raise UserError(f"checkpoint's configuration: {where} has an interpolation ({text}); refused")
    for where, mapping in targets(content):
        name = mapping["_target_"]
        directives = [key for key in mapping if str(key).startswith("_") and key != "_target_"]
        if directives or not isinstance(name, str) or (name not in allowed and name not in own):
            what = f"{where}.{directives[0]}" if directives else f"{where}._target_ = {name}"
            raise UserError(
                f"checkpoint's configuration: {what} is no network or policy of this package; refused "
                "(a class of your own is taken where you name it: allow=, --allow)"
            )
    return instantiate(OmegaConf.create(content))


def find_class(name: str) -> type:
    """Returns the class `package.module.Class`. Raises UserError saying why it cannot be had.

    Modules of Python's standard library are not even imported: no part of a run is one of their classes.
    """
    module, _, attribute = name.rpartition(".")
    _refuse_standard_library(name, module)
    try:
        cls = getattr(importlib.import_module(module), attribute, None) if module else None
    except ImportError as error:
        raise UserError(f"cannot import '{name}': {error}") from error
    if not inspect.isclass(cls):
        raise UserError(f"'{name}' is not a class")
    _refuse_standard_library(name, cls.__module__)
    return cls


def _refuse_standard_library(name: str, module: str) -> None:
    if module.partition(".")[0] in sys.stdlib_module_names:
        raise UserError(f"'{name}' is of Python's standard library and can be no part of a run; refused")


def default_arguments(target: str) -> dict[str, Any]:
    """Returns the arguments of a class that have defaults, with these."""
    parameters = parameters_of(find_class(target))[0].values()
    return {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}


def parameters_of(cls: type) -> tuple[dict[str, inspect.Parameter], bool]:
    """Returns the arguments of a class and of those bases it passes others on to, and whether it takes any other.

    A class that passes arguments on to something else than its bases names the methods in `ALSO_TAKES`. `**unused` of a
    class of this package does not count as taking any: a misspelt argument would vanish in it.
    """
    names: dict[str, inspect.Parameter] = {}
    for base in cls.__mro__:
        if base.__module__.split(".")[0] != cls.__module__.split(".")[0]:
            break
        if "__init__" not in vars(base):
            continue
        parameters = list(inspect.signature(vars(base)["__init__"]).parameters.values())[1:]
        names = _named(parameters) | names
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            return names, False
        for method in vars(base).get("ALSO_TAKES", ()):
            names = _named(list(inspect.signature(method).parameters.values())[1:]) | names
    return names, not cls.__module__.startswith(PACKAGE)


def _named(parameters: Iterable[inspect.Parameter]) -> dict[str, inspect.Parameter]:
    return {p.name: p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}


def _strings(node: Any, where: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(node, str):
        yield where, node
    elif isinstance(node, Mapping | list):
        items = node.items() if isinstance(node, Mapping) else enumerate(node)
        for key, value in items:
            yield from _strings(value, f"{where}.{key}".lstrip("."))


def first_line(error: BaseException) -> str:
    """Returns an exception of Hydra or OmegaConf on one line, without their appended internals."""
    lines = [line.strip() for line in str(error).splitlines()]
    kept = [line for line in lines if line and not line.startswith(("object_type", "reference_type"))]
    return "; ".join(kept) or type(error).__name__
