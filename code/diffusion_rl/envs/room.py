"""Checks how many environments this machine has room for."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from pathlib import Path

from diffusion_rl.core.errors import UserError

#: Of one process, measured: memory that it shares with no other, and files that it keeps open in the program.
PROCESS_GB, PROCESS_FILES = 0.005, 3
SPARE_FILES = 32  # for what else the program opens
ROW_GB = 3e-6  # of one environment of a batch: its state and its random stream


def require_processes(count: int) -> None:
    """Raises UserError if `count` more processes, one for each environment, do not fit on this machine."""
    require_memory(count, PROCESS_GB)
    for what, most in _process_limits():
        if count > most:
            raise _too_many(count, f"a process for each, and {what} allows {most}:", most)
    allowed, needed = resource.getrlimit(resource.RLIMIT_NOFILE)[0], count * PROCESS_FILES + _open_files() + SPARE_FILES
    if allowed != resource.RLIM_INFINITY and needed > allowed:
        fitting = (allowed - _open_files() - SPARE_FILES) // PROCESS_FILES
        reason = f"they need about {needed} open files and {allowed} are allowed: run ulimit -n {needed} before, or"
        raise _too_many(count, reason, fitting)


def require_memory(count: int, each_gb: float, kind: str = "environment", free: float | None = None) -> None:
    """Raises UserError if `count` environments of `each_gb` do not fit into the memory.

    Args:
        kind: a name for one of them.
        free: GB of memory; None: what the system says.
    """
    free = _available_gb() if free is None else free
    if free is not None and count * each_gb > free:
        size = f"{each_gb:.1f} GB" if each_gb >= 0.1 else f"{each_gb * 1e6:,.0f} kB"
        reason = f"each {kind} takes about {size}, {count * each_gb:,.0f} GB in all, and {free:.1f} GB are free:"
        raise _too_many(count, reason, int(free / each_gb))


def _too_many(count: int, reason: str, most: int) -> UserError:
    return UserError(f"env.n_envs={count}: {reason} set env.n_envs={max(1, most)} or less")


def _available_gb() -> float | None:
    """Returns the free memory in GB; None where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    kilobytes = next((line.split()[1] for line in lines if line.startswith("MemAvailable:")), None)
    return int(kilobytes) / 2**20 if kilobytes else None


def _process_limits() -> Iterator[tuple[str, int]]:
    """Yields what limits the number of processes, and to how many."""
    most = resource.getrlimit(resource.RLIMIT_NPROC)[0]
    if most != resource.RLIM_INFINITY:
        yield "ulimit -u", most
    for path in ("/sys/fs/cgroup/pids.max", "/proc/sys/kernel/pid_max", "/proc/sys/kernel/threads-max"):
        try:
            yield path, int(Path(path).read_text())
        except (OSError, ValueError):  # not there, or "max"
            continue


def _open_files() -> int:
    try:
        return len(os.listdir("/proc/self/fd"))
    except OSError:
        return 0
