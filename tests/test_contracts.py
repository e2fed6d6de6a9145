"""Every contract of `make lint` holds for the package, and fails for a copy in which it is broken."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tests import contracts

ROOT = Path(__file__).resolve().parents[1]
IDS = re.findall(r'^id = "(\w+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)  # of import-linter's contracts

# contract: (module of a copy, what is added to it, what the report names)
BROKEN = {
    "layers": ("core/ema.py", "import diffusion_rl.networks.mlp", "core.ema -> diffusion_rl.networks.mlp"),
    "methods": (
        "methods/diffuser/action_only.py",
        "def late():\n    import diffusion_rl.methods.diffuser_lite.files",
        "methods.diffuser.action_only -> diffusion_rl.methods.diffuser_lite.files",
    ),
    "circles": ("core/errors.py", "import diffusion_rl.core.files", ".errors"),
    "tensorflow": ("tasks/registry.py", "import tensorflow", "tasks.registry -> tensorflow"),
    "hydra": ("data/replay.py", "import difflib", "data.replay -> difflib"),
    "signals": ("methods/diffuser/planning.py", "import signal", "methods.diffuser.planning -> signal"),
}


def lint_imports(root: Path, *options: str) -> subprocess.CompletedProcess:
    """The report of import-linter about the package below `root`/code."""
    program = "import sys; from importlinter.cli import lint_imports_command as c; c(sys.argv[1:])"
    return subprocess.run(
        [sys.executable, "-c", program, "--no-cache", "--config", str(root / "pyproject.toml"), *options],
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root / "code"), "COLUMNS": "200"},
        capture_output=True,
        text=True,
    )


@pytest.fixture
def copy(tmp_path):
    """A copy of the package and of the configuration of its contracts."""
    ignored = shutil.ignore_patterns("__pycache__", "*.npz", "*.xml", "*.csv")
    shutil.copytree(contracts.PACKAGE, tmp_path / "code" / "diffusion_rl", ignore=ignored)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def test_all_contracts_about_imports_hold():
    report = lint_imports(ROOT)
    assert report.returncode == 0, report.stdout + report.stderr


def test_each_contract_about_imports_has_a_case_here():
    assert set(IDS) == set(BROKEN)


@pytest.mark.parametrize("contract", BROKEN)
def test_a_forbidden_import_is_reported(contract, copy):
    module, line, named = BROKEN[contract]
    path = copy / "code" / "diffusion_rl" / module
    path.write_text(f"{path.read_text()}\n\n{line}\n")
    report = lint_imports(copy, "--contract", contract)
    assert report.returncode == 1 and named in report.stdout, report.stdout + report.stderr


def test_a_folder_that_no_layer_names_is_reported(copy):
    (copy / "code" / "diffusion_rl" / "stray.py").write_text('"""A module at the root."""\n')
    report = lint_imports(copy, "--contract", "layers")
    assert report.returncode == 1 and "stray" in report.stdout, report.stdout + report.stderr


def test_a_known_import_that_is_gone_must_leave_the_list(copy):
    path = copy / "pyproject.toml"
    path.write_text(
        path.read_text().replace("ignore_imports = [", 'ignore_imports = ["diffusion_rl.core.ema -> yaml", ')
    )
    report = lint_imports(copy)
    assert report.returncode == 1 and "diffusion_rl.core.ema -> yaml" in report.stdout + report.stderr


def test_sizes_shapes_and_defaults_hold(capsys):
    assert contracts.main([]) == 0, capsys.readouterr().out


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("lines of a file", "x = 1\n" * 601),
        ("lines of a class", "class Long:\n" + "    x = 1\n" * 300),
        ("lines of a function", "class Short:\n    def long(self):\n" + "        x = 1\n" * 60),
        ("parameters", "def wide(a, b, c, d, e, f, g, h, i, j, k, l, *, m):\n    pass\n"),
    ],
)
def test_what_is_too_large_is_reported(kind, text, tmp_path):
    (tmp_path / "large.py").write_text(text)
    (wrong,) = contracts.too_large(tmp_path, {})
    assert wrong.startswith("large.py") and f"{contracts.LARGEST[kind] + 1} {kind}" in wrong


def test_a_known_size_may_only_shrink(tmp_path):
    key = "large.py wide", "parameters"
    (tmp_path / "large.py").write_text("def wide(a, b, c, d, e, f, g, h, i, j, k, l, m, n):\n    pass\n")
    assert contracts.too_large(tmp_path, {key: (14, "a reason")}) == []
    assert "at most 13" in contracts.too_large(tmp_path, {key: (13, "a reason")})[0]
    assert "write 14" in contracts.too_large(tmp_path, {key: (15, "a reason")})[0]
    (tmp_path / "large.py").write_text("")
    assert "take it off" in contracts.too_large(tmp_path, {key: (14, "a reason")})[0]


@pytest.mark.parametrize(
    ("docstring", "states"),
    [
        ("x [B,H,A] -> [B].", True),
        ("Rows [..., 2] of the table.", True),
        ("Scale [2].", True),
        ("The loss, a scalar.", True),
        ("Draws uniformly from [0, 1).", False),
        ("Numbers in [-1, 1].", False),
        ("The loss.", False),
        ("", False),
    ],
)
def test_which_docstrings_state_shapes(docstring, states):
    assert contracts.states_a_shape(docstring) is states


def test_functions_on_tensors_without_shapes_are_reported(tmp_path):
    (tmp_path / "networks.py").write_text(
        "def stated(x: Array) -> Array:\n    '''x [B] -> [B]'''\n"
        "def missing(x: tuple[np.ndarray, ...]) -> int:\n    '''How many.'''\n"
        "def _private(x: Array) -> Array:\n    pass\n"
        "def by_name(x: dict[str, np.ndarray]) -> int:\n    '''How many.'''\n"
        "def outer(n: int):\n    def inner(x: Array) -> Array:\n        pass\n"
        "class Layer:\n    def call(self, x: Array) -> Array:\n        pass\n"
    )
    share, missing = contracts.shapes_missing(tmp_path, 0.9)
    assert share == pytest.approx(1 / 3)
    assert [line.split(":")[1].split(" ")[1] for line in missing] == ["missing", "Layer.call"]
    assert contracts.shapes_missing(tmp_path, 0.3)[1] == []


def test_defaults_of_configurations_are_reported(tmp_path):
    (tmp_path / "config").mkdir()
    (tmp_path / "config" / "schema.py").write_text("cfg.get('seed', 42)\n")
    (tmp_path / "loop.py").write_text("cfg.get('a', 1)\nself.cfg['env'].get('b', 2)\ntrain.get('c')\nrow.get('d', 3)\n")
    lines = contracts.defaults(tmp_path)
    assert [line.split(":")[1] for line in lines] == ["1 cfg.get('a', 1)", "2 self.cfg['env'].get('b', 2)"]
