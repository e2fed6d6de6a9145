"""YAML of people's own files and command lines, whatever it is: plain values or one line about what is wrong.

Nothing is executed or imported. 1e-4 is a number (YAML 1.1 asks for a dot), dates are texts, a key may stand only once,
`<<` merges mappings.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from diffusion_rl.core.errors import UserError
from diffusion_rl.core.files import write_bytes

LARGEST_FILE = 1 << 20  # bytes
MOST_VALUES = 100_000  # with every alias counted as what it stands for
DEEPEST = 100  # levels of lists and mappings
MOST_DIGITS = 1000  # of a whole number
_MERGE = "tag:yaml.org,2002:merge"
_PLAIN = {f"tag:yaml.org,2002:{kind}" for kind in ("str", "int", "float", "bool", "null", "seq", "map", "merge")}


class _Loader(yaml.SafeLoader):
    """Safe YAML with other implicit types; those that SafeLoader has stay as they are."""

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in kinds if not tag.endswith((":timestamp", ":value"))]
        for first, kinds in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Merges what stands under `<<`: own keys win, then the first of several mappings (PyYAML's versions
        differ)."""
        own = {_key(key): (key, value) for key, value in node.value if key.tag != _MERGE}
        merged: dict[Any, tuple[yaml.Node, yaml.Node]] = {}
        for value in (value for key, value in node.value if key.tag == _MERGE):
            for part in value.value if isinstance(value, yaml.SequenceNode) else [value]:
                if not isinstance(part, yaml.MappingNode):
                    raise yaml.constructor.ConstructorError(None, None, "<< needs a mapping", part.start_mark)
                self.flatten_mapping(part)
                for pair in part.value:
                    merged.setdefault(_key(pair[0]), pair)
        node.value = list((merged | own).values())


def _key(node: yaml.Node) -> Any:
    """Returns what two equal keys have in common."""
    return (node.tag, node.value) if isinstance(node, yaml.ScalarNode) else id(node)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(\d[\d_]*\.?[\d_]*|\.\d[\d_]*)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)


def read_yaml(path: Path) -> Any:
    """Returns the value in a file. Raises UserError for a file that is missing, no plain file, too large, or not
    YAML."""
    try:
        if path.exists() and not path.is_file():
            raise UserError(f"{path} is no plain file: give a YAML file")
        if (size := path.stat().st_size) > LARGEST_FILE:
            raise UserError(f"{path} has {size} bytes: a YAML file may have {LARGEST_FILE}")
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not valid YAML: {error}") from error
    return parse_yaml(text, str(path))


def write_yaml(path: Path, node: Mapping[str, Any]) -> None:
    """Writes a mapping of plain values, whole or not at all."""
    write_bytes(path, yaml.safe_dump(dict(node), sort_keys=False, allow_unicode=True).encode())


def parse_yaml(text: str, where: str) -> Any:
    """Returns the value of a YAML text. Raises UserError that begins with `where` for anything that is not one."""
    loader = None
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _count(node, {}, [], where)
        return loader.construct_document(node)
    except yaml.YAMLError as error:
        text = " ".join(str(error).split()).replace(' in "<unicode string>",', ",")[:300]
        raise UserError(f"{where} is not valid YAML: {text}") from error
    except RecursionError as error:
        raise UserError(f"{where}: lists and mappings may be {DEEPEST} levels deep") from error
    except (ValueError, TypeError, LookupError, AttributeError, OverflowError) as error:  # of PyYAML's constructors
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{where} is not valid YAML: a value is not what its tag says ({reason})") from error
    finally:
        if loader is not None:
            loader.dispose()


def _count(node: yaml.Node, known: dict[int, int], above: list[yaml.Node], where: str) -> int:
    """Returns how many values a node stands for with its aliases; checks each of them."""
    if id(node) in known:
        return known[id(node)]
    if any(node is outer for outer in above):
        raise UserError(f"{where}: an alias stands within what it names")
    if len(above) > DEEPEST:
        raise UserError(f"{where}: lists and mappings may be {DEEPEST} levels deep")
    _check(node, where)
    if isinstance(node, yaml.ScalarNode):
        return 1
    parts = [part for item in node.value for part in (item if isinstance(item, tuple) else (item,))]
    above.append(node)
    known[id(node)] = 1 + sum(_count(part, known, above, where) for part in parts)
    above.pop()
    if known[id(node)] > MOST_VALUES:
        raise UserError(f"{where}: more than {MOST_VALUES} values, aliases counted as what they stand for")
    return known[id(node)]


def _check(node: yaml.Node, where: str) -> None:
    """Checks one value by itself: its type, its digits, its keys."""
    line = f"{where}, line {node.start_mark.line + 1}"
    if node.tag not in _PLAIN:
        raise UserError(
            f"{line} is not valid YAML here: {node.tag.rpartition(':')[2]!r} is no type of a value; there are numbers, "
            "texts, true, false, null, lists and mappings"
        )
    if isinstance(node, yaml.ScalarNode) and "\0" in node.value:
        raise UserError(f"{line}: a text may not have the character of code 0")
    if isinstance(node, yaml.ScalarNode) and node.tag.endswith((":int", ":float")) and len(node.value) > MOST_DIGITS:
        raise UserError(f"{line}: a number may have {MOST_DIGITS} digits")
    if isinstance(node, yaml.MappingNode):
        seen = set[Any]()
        for key, _ in node.value:
            if _key(key) in seen:
                raise UserError(f"{line}: the key {key.value[:80]!r} stands twice")
            seen.add(_key(key))
