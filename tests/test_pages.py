"""The pages: their files are those of tests, their Python and their commands run, what is generated is up to date.

A code block with a title is a file; other Python runs in the order of the page, as do the commands of console blocks,
which `data/page_commands.yaml` makes short.
"""

from __future__ import annotations

import re
import runpy
import shutil
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml
from tests import document_commands
from tests.document_commands import Command

from diffusion_rl.config.compose import REPOSITORY

PAGES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").rglob("*.md"))]
RULES = yaml.safe_load((Path(__file__).parent / "data" / "page_commands.yaml").read_text())
LONGEST = 150  # lines of README.md


class Block(NamedTuple):
    """A code block of a page: language, title (a file's name, or nothing) and text."""

    language: str
    title: str
    text: str


def blocks(page: Path) -> list[Block]:
    found = re.findall(r'^```(\w+)(?: title="([^"]+)")?\n(.*?)^```', page.read_text(), re.MULTILINE | re.DOTALL)
    return [Block(*one) for one in found]


def files(page: str) -> dict[str, str]:
    """The files of a page below docs/tutorials by name."""
    return {block.title: block.text for block in blocks(REPOSITORY / "docs" / "tutorials" / page) if block.title}


def commands(block: Block, page: Path) -> list[Command]:
    """What a console block runs; nothing, if the block is another one."""
    if block.language != "console":
        return []
    lines = [line.partition("  #")[0].strip() for line in block.text.splitlines() if not line.startswith("#")]
    made = []
    for line in filter(None, lines):
        rule = next((rule for rule in RULES if re.search(rule["match"], line)), None)
        assert rule, f"{page}: tests/data/page_commands.yaml says nothing of {line}"
        made.append(Command(page.name, line, shorten=rule.get("add", ""), needs=rule.get("needs", "")))
    return made


def with_commands(page: Path) -> bool:
    return any(not command.needs for block in blocks(page) for command in commands(block, page))


def with_python_first(page: Path) -> bool:
    found = [block.language for block in blocks(page) if not block.title]
    return found[:1] == ["python"]


def name_of(page: Path) -> str:
    return str(page.relative_to(REPOSITORY))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder like a checkout, where figures may be written."""
    document_commands.prepare(tmp_path)
    (tmp_path / "figure").unlink()
    shutil.copytree(REPOSITORY / "figure", tmp_path / "figure")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def write(folder: Path, page: Path) -> None:
    for block in blocks(page):
        if block.title:
            path = folder / block.title
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(block.text)


SLOW = {"docs/api.md": pytest.mark.slow}  # it trains


@pytest.mark.parametrize(
    "page",
    [pytest.param(page, marks=SLOW.get(name_of(page), ())) for page in PAGES if with_python_first(page)],
    ids=name_of,
)
def test_python_that_needs_no_command_runs(page, folder):
    write(folder, page)
    names: dict = {}
    for block in blocks(page):
        if block.language == "console":
            break
        if block.language == "python" and not block.title:
            exec(compile(block.text, page.name, "exec"), names)


@pytest.mark.slow
@pytest.mark.parametrize("page", [*filter(with_commands, PAGES)], ids=name_of)
def test_a_page_runs_from_its_beginning_to_its_end(page, folder):
    write(folder, page)
    names: dict = {}
    for block in blocks(page):
        if block.language == "python" and not block.title:
            exec(compile(block.text, page.name, "exec"), names)
        for command in commands(block, page):
            _, result = command.run(folder)
            assert result == "ok" or command.needs, f"{command.command} {command.shorten}: {result}"


def test_every_rule_of_the_commands_is_used():
    lines = [command.command for page in PAGES for block in blocks(page) for command in commands(block, page)]
    first = [next(i for i, rule in enumerate(RULES) if re.search(rule["match"], line)) for line in lines]
    assert set(first) == set(range(len(RULES)))


def test_the_first_page_is_short():
    assert len((REPOSITORY / "README.md").read_text().splitlines()) <= LONGEST


def test_the_configuration_s_page_is_that_of_the_tables():
    written = runpy.run_path(str(REPOSITORY / "docs" / "write_configuration.py"))
    assert written["page"]() == written["PAGE"].read_text(), "run python docs/write_configuration.py"


def test_every_page_is_in_the_site():
    text = (REPOSITORY / "mkdocs.yml").read_text()
    nav = set(re.findall(r"([\w./]+\.md)$", text.partition("\nnav:")[2], re.MULTILINE))
    assert {name_of(page) for page in PAGES} <= nav
    assert all((REPOSITORY / name).is_file() for name in nav)


def test_what_links_name_within_a_page_is_there():
    """The anchor of a link is the heading's words in small letters, as GitHub and the site write it."""
    wrong = []
    for page in PAGES:
        for link in re.findall(r"\]\((?!https?:)([^)\s]*#[^)\s]+)", page.read_text()):
            name, _, anchor = link.partition("#")
            target = page.parent / name if name else page
            if target.suffix == ".md" and anchor not in anchors(target):
                wrong.append(f"{name_of(page)}: {link}")
    assert not wrong, "\n".join(wrong)


def anchors(page: Path) -> set[str]:
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    words = [re.sub(r"[^\w\s-]", "", head).strip().lower() for head in re.findall(r"^#+ (.+)$", text, re.MULTILINE)]
    return {re.sub(r"\s", "-", head) for head in words}
