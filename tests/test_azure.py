"""Jobs on Azure: what would be started, and what the scripts tell azcopy and blobfuse2, which are stand-ins here."""

import os
import shlex
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
CONNECTION = "DefaultEndpointsProtocol=https;AccountName=acc;AccountKey=a/b+c==;EndpointSuffix=core.windows.net"


def run(*command: str, **environment: str) -> subprocess.CompletedProcess:
    clean = {"PATH": os.environ["PATH"], "PYTHON": sys.executable, **environment}
    return subprocess.run(command, env=clean, capture_output=True, text=True, timeout=60)


def test_a_job_for_every_combination():
    launch = str(REPOSITORY / "azure/launch.py")
    secret = {"AZURE_CLIENT_SECRET": "hush", "AZURE_STORAGE_CONNECTION": CONNECTION, "DOCKER_USERNAME": "someone"}
    done = run(sys.executable, launch, AZURE_DRY_RUN="1", **secret)
    assert done.returncode == 0 and "hush" not in done.stdout, done.stderr
    commands = [shlex.split(line) for line in done.stdout.splitlines()]
    assert [command[:3] for command in commands] == [["az", "container", "create"]] * 2
    assert "docker.io/someone/diffuser:latest" in commands[0] and "AZURE_STORAGE_ACCOUNT=acc" in commands[0]
    assert ["--horizon 128" in c[-1] for c in commands] == [True, False] and "--horizon 512" in commands[1][-1]
    done = run(sys.executable, launch)
    assert (
        done.returncode == 2 and done.stderr.startswith("error: set DOCKER_USERNAME") and "\n" not in done.stderr[:-1]
    )
    assert run(sys.executable, launch, "--horizon", "3").returncode == 2


@pytest.fixture
def checkout(tmp_path):
    """Returns a folder with azure/ and stand-ins that print what they are called with."""
    shutil.copytree(REPOSITORY / "azure", tmp_path / "azure")
    (tmp_path / "bin").mkdir()
    for name in ("azcopy", "blobfuse2"):
        (tmp_path / "bin" / name).write_text('#!/bin/sh\necho "$0 $* ($AZCOPY_AUTO_LOGIN_TYPE)"\n')
        (tmp_path / "bin" / name).chmod(0o755)
    return tmp_path


def test_sync(checkout):
    script, remote = str(checkout / "azure/sync.sh"), "https://acc.blob.core.windows.net/diffuser/logs"
    done = run(script, AZURE_STORAGE_CONNECTION_STRING=CONNECTION)
    assert done.stdout == f"bin/azcopy sync {remote} logs --recursive ()\n", done.stderr
    done = run(script, "up", AZURE_STORAGE_CONNECTION_STRING=CONNECTION, AZURE_CLIENT_ID="x")
    assert done.stdout == f"bin/azcopy sync logs {remote} --recursive (SPN)\n", done.stderr
    assert run(script).stderr.startswith("set AZURE_STORAGE_CONNECTION_STRING")
    (checkout / "bin/azcopy").unlink()
    assert "./azure/download.sh" in run(script, AZURE_STORAGE_CONNECTION_STRING=CONNECTION).stderr


def test_mount(checkout):
    environment = {"HOME": str(checkout), "PATH": f"{checkout / 'bin'}:{os.environ['PATH']}"}
    assert "make_fuse_config.sh" in run(str(checkout / "azure/mount.sh"), **environment).stderr
    assert run(str(checkout / "azure/make_fuse_config.sh")).returncode == 2
    made = run(str(checkout / "azure/make_fuse_config.sh"), AZURE_STORAGE_CONNECTION_STRING=CONNECTION)
    assert made.returncode == 0, made.stderr
    config = checkout / "azure/fuse.yaml"
    assert "account-key: a/b+c==\n" in config.read_text() and config.stat().st_mode & 0o77 == 0
    done = run(str(checkout / "azure/mount.sh"), **environment)
    assert f"mount {checkout}/azure_mount --config-file=fuse.yaml" in done.stdout, done.stderr


def test_download(checkout):
    (checkout / "azcopy_linux_amd64_10").mkdir()
    (checkout / "bin/azcopy").rename(checkout / "azcopy_linux_amd64_10/azcopy")
    with tarfile.open(checkout / "a.tar.gz", "w:gz") as archive:
        archive.add(checkout / "azcopy_linux_amd64_10", "azcopy_linux_amd64_10")
    done = run(str(checkout / "azure/download.sh"), AZCOPY_URL=f"file://{checkout}/a.tar.gz")
    assert done.returncode == 0 and os.access(checkout / "bin/azcopy", os.X_OK), done.stderr
    assert run(str(checkout / "azure/download.sh"), AZCOPY_URL=f"file://{checkout}/none").returncode != 0


def test_the_containers_name_files_that_ship():
    for line in (REPOSITORY / "Dockerfile").read_text().splitlines():
        if line.startswith("COPY"):
            assert all((REPOSITORY / name).exists() for name in line.split()[1:-1]), line
    files = (REPOSITORY / "Singularity.def").read_text().partition("%files")[2].partition("%post")[0].split()
    assert all((REPOSITORY / name).exists() for name in files[::2])
