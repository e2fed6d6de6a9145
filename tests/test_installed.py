"""The package as pip installs it, not editable: scripts of a checkout use the checkout."""

import os
import shutil
import subprocess
import sys

import pytest

from diffusion_rl.config.compose import REPOSITORY


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A copy of the sources, installed without its requirements into a folder, which is then on the import path."""
    checkout, target = tmp_path_factory.mktemp("content") / "checkout", tmp_path_factory.mktemp("site")
    ignored = shutil.ignore_patterns(".*", "figure", "parity_tests", "tests", "*.egg-info", "logs", "log", "benchmarks")
    shutil.copytree(REPOSITORY, checkout, ignore=ignored)
    quiet = ["-q", "--no-deps", "--no-build-isolation", "--disable-pip-version-check"]
    subprocess.run([sys.executable, "-m", "pip", "install", *quiet, "--target", target, checkout], check=True)
    return checkout, {**os.environ, "PYTHONPATH": str(target), "CUDA_VISIBLE_DEVICES": ""}


@pytest.mark.slow
@pytest.mark.parametrize(
    "command",
    [
        "pipelines/diffuserlite_d4rl_mujoco.py task=halfcheetah-medium-expert-v2 mode=training --help",
        "script/run.py --config-name=ft_ppo_diffusion_mlp --config-dir={}/cfg/gym/finetune/hopper-v2 --cfg job",
        "scripts/train.py --dataset halfcheetah-medium-expert-v2 --help",
    ],
)
def test_a_script_finds_the_files_of_its_checkout(installed, command, tmp_path):
    checkout, environment = installed
    script, *arguments = command.format(checkout).split()
    done = subprocess.run(
        [sys.executable, checkout / script, *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
