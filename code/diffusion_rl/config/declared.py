"""What a class says of itself, read from its source: nothing is imported, so a command line is checked at once.

A class attribute counts whose value is a literal (a word, a tuple of words, None). Attributes of base classes count as
they do in Python, wherever the base stands under its plain name in the module or is imported into it by that name.
"""

from __future__ import annotations

import ast
import functools
import importlib
import importlib.util
import pkgutil
import sys
from pathlib import Path
from typing import Any, NamedTuple

_NOT_THERE = object()


class _Source(NamedTuple):
    """A module's classes by name, and the full paths of the names it imports."""

    classes: dict[str, ast.ClassDef]
    imported: dict[str, str]


def declared(target: str, attribute: str, default: Any = None) -> Any:
    """Returns the value of a class attribute of `package.module.Class`; the default where it says nothing or is not
    found."""
    value = _look_up(target, attribute)
    return default if value is _NOT_THERE else value


def is_declared(target: str) -> bool:
    """Returns whether a module of that path has a class of that name."""
    module, _, name = target.rpartition(".")
    source = _read(module)
    return source is not None and name in source.classes


def declaring(package: str, attribute: str) -> dict[str, Any]:
    """Returns the classes in a package's modules whose own bodies give an attribute a value: full path -> value.

    The package itself is imported, its modules are not.
    """
    values = {}
    for entry in pkgutil.iter_modules(importlib.import_module(package).__path__):
        module = f"{package}.{entry.name}"
        source = _read(module)
        for name, node in source.classes.items() if source else ():
            if (value := _own(node, attribute)) is not _NOT_THERE:
                values[f"{module}.{name}"] = value
    return values


def _look_up(target: str, attribute: str) -> Any:
    module, _, name = target.rpartition(".")
    source = _read(module)
    if source is None or name not in source.classes:
        return _NOT_THERE
    node = source.classes[name]
    if (value := _own(node, attribute)) is not _NOT_THERE:
        return value
    for base in node.bases:
        if isinstance(base, ast.Name):
            value = _look_up(source.imported.get(base.id, f"{module}.{base.id}"), attribute)
            if value is not _NOT_THERE:
                return value
    return _NOT_THERE


def _own(node: ast.ClassDef, attribute: str) -> Any:
    for statement in node.body:
        names = statement.targets if isinstance(statement, ast.Assign) else [getattr(statement, "target", None)]
        if any(isinstance(name, ast.Name) and name.id == attribute for name in names):
            value = getattr(statement, "value", None)
            try:
                return _NOT_THERE if value is None else ast.literal_eval(value)
            except ValueError:  # computed
                return _NOT_THERE
    return _NOT_THERE


@functools.cache
def _read(module: str) -> _Source | None:
    """None for what is not there or is no Python source; modules of the standard library are not looked at."""
    if not module or module.partition(".")[0] in sys.stdlib_module_names:
        return None
    try:
        spec = importlib.util.find_spec(module)
        if spec is None or not str(spec.origin).endswith(".py"):
            return None
        tree = ast.parse(Path(str(spec.origin)).read_bytes())
    except (ImportError, ValueError, OSError, SyntaxError):
        return None
    classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
    imports = [node for node in tree.body if isinstance(node, ast.ImportFrom) and node.level == 0]
    names = ((alias, node.module) for node in imports for alias in node.names)
    return _Source(classes, {alias.asname or alias.name: f"{module}.{alias.name}" for alias, module in names})
