"""Whole training iterations: both command lines as they are, each iteration of one followed by one of the other.

While one side runs, the other is stopped (SIGSTOP to the session started for it, its environment processes included),
so that an iteration has the machine to itself and slow drifts of the machine meet both sides alike.
"""

from __future__ import annotations

import os
import re
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from machine import peak_memory
from workloads import CONFIG_FOLDER, CONFIG_NAME

ROOT = Path(__file__).resolve().parent.parent
POLL, PATIENCE = 0.02, 1800.0
ITERATION_DONE = re.compile(r"\d+: step +\d+ \| loss")  # a line of the reference's log
COMMON = (f"--config-name={CONFIG_NAME}", f"--config-dir=cfg/{CONFIG_FOLDER}", "env.reset_at_iteration=True")


class Run:
    """A training run in a session of its own, stopped whenever it is not its turn.

    Args:
        command, cwd, env: of the process;  log: file for its output.
        finished: how many iterations it has completed, from what it has written.
    """

    def __init__(
        self, command: Sequence[str], cwd: Path, env: Mapping[str, str], log: Path, finished: Callable[[], int]
    ):
        self.finished, self.log, self.stopped = finished, log, False
        with log.open("w") as output:
            self.process = subprocess.Popen(
                command, cwd=cwd, env=env, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
            )

    def turn(self, iterations: int = 1) -> float:
        """Run until so many more iterations are complete, then stop; returns the seconds this took."""
        target, began = self.finished() + iterations, time.perf_counter()
        if self.stopped:
            os.killpg(self.process.pid, signal.SIGCONT)
        self.stopped = False
        while self.finished() < target:
            if self.process.poll() is not None or time.perf_counter() - began > PATIENCE:
                raise RuntimeError(f"no iteration was completed:\n{self.log.read_text()[-1500:]}")
            time.sleep(POLL)
        seconds = time.perf_counter() - began
        os.killpg(self.process.pid, signal.SIGSTOP)
        self.stopped = True
        return seconds

    def end(self) -> None:
        """End the run and what it started."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


def reference_run(upstream: Path, python: str, policy: Path, data: Path, folder: Path, iterations: int) -> Run:
    """The authors' fine-tuning command, with their own environment processes."""
    command = [python, "script/run.py", *COMMON, "device=cpu", "wandb=null", "+train.force_train=True"]
    command += [f"base_policy_path={policy}", f"normalization_path={data}/normalization.npz"]
    command += [f"train.n_train_itr={iterations}", f"logdir={folder}/reference"]
    env = os.environ | {"PYTHONPATH": ".", "PYTHONDONTWRITEBYTECODE": "1", "D4RL_SUPPRESS_IMPORT_ERROR": "1"}
    env |= {"DPPO_DATA_DIR": str(data), "DPPO_LOG_DIR": str(folder), "DPPO_WANDB_ENTITY": "none"}
    log = folder / "reference.log"
    return Run(command, upstream, env, log, lambda: len(ITERATION_DONE.findall(log.read_text())))


def our_run(policy: Path, folder: Path, iterations: int, precision: str = "float32") -> Run:
    """Our fine-tuning command."""
    command = [sys.executable, "script/run.py", *COMMON, "++train.force_train=True", f"base_policy_path={policy}"]
    command += [f"train.n_train_itr={iterations}", f"logdir={folder}/ours", f"++train.precision={precision}"]
    metrics = folder / "ours" / "metrics.jsonl"

    def finished() -> int:
        return metrics.read_bytes().count(b"\n") if metrics.exists() else 0

    return Run(command, ROOT, dict(os.environ), folder / "ours.log", finished)


def compare(starts: Mapping[str, Callable[[], Run]], turns: int, warm_up: int = 1) -> dict[str, Any]:
    """Seconds of `turns` iterations of each side in alternation, after `warm_up` of each.

    Args:
        starts: by side ("reference", "ours"), what starts its run.

    Raises RuntimeError with the end of its output if a run fails.
    """
    runs: dict[str, Run] = {}
    seconds: dict[str, list[float]] = {name: [] for name in starts}
    try:
        for name, start in starts.items():
            runs[name] = start()
            print(f"  iteration, {name}: {runs[name].turn(warm_up):.1f} s with start", file=sys.stderr, flush=True)
        for _ in range(turns):
            for name, run in runs.items():
                seconds[name].append(run.turn())
                print(f"  iteration, {name}: {seconds[name][-1]:.1f} s", file=sys.stderr, flush=True)
        memory = {name: peak_memory(run.process.pid) for name, run in runs.items()}
    finally:
        for run in runs.values():
            run.end()
    result: dict[str, Any] = {"seconds": seconds, "peak_memory_gb": memory}
    if "reference" in seconds:
        result["ratio"] = statistics.median(seconds["reference"]) / statistics.median(seconds["ours"])
    return result
