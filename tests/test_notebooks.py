"""The notebooks run from top to bottom, and what they show is committed with them and small."""

import os

import pytest

from diffusion_rl.config.compose import REPOSITORY

nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
NOTEBOOKS = ["scripts/diffuser-sample.ipynb", "test.ipynb"]
LARGEST = 300_000  # bytes


def executed(name):
    notebook = nbformat.read(REPOSITORY / name, as_version=4)
    folder = (REPOSITORY / name).parent
    nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(folder)}}).execute()
    return notebook


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_is_committed_with_what_it_shows(name):
    notebook = nbformat.read(REPOSITORY / name, as_version=4)
    nbformat.validate(notebook)
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert not [output for output in outputs if output.output_type == "error"]
    assert os.path.getsize(REPOSITORY / name) < LARGEST
    assert str(REPOSITORY) not in (REPOSITORY / name).read_text()


@pytest.mark.slow
@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_runs(name, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    outputs = [output for cell in executed(name).cells for output in cell.get("outputs", [])]
    assert any("image/png" in output.get("data", {}) for output in outputs)
