"""SIGINT and SIGTERM, and the lock of a run's folder: one handler and one lock for every program."""

import os
import signal
import subprocess
import sys
import time

import pytest

from diffusion_rl.cli.status import exit_status
from diffusion_rl.config.compose import REPOSITORY
from diffusion_rl.core.errors import UserError
from diffusion_rl.training import signals
from diffusion_rl.training.locks import FolderLock, child_lock, locked


@pytest.fixture(autouse=True)
def handlers():
    """What is installed before is installed after."""
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    yield
    after = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    for number, handler in zip((signal.SIGINT, signal.SIGTERM), before, strict=True):
        signal.signal(number, handler)
    assert after == before


@pytest.mark.parametrize("second", [signal.SIGINT, signal.SIGTERM])
def test_signals_within_a_second_are_one_request(second):
    with signals.StopRequest() as request:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(second)
        assert request.name == "SIGTERM"


def test_a_later_one_stops_at_once(monkeypatch):
    monkeypatch.setattr(signals, "ONE_REQUEST_SECONDS", 0)
    with pytest.raises(KeyboardInterrupt, match="stopped by SIGINT"), signals.StopRequest():
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)


def test_the_second_of_two_does_not_interrupt_what_follows_the_loop():
    """timeout(1) sends its second signal when the loop has ended and its state is being reported."""
    with signals.interrupting():
        with signals.StopRequest() as request, request:
            signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        assert request.name == "SIGTERM"


def test_an_import_is_not_cut():
    reached = []
    with pytest.raises(KeyboardInterrupt, match="stopped by SIGTERM"), signals.interrupting(), signals.held():
        signal.raise_signal(signal.SIGTERM)
        reached.append(True)
    assert reached


def test_a_signal_at_any_time_is_one_line_and_130(capsys):
    assert exit_status(lambda: signal.raise_signal(signal.SIGTERM)) == 130
    assert capsys.readouterr().err == "stopped by SIGTERM\n"


def test_a_refused_file_or_memory_is_one_line_and_2(capsys, monkeypatch):
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
    assert exit_status(lambda: os.stat("/nowhere/x")) == 2
    assert capsys.readouterr().err == "error: /nowhere/x: No such file or directory\n"

    def much():
        raise MemoryError("Unable to allocate 1 TiB")

    assert exit_status(much) == 2
    assert capsys.readouterr().err == "error: not enough memory (Unable to allocate 1 TiB): choose smaller numbers\n"


def test_a_signal_while_a_command_is_imported(tmp_path):
    sent = (
        "import os, signal, sys\n"
        f"sys.path.insert(0, {str(REPOSITORY / 'code')!r})\n"
        "import importlib\n"
        "from diffusion_rl.cli import commands\n"
        "original = importlib.import_module\n"
        "def slow(name, *more):\n"
        "    os.kill(os.getpid(), signal.SIGTERM); os.kill(os.getpid(), signal.SIGTERM)\n"
        "    return original(name, *more)\n"
        "importlib.import_module = slow\n"
        "sys.exit(commands.run('launchers:main'))\n"
    )
    ended = subprocess.run([sys.executable, "-c", sent], capture_output=True, text=True, cwd=tmp_path)
    assert (ended.returncode, ended.stderr) == (130, "stopped by SIGTERM\n")


def test_a_child_ends_with_its_parent(tmp_path):
    code = (
        "import subprocess, sys, os\n"
        f"sys.path.insert(0, {str(REPOSITORY / 'code')!r})\n"
        "from diffusion_rl.training import signals\n"
        "child = subprocess.Popen(['sleep', '60'], preexec_fn=signals.end_with_parent())\n"
        "print(child.pid, flush=True); os.kill(os.getpid(), 9)\n"
    )
    child = int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout)
    until = time.monotonic() + 5
    while _lives(child) and time.monotonic() < until:
        time.sleep(0.02)
    assert not _lives(child)


def _lives(pid):
    """Whether a process runs; one that has ended and waits for its parent does not."""
    try:
        return open(f"/proc/{pid}/stat").read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


# ---------- locks ----------


def test_one_process_at_a_time(tmp_path):
    with locked(tmp_path / "a" / "run", "name another"):
        with pytest.raises(UserError, match="another process is writing to .*run: wait for it, stop it, or name anoth"):
            FolderLock(tmp_path / "a" / "run", "name another")
        (tmp_path / "a" / "run" / "file").touch()
    FolderLock(tmp_path / "a" / "run", "").close()


def test_a_run_that_failed_before_it_wrote_leaves_no_folder(tmp_path):
    for written in (False, True):
        with pytest.raises(ZeroDivisionError), locked(tmp_path / "a" / "run", ""):
            if written:
                (tmp_path / "a" / "run" / "file").touch()
            _ = 1 / 0
        assert (tmp_path / "a").exists() == written


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write to .*file/run: Not a directory; name another"):
        FolderLock(tmp_path / "file" / "run", "name another")


def test_a_lock_lives_as_long_as_the_child(tmp_path):
    lock = child_lock(tmp_path / "0.lock")
    with subprocess.Popen(["sleep", "60"], pass_fds=[lock.fileno()]) as child:
        lock.close()
        assert child_lock(tmp_path / "0.lock") is None
        os.kill(child.pid, signal.SIGKILL)
    child_lock(tmp_path / "0.lock").close()
