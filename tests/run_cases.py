"""Run every reproducer of a folder, a line each: python -m tests.run_cases FOLDER [NAME …].

A reproducer is a .sh or .py file that exits with 0 where this package behaves right; those named _… are helpers.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

from diffusion_rl.config.compose import REPOSITORY

LIMIT = 900  # seconds


def run_case(case: Path) -> tuple[int | str, float, str]:
    """Exit status (or "no end"), seconds and last line of one reproducer."""
    command = ["bash", str(case)] if case.suffix == ".sh" else [sys.executable, str(case)]
    environment = os.environ | {"PY": sys.executable, "PYTHONPATH": str(case.parent)}
    began = time.monotonic()
    try:
        done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=LIMIT)
        status, text = done.returncode, done.stdout + done.stderr
    except subprocess.TimeoutExpired:
        status, text = "no end", ""
    lines = text.strip().splitlines()
    return status, time.monotonic() - began, lines[-1][:150] if lines and status != 0 else ""


def main() -> int:
    folder, names = Path(sys.argv[1]), sys.argv[2:]
    cases = [path for path in sorted(folder.glob("[!_]*")) if path.suffix in (".sh", ".py")]
    wrong = 0
    for case in cases:
        if names and case.stem not in names:
            continue
        status, seconds, line = run_case(case.resolve())
        wrong += status != 0
        print(
            f"{'right' if status == 0 else f'WRONG ({status})':12} {case.stem:32} {seconds:5.0f} s  {line}", flush=True
        )
    print(f"{wrong} wrong")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
