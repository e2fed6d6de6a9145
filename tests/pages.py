"""The pages of the documentation, Markdown or notebook, as blocks; what tests run of them.

A block with a title is a file (in a notebook a cell that begins with `%%writefile`), one whose language is `console`
has commands (a cell whose lines begin with `!`), one that is `python` is run.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import NamedTuple

import yaml
from tests.document_commands import Command

from diffusion_rl.config.compose import REPOSITORY

TUTORIALS = sorted((REPOSITORY / "docs" / "tutorials").glob("*.ipynb"))
PAGES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").rglob("*.md")), *TUTORIALS]
RULES = yaml.safe_load((Path(__file__).parent / "data" / "page_commands.yaml").read_text())


class Block(NamedTuple):
    """A code block of a page: language, title (a file's name, or nothing) and text."""

    language: str
    title: str
    text: str


def cells(page: Path, kind: str) -> list[str]:
    """The cells of a notebook: "markdown" or "code"."""
    found = json.loads(page.read_text())["cells"]
    return ["".join(cell["source"]) for cell in found if cell["cell_type"] == kind]


def text(page: Path) -> str:
    """What is written around the code of a page, and the code of a Markdown page."""
    return "\n\n".join(cells(page, "markdown")) if page.suffix == ".ipynb" else page.read_text()


def blocks(page: Path) -> list[Block]:
    if page.suffix == ".ipynb":
        return [_cell(source) for source in cells(page, "code")]
    found = re.findall(r'^```(\w+)(?: title="([^"]+)")?\n(.*?)^```', page.read_text(), re.MULTILINE | re.DOTALL)
    return [Block(*one) for one in found]


def _cell(source: str) -> Block:
    first, _, rest = source.partition("\n")
    if first.startswith("%%writefile "):
        name = first.split()[1]
        return Block({".py": "python"}.get(Path(name).suffix, "yaml"), name, rest + "\n")
    if first.startswith("!"):
        source = joined(source)
        assert all(line.startswith("!") for line in source.splitlines()), f"commands and Python in one cell: {source}"
        return Block("console", "", "".join(f"{line[1:]}\n" for line in source.splitlines()))
    return Block("python", "", source)


def joined(commands: str) -> str:
    """Commands a line each: a backslash continues one."""
    return re.sub(r" \\\n *", " ", commands)


def files(page: str) -> dict[str, str]:
    """The files of a tutorial by name."""
    return {block.title: block.text for block in blocks(REPOSITORY / "docs" / "tutorials" / page) if block.title}


def commands(block: Block, page: Path) -> list[Command]:
    """What a console block runs; nothing, if the block is another one."""
    if block.language != "console":
        return []
    lines = [line.partition("  #")[0].strip() for line in block.text.splitlines() if not line.startswith("#")]
    made = []
    for line in filter(None, lines):
        rule = RULES[rule_of(line, page)]
        made.append(Command(page.name, line, shorten=rule.get("add", ""), needs=rule.get("needs", "")))
    return made


def rule_of(line: str, page: Path) -> int:
    """The number of the first rule that is about a command."""
    found = next((i for i, rule in enumerate(RULES) if re.search(rule["match"], line)), None)
    assert found is not None, f"{page}: tests/data/page_commands.yaml says nothing of {line}"
    return found


def name_of(page: Path) -> str:
    return str(page.relative_to(REPOSITORY))
