"""The wheel, installed where there is no checkout: commands, the demonstration and the README's Python.

They are slow; `pytest -m slow tests/test_installed.py` runs them.
"""

import os
import re
import shutil
import subprocess
import sys

import pytest

from diffusion_rl.config.compose import REPOSITORY

pytestmark = pytest.mark.slow
LARGEST = 40_000_000  # bytes of the wheel
LIBRARIES = [path for path in sys.path if path.endswith("site-packages")]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy of what is needed, so that the checkout is left as it is."""
    checkout, target = tmp_path_factory.mktemp("content") / "checkout", tmp_path_factory.mktemp("wheel")
    ignored = shutil.ignore_patterns(".*", "figure", "parity_tests", "tests", "*.egg-info", "logs", "log", "build")
    shutil.copytree(REPOSITORY, checkout, ignore=ignored)
    quiet = ["-q", "--no-deps", "--no-build-isolation", "--disable-pip-version-check"]
    subprocess.run([sys.executable, "-m", "pip", "wheel", *quiet, "-w", target, checkout], check=True)
    (file,) = target.iterdir()
    return file


@pytest.fixture(scope="module")
def python(wheel, tmp_path_factory):
    """The interpreter of an environment with the wheel, which sees the packages of this one after its own."""
    folder = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    distutils = "import _distutils_hack; _distutils_hack.add_shim()"  # as setuptools' own .pth does
    (packages / "others.pth").write_text("\n".join([*LIBRARIES, distutils]))
    install = ["-m", "pip", "install", "-q", "--no-deps", "--ignore-installed", "--disable-pip-version-check", wheel]
    subprocess.run([folder / "bin" / "python", *install], check=True)
    return folder / "bin" / "python"


@pytest.fixture(scope="module")
def run(python, tmp_path_factory):
    """Runs `python WORDS` with the environment's interpreter, in one empty folder after the other."""
    ours = ("PYTHONPATH", "DPPO_DATA_DIR", "DPPO_LOG_DIR", "HYDRA_FULL_ERROR")
    cache = {"XDG_CACHE_HOME": str(tmp_path_factory.mktemp("cache")), "CUDA_VISIBLE_DEVICES": "", "DPPO_OFFLINE": "1"}
    environment = {key: value for key, value in os.environ.items() if key not in ours} | cache

    def start(*words, folder, status=0):
        command = [python, "-m", "diffusion_rl", *words] if words[0] != "-c" else [python, *words]
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
        assert done.returncode == status, done.stdout + done.stderr
        return done.stdout if status == 0 else done.stderr

    return start


def test_it_is_small_and_says_what_it_is(wheel, run, tmp_path):
    assert wheel.stat().st_size < LARGEST
    code = (
        "import diffusion_rl as d, importlib.metadata as m; print(d.__file__, m.metadata('diffusion-rl').as_string())"
    )
    told = run("-c", code, folder=tmp_path)
    assert str(REPOSITORY) not in told and "Author: the diffusion-rl authors" in told and "Ren et al." in told
    assert "CITATION.cff" in told and "# diffusion-rl\n" in told


@pytest.mark.parametrize(
    ("command", "says"),
    [
        ("--help", "  run "),
        (
            "run --config-name=ft_ppo_diffusion_mlp --config-dir=cfg/gym/finetune/hopper-v2 --cfg job",
            "normalization_path: ",
        ),
        ("experiment -e exp_specs/dppo_hopper_seeds.yaml --dry-run", "shipped/script/run.py"),
        ("plan train --dataset hopper-medium-v2 --help", "usage: diffusion-rl plan train"),
        ("lite mujoco task=hopper-medium-v2 mode=training --help", "usage: diffusion-rl lite mujoco"),
    ],
)
def test_a_command_finds_what_ships(run, command, says, tmp_path):
    assert says in run(*command.split(), folder=tmp_path) and not list(tmp_path.iterdir())


def test_data_that_a_wheel_leaves_out_are_said_in_one_line(run, tmp_path):
    command = "run --config-name=pre_diffusion_mlp --config-dir=cfg/gym/pretrain/walker2d-medium-v2"
    (line,) = run(*command.split(), folder=tmp_path, status=2).splitlines()
    assert "DPPO_DATA_DIR" in line and "diffusion-rl data convert" in line and "python s" not in line


def test_the_demonstration_runs_in_an_empty_folder(run, tmp_path):
    told = run("demo", "--quick", folder=tmp_path)
    assert "after / before" in told and [path.name for path in tmp_path.iterdir()] == ["log"]
    assert "to evaluate    diffusion-rl run --config-name=eval_diffusion_mlp" in told
    assert "to draw        diffusion-rl figures learning_curve" in told


def test_the_readme_s_example_and_robomimic_s_subset(run, tmp_path):
    blocks = re.findall(r"```python\n(.*?)```", (REPOSITORY / "README.md").read_text(), re.DOTALL)
    example = next(block for block in blocks if "load_policy" in block)
    found = "\nfrom diffusion_rl.envs import robomimic\nassert (robomimic.SUBSET / 'robomimic').is_dir()"
    assert len(run("-c", example + found, folder=tmp_path).splitlines()) == 3


@pytest.mark.parametrize("script", ["script/run.py", "scripts/train.py", "pipelines/diffuserlite_d4rl_mujoco.py"])
def test_a_script_of_a_checkout_uses_the_checkout(python, script, tmp_path):
    """Whose help says `python script/…`."""
    done = subprocess.run([python, REPOSITORY / script, "--help"], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.startswith(f"usage: python {script}"), done.stderr
