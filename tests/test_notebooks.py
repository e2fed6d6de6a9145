"""The notebooks run from top to bottom, and what they show is committed with them and small.

`python -m tests.notebooks` runs the tutorials as they are and keeps what they show; here their commands are made short,
as those of the other pages (`data/page_commands.yaml`).
"""

import importlib.util
import os
import re
import sys

import pytest
from tests.notebooks import execute
from tests.pages import RULES, TUTORIALS, name_of, rule_of

from diffusion_rl.config.compose import REPOSITORY

nbformat = pytest.importorskip("nbformat")
pytest.importorskip("nbclient")
SESSIONS = [REPOSITORY / "scripts" / "diffuser-sample.ipynb", REPOSITORY / "test.ipynb"]
NOTEBOOKS = [*SESSIONS, *TUTORIALS]
LARGEST = 300_000  # bytes
LONGEST = 60  # lines that a cell shows
TORCH = importlib.util.find_spec("torch") is not None


def shown(notebook):
    return [output for cell in notebook.cells for output in cell.get("outputs", [])]


def pictures(notebook):
    """How many pictures each cell shows."""
    drawn = [["image/png" in output.get("data", {}) for output in cell.get("outputs", [])] for cell in notebook.cells]
    return [sum(cell) for cell in drawn]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name_of)
def test_a_notebook_is_committed_with_what_it_shows(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    run = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in run] == list(range(1, len(run) + 1)), f"python -m tests.notebooks {path}"
    assert shown(notebook) and not [output for output in shown(notebook) if output.output_type == "error"]
    assert all(output.get("text", "").count("\n") < LONGEST for output in shown(notebook))
    assert os.path.getsize(path) < LARGEST
    assert not any(place in path.read_text() for place in (str(REPOSITORY), sys.prefix, "/tmp/", "/home/", "/root/"))


@pytest.mark.parametrize("path", SESSIONS, ids=name_of)
def test_a_session_shows_pictures(path):
    assert any(pictures(nbformat.read(path, as_version=4)))


def shortening(command: str) -> str:
    return RULES[rule_of(command, REPOSITORY)].get("add", "")


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=name_of)
def test_a_notebook_runs(path, tmp_path):
    if "torch" in path.read_text() and path in TUTORIALS and not TORCH:
        pytest.skip("needs PyTorch")
    before = nbformat.read(path, as_version=4)
    after = execute(path, tmp_path, *([shortening] if path in TUTORIALS else []))
    assert pictures(after) == pictures(before)


def test_a_page_of_the_site_is_made_of_a_notebook():
    specification = importlib.util.spec_from_file_location("site_hooks", REPOSITORY / "docs" / "hooks.py")
    hooks = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(hooks)
    page = hooks.markdown_of(REPOSITORY / "docs" / "tutorials" / "own_environment.ipynb")
    assert page.startswith("# Your own environment\n\n<small>") and "download" in page.splitlines()[2]
    assert '~~~ python title="point.py"\n"""A point' in page and "~~~ console\nPYTHONPATH=" in page
    assert "~~~ { .text .output" in page and not re.search(r"^[!%]", page, re.MULTILINE)
