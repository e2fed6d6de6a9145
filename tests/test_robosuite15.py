"""robosuite 1.5 as a second generation, in an environment of its own that sees the packages of this one.

They are slow, and download robosuite (157 MB): `pytest -m slow tests/test_robosuite15.py -s` prints what it measures.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from diffusion_rl.config.compose import REPOSITORY

pytest.importorskip("robosuite", reason='needs pip install -e ".[robomimic]"')
pytestmark = pytest.mark.slow
LIBRARIES = [path for path in sys.path if path.endswith("site-packages")]
EXPERTS = Path(__file__).parent / "data" / "robosuite_experts.py"
STATES = Path(__file__).parent / "data" / "robosuite_states.py"
EVALUATE = "script/run.py --config-name=eval_diffusion_mlp --config-dir=cfg/robomimic/eval/lift"


@pytest.fixture(scope="module")
def newer(tmp_path_factory):
    """The interpreter of an environment with robosuite 1.5."""
    folder = tmp_path_factory.mktemp("robosuite15")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    (packages / "others.pth").write_text("\n".join([*LIBRARIES, str(REPOSITORY / "code")]))
    install = ["install", "-q", "--no-deps", "--ignore-installed", "--disable-pip-version-check", "--target", packages]
    subprocess.run([sys.executable, "-m", "pip", *install, "robosuite==1.5.2"], check=True)
    return folder / "bin" / "python"


def run(python: Path | str, *words: str, status: int = 0) -> str:
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [python, *words],
        **{"cwd": REPOSITORY, "env": environment, "text": True},
        **{"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT},
    )
    assert done.returncode == status, done.stdout
    return done.stdout


def test_experts_of_all_tasks_succeed_and_seeds_repeat(newer):
    told = run(newer, str(EXPERTS), "1.5", "3")
    print(told)
    assert re.findall(r"^(\w+): 3 of 3$", told, re.MULTILINE) == ["lift", "can", "square", "transport"]


def test_the_same_state_is_observed_as_in_the_first_generation(newer, tmp_path):
    run(sys.executable, str(STATES), "1.4", str(tmp_path / "states.npz"))
    told = run(newer, str(STATES), "1.5", str(tmp_path / "states.npz"))
    print(told)
    distances = dict(re.findall(r"^(\w+) (\d\S+e\S+)$", told, re.MULTILINE))
    assert list(distances) == ["lift", "can", "square", "transport"]
    assert set(map(float, distances.values())) == {0.0}, told


def test_a_shipped_policy_acts_in_it(newer, tmp_path):
    """Trained on 1.4.1: it is given what it knows, and mostly succeeds."""
    short = ["env.n_envs=4", "n_steps=75", f"logdir={tmp_path}"]
    told = run(newer, *EVALUATE.split(), *short, "env.robosuite=1.5")
    print(told)
    assert float(re.search(r"success rate (\S+)", told)[1]) >= 0.5


def test_which_is_installed_is_never_passed_over(newer, tmp_path):
    short = ["env.n_envs=1", "n_steps=1", f"logdir={tmp_path}"]
    assert "robosuite 1.5.2 is installed, 1.4.1 is needed" in run(newer, *EVALUATE.split(), *short, status=2)
    told = run(sys.executable, *EVALUATE.split(), *short, "env.robosuite=1.5", status=2)
    assert "robosuite 1.4.1 is installed, >=1.5,<1.6 is needed" in told
