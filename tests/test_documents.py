"""Names that the documents give: files, scripts to source, and the table of the original's files."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

REPOSITORY = Path(__file__).resolve().parents[1]


def sourced(shell: str, folder: Path, **environment: str) -> dict[str, str]:
    command = f". {shlex.quote(str(REPOSITORY / 'script/set_path.sh'))}; env"
    clean = {"PATH": os.environ["PATH"], "HOME": str(folder), **environment}
    done = subprocess.run([shell, "-c", command], env=clean, cwd=folder, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    return dict(line.split("=", 1) for line in done.stdout.splitlines() if line.startswith("DPPO_"))


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_set_path_outside_of_a_terminal(shell, tmp_path):
    if shutil.which(shell) is None:
        pytest.skip(f"no {shell} here")
    defaults = {"DPPO_DATA_DIR": f"{REPOSITORY}/data", "DPPO_LOG_DIR": f"{REPOSITORY}/log", "DPPO_WANDB_ENTITY": ""}
    assert sourced(shell, tmp_path) == defaults
    mine = {"DPPO_DATA_DIR": "/my data", "DPPO_WANDB_ENTITY": "me"}
    assert sourced(shell, tmp_path, **mine) == defaults | mine


def test_set_path_asks_in_a_terminal(tmp_path):
    if shutil.which("script") is None:
        pytest.skip("no script(1) here, which makes a terminal")
    session = f"bash --norc --noprofile -i -c '. {REPOSITORY}/script/set_path.sh; env'"
    clean = {"PATH": os.environ["PATH"], "HOME": str(tmp_path)}
    answers = "~/my data\n\nme\n"
    done = subprocess.run(
        ["script", "-qec", session, "/dev/null"], input=answers, env=clean, capture_output=True, text=True, timeout=60
    )
    for line in (f"DPPO_DATA_DIR={tmp_path}/my data", f"DPPO_LOG_DIR={REPOSITORY}/log", "DPPO_WANDB_ENTITY=me"):
        assert line in done.stdout.splitlines(), done.stdout


def test_the_conda_environment_has_setups_versions():
    environment = yaml.safe_load((REPOSITORY / "environment.yml").read_text())
    setup = (REPOSITORY / "setup.py").read_text()
    assert environment["name"] == "diffuser"
    python, pip, packages = environment["dependencies"]
    low, high = re.search(r'python_requires=">=3\.(\d+),<3\.(\d+)"', setup).groups()
    assert int(low) <= int(python.removeprefix("python=3.")) < int(high) and pip == "pip"
    (line,) = packages["pip"]  # no versions of its own
    for extra in re.fullmatch(r"--editable \.\[(.+)\]", line).group(1).split(","):
        assert f'    "{extra}": ' in setup


def test_every_file_of_ours_in_the_table_exists():
    """A name without a folder stands beside the one before it."""
    rows = (REPOSITORY / "installation/from_pytorch.md").read_text().splitlines()
    places = (REPOSITORY, REPOSITORY / "code/diffusion_rl")
    checked = 0
    for row in (row for row in rows if row.startswith("| ") and "`" in row):
        folder: tuple[Path, ...] = ()
        for name in re.findall(r"`([\w./]+)`", row.split(" | ")[1]):
            found = [place / name for place in (*(() if "/" in name else folder), *places) if (place / name).exists()]
            assert found, f"{name} in: {row}"
            folder, checked = (found[0].parent,), checked + 1
    assert checked > 80


def test_every_configuration_of_the_paper_exists():
    names, text = set(), (REPOSITORY / "cfg/finetuning.md").read_text()
    for start, choices, end in re.findall(r"`((?:ft_)?ppo_|ft_)(?:{([\w,]+)})?(\w*)`", text):
        names |= {f"{start}{choice}{end}" for choice in choices.split(",")}
    known = {path.stem for path in REPOSITORY.glob("cfg/*/*/*/*.yaml")}
    assert len(names) > 15 and names <= known, names - known


def test_the_avoiding_task_is_shown(tmp_path):
    command = [sys.executable, str(REPOSITORY / "script/test_d3il_render.py")]
    clean = {name: value for name, value in os.environ.items() if name not in ("DISPLAY", "WAYLAND_DISPLAY")}
    done = subprocess.run(command, env=clean, capture_output=True, text=True, timeout=200)
    assert done.returncode == 2 and "display" in done.stderr and done.stderr.count("\n") == 1
