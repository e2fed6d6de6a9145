"""The pages: their files are those of tests, their Python and their commands run, what is generated is up to date.

A code block with a title is a file; other Python runs in the order of the page, as do the commands of console blocks,
which `data/page_commands.yaml` makes short. Notebooks run in `test_notebooks.py`; here it is their Python before the
first command, which takes no time.
"""

from __future__ import annotations

import re
import runpy
import shutil
import tempfile
from pathlib import Path

import pytest
from tests import document_commands
from tests.pages import PAGES, RULES, TUTORIALS, blocks, commands, name_of, rule_of, text

from diffusion_rl.config.compose import REPOSITORY

LONGEST = 150  # lines of README.md


def with_commands(page: Path) -> bool:
    return any(not command.needs for block in blocks(page) for command in commands(block, page))


def with_python_first(page: Path) -> bool:
    found = [block.language for block in blocks(page) if not block.title]
    return found[:1] == ["python"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder like a checkout, where figures may be written."""
    document_commands.prepare(tmp_path)
    (tmp_path / "figure").unlink()
    shutil.copytree(REPOSITORY / "figure", tmp_path / "figure")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))  # a notebook makes a folder of its own
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
@pytest.mark.parametrize("page", [page for page in PAGES if page not in TUTORIALS and with_commands(page)], ids=name_of)
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
    lines = [(command.command, page) for page in PAGES for block in blocks(page) for command in commands(block, page)]
    first = [rule_of(*line) for line in lines]
    assert set(first) == set(range(len(RULES)))


def test_the_first_page_is_short():
    assert len((REPOSITORY / "README.md").read_text().splitlines()) <= LONGEST


def test_the_configuration_s_page_is_that_of_the_tables():
    written = runpy.run_path(str(REPOSITORY / "docs" / "write_configuration.py"))
    assert written["page"]() == written["PAGE"].read_text(), "run python docs/write_configuration.py"


def test_every_page_is_in_the_site():
    site = (REPOSITORY / "mkdocs.yml").read_text()
    nav = set(re.findall(r"([\w./-]+\.(?:md|ipynb))$", site.partition("\nnav:")[2], re.MULTILINE))
    assert {name_of(page) for page in PAGES} <= nav
    assert all((REPOSITORY / name).is_file() for name in nav)


def test_what_links_name_within_a_page_is_there():
    """The anchor of a link is the heading's words in small letters, as GitHub and the site write it."""
    wrong = []
    for page in PAGES:
        for link in re.findall(r"\]\((?!https?:)([^)\s]*#[^)\s]+)", text(page)):
            name, _, anchor = link.partition("#")
            target = page.parent / name if name else page
            if target.suffix in (".md", ".ipynb") and anchor not in anchors(target):
                wrong.append(f"{name_of(page)}: {link}")
    assert not wrong, "\n".join(wrong)


def anchors(page: Path) -> set[str]:
    prose = re.sub(r"^```.*?^```", "", text(page), flags=re.MULTILINE | re.DOTALL)
    words = [re.sub(r"[^\w\s-]", "", head).strip().lower() for head in re.findall(r"^#+ (.+)$", prose, re.MULTILINE)]
    return {re.sub(r"\s", "-", head) for head in words}
