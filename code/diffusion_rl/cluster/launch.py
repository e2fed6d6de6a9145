"""Programs started on other machines, by Ray or by Slurm, behind the interface of `subprocess.Popen`."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from diffusion_rl.cluster.session import ClusterSettings, connect
from diffusion_rl.core.errors import UserError

PLACES = ("here", "ray", "slurm", "local")  # local: as slurm does, without Slurm
LOST = 137  # exit status of a program whose machine is gone
MINUTES = 3 * 24 * 60  # that a Slurm job may take
SLEEP = 0.2  # between two looks at a program that is waited for


class Process(Protocol):
    """What is needed of a running program."""

    def poll(self) -> int | None:
        """Returns its exit status; None while it runs."""

    def terminate(self) -> None:
        """Asks it to stop."""

    def kill(self) -> None:
        """Ends it at once."""

    def wait(self, timeout: float | None = None) -> int:
        """Waits for its end. Raises subprocess.TimeoutExpired."""


class Waiting:
    """Waits for programs that can only be looked at."""

    def wait(self: Process, timeout: float | None = None) -> int:
        until = None if timeout is None else time.monotonic() + timeout
        while (status := self.poll()) is None:
            if until is not None and time.monotonic() > until:
                raise subprocess.TimeoutExpired("", timeout or 0)
            time.sleep(SLEEP)
        return status


def launched(place: str, command: Sequence[str], log: Path) -> Process:
    """Starts a program at one of `PLACES` other than here; what it prints is appended to `log`, which all machines see.

    Ray: on the cluster of $RAY_ADDRESS, or on this machine. Slurm: $SBATCH_… say what a job is given.
    """
    if place == "ray":
        return RayProcess(command, log)
    return SlurmProcess(command, log, cluster=place)


class Program:
    """Runs a command on the machine of its Ray actor."""

    def start(self, command: Sequence[str], log: str, folder: str) -> None:
        """Starts it in a folder; what it prints goes into a file that all machines see."""
        with Path(log).open("ab") as output:
            self.process = subprocess.Popen(
                list(command), stdout=output, stderr=output, stdin=subprocess.DEVNULL, cwd=folder
            )

    def poll(self) -> int | None:
        """Returns its exit status; None while it runs."""
        return self.process.poll()

    def end(self, at_once: bool) -> None:
        """Asks it to stop, or ends it at once; nothing where it has ended."""
        self.process.kill() if at_once else self.process.terminate()


class RayProcess(Waiting):
    """A program on a core of the Ray cluster."""

    def __init__(self, command: Sequence[str], log: Path):
        log.touch()
        self._ray = connect(ClusterSettings(address=os.environ.get("RAY_ADDRESS", "local")))
        self._actor = self._ray.remote(Program).options(num_cpus=1, max_restarts=0).remote()
        self._actor.start.remote(list(command), str(log.absolute()), os.getcwd())
        self._status: int | None = None

    def poll(self) -> int | None:
        if self._status is None:
            try:
                self._status = self._ray.get(self._actor.poll.remote(), timeout=SLEEP)
            except self._ray.exceptions.GetTimeoutError:
                return None  # it waits for a machine
            except self._ray.exceptions.RayActorError:
                self._status = LOST
            if self._status is not None:
                self._ray.kill(self._actor)
        return self._status

    def terminate(self) -> None:
        self._actor.end.remote(False)

    def kill(self) -> None:
        if self._status is None:
            self._actor.end.remote(True)


class SlurmProcess(Waiting):
    """A program that submitit runs as a Slurm job, or in a process of its own where `cluster` is "local"."""

    def __init__(self, command: Sequence[str], log: Path, cluster: str = "slurm"):
        try:
            import submitit
        except ImportError as error:
            raise UserError(f"--on {cluster} needs submitit: pip install -e '.[submitit]'") from error
        log.touch()
        executor = submitit.AutoExecutor(folder=str(log.parent / ".submitit"), cluster=cluster)
        executor.update_parameters(name=log.stem, timeout_min=MINUTES)
        self._job = executor.submit(_run, list(command), str(log.absolute()), os.getcwd())

    def poll(self) -> int | None:
        if not self._job.done():
            return None
        error = self._job.exception()
        return self._job.result() if error is None else LOST

    def terminate(self) -> None:
        self._job.cancel()

    def kill(self) -> None:
        self._job.cancel()


def _run(command: Sequence[str], log: str, folder: str) -> int:
    with Path(log).open("ab") as output:
        return subprocess.run(list(command), stdout=output, stderr=output, cwd=folder).returncode
