"""What the numbers were measured on."""

from __future__ import annotations

import datetime
import os
import platform
from pathlib import Path
from typing import Any


def describe() -> dict[str, Any]:
    """Processor, memory, system, date; Linux's /proc where there is one."""
    return {
        "processor": _field("/proc/cpuinfo", "model name") or platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "instructions": [f for f in ("avx2", "avx512f", "avx512_bf16", "amx_tile") if f in _flags()],
        "memory_gb": round(int((_field("/proc/meminfo", "MemTotal") or "0 kB").split()[0]) / 1e6, 1),
        "system": platform.system(),
        "date": datetime.date.today().isoformat(),
    }


def sentence(machine: dict[str, Any]) -> str:
    """The same in one line."""
    return (
        f"{machine['processor']}, {machine['cores']} cores ({', '.join(machine['instructions'])}), "
        f"{machine['memory_gb']} GB, {machine['system']}, {machine['date']}"
    )


def load() -> float:
    """Processes that wanted to run in the last minute; above about 0.5 before a start, timings will be off."""
    return os.getloadavg()[0]


def peak_memory(pid: int) -> float | None:
    """Largest resident size of a process so far, in GB."""
    text = _field(f"/proc/{pid}/status", "VmHWM")
    return int(text.split()[0]) / 1e6 if text else None


def available_memory() -> float | None:
    """Memory that a new process may take, in GB; None where the system does not say."""
    text = _field("/proc/meminfo", "MemAvailable")
    return int(text.split()[0]) / 1e6 if text else None


def _flags() -> set[str]:
    return set((_field("/proc/cpuinfo", "flags") or "").split())


def _field(path: str, name: str) -> str | None:
    try:
        lines = Path(path).read_text().splitlines()
    except OSError:
        return None
    return next((line.split(":", 1)[1].strip() for line in lines if line.split(":")[0].strip() == name), None)
