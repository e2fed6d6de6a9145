"""Launchers: what a dry run prints."""

import shlex

import pytest

from diffusion_rl.cli import launchers
from diffusion_rl.core.errors import UserError


def printed(capsys, *arguments):
    launchers.main([*arguments, "--dry_run", "True"])
    return [shlex.split(line) for line in capsys.readouterr().out.splitlines()]


def test_docker(capsys):
    (command,) = printed(capsys, "docker", "--dataset", "hopper-medium-v2")
    assert command[:5] == ["docker", "run", "--rm", "--gpus", "all"]
    assert command[-3:-1] == ["bash", "-c"]
    assert command[-1] == "cd /home/code && python scripts/train.py --dataset hopper-medium-v2"
    assert any(word.endswith("target=/root/.d4rl") for word in command)


def test_singularity(capsys):
    (command,) = printed(capsys, "singularity", "--job", "values", "--dataset", "hopper-medium-v2")
    assert command[:5] == ["singularity", "exec", "--nv", "--writable-tmpfs", "diffuser.sif"]
    assert command[5:7] == ["python", "scripts/train_values.py"]


def test_slurm_trains_on_every_data_set(capsys):
    commands = printed(capsys, "slurm")
    assert len(commands) == 9 and commands[0][1] == "--job-name=train-ho-medium-replay"


def test_slurm_plans_in_jobs_of_fifty(capsys):
    commands = printed(
        capsys, "slurm", "--job", "plan", "--dataset", "hopper-medium-v2", "--logbase", "logs/pretrained"
    )
    assert [command[1] for command in commands] == [
        f"--job-name=plan-ho-medium-{first}-{first + 49}" for first in (0, 50, 100)
    ]
    assert "seq 50 99 | xargs -P 2" in commands[1][-1] and "--suffix TRIAL" in commands[1][-1]


def test_azure_has_a_job_for_every_combination(capsys, monkeypatch):
    monkeypatch.setenv("DOCKER_USERNAME", "someone")
    commands = printed(capsys, "azure", "--dataset", "walker2d-medium-v2", "--horizon", "128,512", "--seed", "1,2")
    assert len(commands) == 4 and "docker.io/someone/diffuser:latest" in commands[0]
    assert commands[3][-1].startswith("bash -c 'python scripts/train.py --dataset walker2d-medium-v2")
    assert "--horizon 512 --seed 2; status=$?; ./azure/download.sh && ./azure/sync.sh up" in commands[3][-1]


def test_what_is_refused(monkeypatch):
    monkeypatch.delenv("DOCKER_USERNAME", raising=False)
    with pytest.raises(UserError, match="say where"):
        launchers.main(["moon"])
    with pytest.raises(UserError, match="DOCKER_USERNAME"):
        launchers.main(["azure", "--dataset", "hopper-medium-v2"])
    monkeypatch.setenv("DOCKER_USERNAME", "someone")
    monkeypatch.delenv("AZURE_STORAGE_ACCOUNT", raising=False)
    with pytest.raises(UserError, match="AZURE_STORAGE_ACCOUNT"):
        launchers.main(["azure", "--dataset", "hopper-medium-v2"])
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError, match="is not installed"):
        launchers.main(["docker"])
