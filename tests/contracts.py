"""Contracts of the package that its imports do not show: sizes, shapes in docstrings, defaults of configurations.

    python -m tests.contracts [FOLDER OF THE PACKAGE]

`make lint` runs it beside import-linter, whose contracts about imports stand in `pyproject.toml`. What does not keep to
a contract yet stands in `KNOWN` and may only shrink: an entry that is better than its number fails until it is lowered
or taken off.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

PACKAGE = Path(__file__).resolve().parents[1] / "code" / "diffusion_rl"

LARGEST = {"lines of a file": 600, "lines of a class": 300, "lines of a function": 60, "parameters": 12}
SHAPES_STATED = 0.95  # share of the public functions on tensors; raised as docstrings are completed
DEFAULTS = 59  # `.get(key, default)` of configurations, whose defaults belong into the schema; lowered as they go

_KEYS = "its parameters are keys of configurations"
KNOWN: dict[tuple[str, str], tuple[int, str]] = {
    ("networks/unet1d.py UNetTrunk.__init__", "parameters"): (13, _KEYS),
    ("policies/diffusion.py DiffusionPolicy.__init__", "parameters"): (15, _KEYS),
    ("policies/flow.py FlowPolicy.__init__", "parameters"): (13, _KEYS),
    ("policies/flow.py FineTunedFlowPolicy.__init__", "parameters"): (24, _KEYS),
}

Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef

_TENSOR = re.compile(r"\b(Array|tf\.Tensor|np\.ndarray)\b")
_NAMED = re.compile(r"\b(dict|Mapping)\[.*\]")  # arrays by name have no shape in common
_DEFAULT = re.compile(r"(self\.)?(\w*cfg|config|train|settings|options|chunks|specific)(\[[^]]*\])?\.get\('")
_BRACKETS = re.compile(r"\[([\w*…., +\-/]*)\]")


class Size(NamedTuple):
    """How large something is: `kind` is a key of `LARGEST`."""

    place: str
    kind: str
    number: int


def definitions(node: ast.AST, prefix: str = "") -> Iterator[tuple[str, Definition]]:
    """Yields every class and function below a node with its dotted name, however deep it stands."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, Definition):
            yield f"{prefix}{child.name}", child
            yield from definitions(child, f"{prefix}{child.name}.")
        else:
            yield from definitions(child, prefix)


def modules(package: Path) -> Iterator[tuple[str, str, ast.Module]]:
    """Yields path, text and syntax tree of every module."""
    for path in sorted(package.rglob("*.py")):
        text = path.read_text()
        yield path.relative_to(package).as_posix(), text, ast.parse(text)


def sizes(package: Path) -> Iterator[Size]:
    """Yields the sizes of all files, classes and functions."""
    for path, text, tree in modules(package):
        yield Size(path, "lines of a file", len(text.splitlines()))
        for name, node in definitions(tree):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            if isinstance(node, ast.ClassDef):
                yield Size(f"{path} {name}", "lines of a class", lines)
            else:
                yield Size(f"{path} {name}", "lines of a function", lines)
                yield Size(f"{path} {name}", "parameters", len(parameters(node)))


def parameters(node: ast.FunctionDef | ast.AsyncFunctionDef) -> list[ast.arg]:
    """Returns what a caller may pass: neither `self` nor `cls`, nor `*args` and `**kwargs`."""
    named = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
    return named[1:] if named and named[0].arg in ("self", "cls") else named


def too_large(package: Path, known: dict[tuple[str, str], tuple[int, str]]) -> list[str]:
    """Returns a line for each size above its limit that is not known, and for each known one that has shrunk."""
    measured = {(size.place, size.kind): size.number for size in sizes(package)}
    wrong = []
    for (place, kind), number in measured.items():
        most = known.get((place, kind), (LARGEST[kind], ""))[0]
        if number > most:
            wrong.append(f"{place}: {number} {kind}, at most {most}")
    for (place, kind), (number, _) in known.items():
        present = measured.get((place, kind), 0)
        if present < number:
            now = "take it off" if present <= LARGEST[kind] else f"write {present}"
            wrong.append(f"{place}: {present} {kind}, known are {number}: {now} in tests/contracts.py")
    return wrong


def takes_tensors(node: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """Whether a parameter or the result is annotated as a tensor, or as a tuple or list of tensors."""
    annotations = [argument.annotation for argument in parameters(node)] + [node.returns]
    texts = [ast.unparse(annotation) for annotation in annotations if annotation is not None]
    return any(_TENSOR.search(_NAMED.sub("", text)) for text in texts)


def states_a_shape(docstring: str) -> bool:
    """Whether a docstring has a shape, "[B,H,A]" or "[..., 2]" (but no range, "[0, 1]"), or says "scalar"."""
    shapes = [text for text in _BRACKETS.findall(docstring) if re.search(r"[A-Za-z…]|\.\.\.|^\d+$", text)]
    return bool(shapes) or re.search(r"\bscalars?\b", docstring) is not None


def functions_on_tensors(package: Path) -> Iterator[tuple[str, bool]]:
    """Yields public functions on tensors, and whether their docstrings state shapes."""
    for path, _, tree in modules(package):
        for name, node in definitions(tree):
            parts = name.split(".")
            private = any(part.startswith("_") and part != "__call__" for part in parts)
            if private or isinstance(node, ast.ClassDef) or not takes_tensors(node) or _is_inner(tree, parts):
                continue
            yield f"{path}:{node.lineno} {name}", states_a_shape(ast.get_docstring(node) or "")


def _is_inner(tree: ast.Module, parts: list[str]) -> bool:
    """Whether a function stands inside another function."""
    body: list[ast.stmt] = tree.body
    for part in parts[:-1]:
        outer = next((n for n in body if isinstance(n, ast.ClassDef) and n.name == part), None)
        if outer is None:
            return True
        body = outer.body
    return False


def shapes_missing(package: Path, wanted: float) -> tuple[float, list[str]]:
    """Returns the share of functions on tensors that state shapes, and the others if it is less than `wanted`."""
    stated = list(functions_on_tensors(package))
    share = sum(ok for _, ok in stated) / max(len(stated), 1)
    return share, [f"{name}: state the shapes of its tensors" for name, ok in stated if not ok and share < wanted]


def defaults(package: Path) -> list[str]:
    """Returns a line for each `.get(key, default)` of a configuration outside of config."""
    found = []
    for path, _, tree in modules(package):
        calls = (node for node in ast.walk(tree) if isinstance(node, ast.Call) and len(node.args) == 2)
        for call in calls:
            text = ast.unparse(call)
            if _DEFAULT.match(text) and not path.startswith("config/"):
                found.append(f"{path}:{call.lineno} {text}: its default belongs into the schema")
    return found


def main(arguments: list[str]) -> int:
    """Prints what is wrong and a summary. Returns 1 if anything is, else 0."""
    package = Path(arguments[0]) if arguments else PACKAGE
    share, missing = shapes_missing(package, SHAPES_STATED)
    gets = defaults(package)
    wrong = too_large(package, KNOWN) + missing + (gets if len(gets) > DEFAULTS else [])
    for line in wrong:
        print(line)
    print(f"shapes are stated for {share:.1%} of the functions on tensors (at least {SHAPES_STATED:.0%})")
    print(f"defaults outside of the schema: {len(gets)} (at most {DEFAULTS})")
    print(f"sizes, shapes, defaults: {len(wrong)} to mend" if wrong else "sizes, shapes, defaults: as agreed")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
