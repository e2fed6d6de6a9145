"""The shape of the repository: import root, sizes, and that what the README names exists.

Directions of imports are contracts of import-linter: see `test_contracts`.
"""

import ast
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "code" / "diffusion_rl"

LARGEST_FILE = 600
LARGEST_SCRIPT = 60


def tracked(*patterns):
    """Files of the repository: what git knows or would add; any file where there is no git (an unpacked archive)."""
    command = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard", *patterns]
    listed = subprocess.run(command, capture_output=True, text=True)
    if listed.returncode:
        return sorted(path for pattern in patterns for path in ROOT.rglob(pattern) if ".venv" not in path.parts)
    return sorted(ROOT / name for name in set(listed.stdout.split("\0")) if name and (ROOT / name).is_file())


def modules():
    return sorted(PACKAGE.rglob("*.py"))


def test_code_is_a_source_root_and_no_package():
    assert not (ROOT / "code" / "__init__.py").exists(), "it would hide the standard library's module `code`"


@pytest.mark.parametrize("where", [ROOT, ROOT / "script"])
def test_import_code_is_the_standard_library(where):
    ended = subprocess.run(
        [sys.executable, "-c", "import code; print(code.InteractiveConsole.__module__, code.__file__)"],
        cwd=where,
        capture_output=True,
        text=True,
    )
    assert ended.stdout.startswith("code ") and str(ROOT / "code") not in ended.stdout, ended.stderr


def modules_imported(path, named):
    """Those of the modules `named` that a file imports, wherever the import stands."""
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            while name and name not in named:
                name = name.rpartition(".")[0]
            if name and named[name] != path:
                yield name


@pytest.mark.parametrize(("folder", "prefix"), [("benchmarks", ""), ("parity_tests", "parity_tests.")])
def test_no_circles(folder, prefix):
    """No module needs itself, by whatever way; imports within functions count."""
    files = sorted((ROOT / folder).rglob("*.py"))
    named = {
        prefix + ".".join(path.relative_to(ROOT / folder).with_suffix("").parts).removesuffix(".__init__"): path
        for path in files
    }
    needs = {name: set(modules_imported(path, named)) for name, path in named.items()}
    while needs:  # take away what needs nothing that is left
        free = {name for name, others in needs.items() if not others & needs.keys()}
        if not free:
            break
        needs = {name: others for name, others in needs.items() if name not in free}
    while needs:  # and what nothing that is left needs
        wanted = set().union(*needs.values())
        if needs.keys() <= wanted:
            break
        needs = {name: others for name, others in needs.items() if name in wanted}
    assert not needs, f"these import each other in circles: {', '.join(sorted(needs))}"


def test_only_core_keras_names_the_keras_package():
    named = [
        path for path in modules() if re.search(r"^\s*(import|from) (tf_)?keras\b", path.read_text(), re.MULTILINE)
    ]
    assert [str(path.relative_to(PACKAGE)) for path in named] == ["core/keras.py"]


def test_only_interop_knows_pytorch():
    named = [path for path in modules() if re.search(r"^\s*(import|from) torch\b", path.read_text(), re.MULTILINE)]
    elsewhere = "furniture_server.py"  # runs in the interpreter of a simulator that is made with PyTorch
    assert all("interop" in path.parts or path.name == elsewhere for path in named), named


def test_randomness_comes_from_core_noise_alone():
    """Seeding numpy for the benefit of other people's packages is no draw."""
    pattern = re.compile(r"\bnp\.random\.(?!seed\()|\btf\.random\.|^import random\b|^from random ", re.MULTILINE)
    inner = [path for path in modules() if path.parent.name not in ("envs",) and path.name != "noise.py"]
    assert not [str(path.relative_to(PACKAGE)) for path in inner if pattern.search(path.read_text())]


@pytest.mark.parametrize("path", tracked("*.py"), ids=lambda path: str(path.relative_to(ROOT)))
def test_no_file_is_too_large(path):
    is_script = path.relative_to(ROOT).parts[0] in ("script", "scripts", "plotting")
    most = LARGEST_SCRIPT if is_script else LARGEST_FILE
    assert len(path.read_text().splitlines()) <= most


def commands_of(*names):
    """Lines of the console blocks of Markdown files, continuation lines joined."""
    for name in names:
        for block in re.findall(r"```(?:console|sh|bash)\n(.*?)```", (ROOT / name).read_text(), re.DOTALL):
            yield from (line.strip() for line in block.replace("\\\n", " ").splitlines() if line.strip())


def test_what_the_readme_tells_to_run_exists():
    commands = list(commands_of("README.md", "figure/README.md", *map(str, PAGES)))
    assert {"make demo", "make test"} <= set(commands_of("README.md"))
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    missing = []
    for command in commands:
        words = [w for w in shlex.split(command, comments=True) if "=" not in w or w.startswith("--config")]
        if words and words[0] == "make":
            missing += [f"{command}: no target {word}" for word in words[1:] if word not in targets]
        if words and words[0] == "python" and words[1:] and words[1].endswith(".py"):
            missing += [] if (ROOT / words[1]).is_file() else [f"{command}: no file {words[1]}"]
        options = dict(word.removeprefix("--").split("=", 1) for word in words if word.startswith("--config-"))
        if len(options) == 2:
            for folder in options["config-dir"].split(","):  # a sweep may name several
                config = ROOT / folder / f"{options['config-name']}.yaml"
                there = config.is_file() or folder == "my_cfg"  # which the page writes; tests/test_pages.py runs it
                missing += [] if there else [f"{command}: no configuration {config.relative_to(ROOT)}"]
    assert not missing, "\n".join(missing)


PAGES = sorted([*(ROOT / "installation").glob("*.md"), *(ROOT / "docs").rglob("*.md")])


@pytest.mark.parametrize("path", tracked("*.md"), ids=lambda path: str(path.relative_to(ROOT)))
def test_links_between_the_documents_lead_somewhere(path):
    targets = re.findall(r"\]\((?!https?:|mailto:|#)([^)#\s]+)", path.read_text())
    assert not [target for target in targets if not (path.parent / target).exists()]


def test_makefile_shows_its_targets_in_help():
    shown = subprocess.run(["make", "-C", str(ROOT), "help"], capture_output=True, text=True).stdout
    for target in (
        "demo",
        "test",
        "coverage",
        "docs",
        "parity-report",
        "benchmark",
        "benchmark-scale",
        "lint",
        "clean",
    ):
        assert f"make {target} " in shown
