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
from typing import Any, NamedTuple

from machine import peak_memory
from workloads import CONFIG_FOLDER, CONFIG_NAME

ROOT = Path(__file__).resolve().parent.parent
POLL, PATIENCE = 0.02, 1800.0


class Agent(NamedTuple):
    """What trains, on both sides.

    Args:
        config: its name, in both repositories.
        program: what the reference's interpreter is given.
        variables: how its environment variables begin.
        done: in its log, once an iteration.
        more: further words of its command line.
    """

    config: str
    program: str
    variables: str
    done: re.Pattern[str]
    more: tuple[str, ...] = ()

    @property
    def words(self) -> list[str]:
        """What both command lines have."""
        return [f"--config-name={self.config}", f"--config-dir=cfg/{CONFIG_FOLDER}", "env.reset_at_iteration=True"]


DPPO = Agent(CONFIG_NAME, "script/run.py", "DPPO", re.compile(r"\d+: step +\d+ \| loss"))
REINFLOW = Agent(
    "ft_ppo_reflow_mlp",
    str(Path(__file__).with_name("reference_flow_run.py")),
    "REINFLOW",
    re.compile(r"itr \d+ \| Total Step"),
    ("sim_device=null",),
)


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


def reference_run(
    agent: Agent, upstream: Path, python: str, policy: Path, data: Path, folder: Path, iterations: int
) -> Run:
    """The authors' fine-tuning command, with their own environment processes."""
    command = [python, agent.program, *agent.words, "device=cpu", "wandb=null", "+train.force_train=True", *agent.more]
    command += [f"base_policy_path={policy}", f"normalization_path={data}/normalization.npz"]
    command += [f"train.n_train_itr={iterations}", f"logdir={folder}/reference"]
    env = os.environ | {"PYTHONPATH": ".", "PYTHONDONTWRITEBYTECODE": "1", "D4RL_SUPPRESS_IMPORT_ERROR": "1"}
    variables = {"DIR": str(upstream), "DATA_DIR": str(data), "LOG_DIR": str(folder), "WANDB_ENTITY": "none"}
    env |= {f"{agent.variables}_{name}": value for name, value in variables.items()}
    log = folder / "reference.log"
    return Run(command, upstream, env, log, lambda: len(agent.done.findall(log.read_text())))


def our_run(agent: Agent, policy: Path, folder: Path, iterations: int, precision: str = "float32") -> Run:
    """Our fine-tuning command."""
    command = [sys.executable, "script/run.py", *agent.words, "++train.force_train=True", f"base_policy_path={policy}"]
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
