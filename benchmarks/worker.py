"""One side of the comparison as a process of its own: it waits for requests and times what it is asked for.

Two processes rather than one, so that the thread pools of the two frameworks never meet; a waiting process costs
nothing. Requests and answers are lines of JSON on standard input and output.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from workloads import GEMM_REPEAT, GEMM_SHAPES, Workload

WARM_UP = 2


class Unavailable(Exception):
    """A workload cannot run on this side; the message says why."""


def measure(workload: Workload, calls: int) -> dict[str, list[float]]:
    """Wall and processor seconds of each call."""
    wall, cpu = [], []
    for _ in range(calls):
        began, used = time.perf_counter(), time.process_time()
        workload()
        wall.append(time.perf_counter() - began)
        cpu.append(time.process_time() - used)
    return {"seconds": wall, "cpu_seconds": cpu}


def serve(
    makers: Mapping[str, Callable[[], Workload]],
    multiply: Callable[[int, int, int], Workload],
    set_threads: Callable[[int], None] = lambda threads: None,
    packages: Sequence[str] = (),
) -> None:
    """Answer requests until standard input ends.

    Args:
        makers: by name, what builds a workload; built and warmed up at its first request.
        multiply: (m, k, n) -> one float32 product of that shape.
        set_threads: changes the number of threads, where the framework can.
        packages: whose versions are told when asked "about".
    """
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # whatever libraries print goes elsewhere
    ready: dict[str, Workload] = {}
    answer: dict[str, Any]
    for line in sys.stdin:
        request, answer = json.loads(line), {}
        try:
            if request.get("threads"):
                set_threads(request["threads"])
            name = request["workload"]
            if name == "about":
                answer = {"about": ", ".join(f"{p} {metadata.version(p)}" for p in packages)}
            elif name == "gemm":
                answer = {"gflops": _gemm_rate(multiply)}
            else:
                if name not in ready:
                    if name not in makers:
                        raise Unavailable("not measured on this side")
                    ready[name] = makers[name]()
                    measure(ready[name], WARM_UP)
                answer = measure(ready[name], request["calls"])
        except Unavailable as reason:
            answer = {"unavailable": str(reason)}
        except Exception as error:  # reported by the other end, which goes on with the other rows
            answer = {"unavailable": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")


def _gemm_rate(multiply: Callable[[int, int, int], Workload]) -> float:
    """The best rate over a few shapes, in 1e9 operations a second."""
    rates = []
    for m, k, n in GEMM_SHAPES:
        product = multiply(m, k, n)
        repeat = max(1, GEMM_REPEAT * 512**2 * 1000 // (m * k * n))

        def many(product: Workload = product, repeat: int = repeat) -> None:
            for _ in range(repeat):
                product()

        many()
        rates.append(2e-9 * m * k * n * repeat / min(measure(many, 5)["seconds"]))
    return max(rates)


class Side:
    """The caller's end of a worker."""

    def __init__(self, python: str, script: Path, arguments: Sequence[str] = (), log: Any = None):
        self.process = subprocess.Popen(
            [python, str(script), *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            cwd=script.parent,
        )

    def ask(self, workload: str, calls: int = 1, threads: int | None = None) -> dict[str, Any]:
        """Have `workload` called `calls` times; the answer holds "seconds", or "unavailable" with the reason."""
        assert self.process.stdin and self.process.stdout
        request = {"workload": workload, "calls": calls, "threads": threads}
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        return json.loads(line) if line else {"unavailable": f"the process ended ({self.process.poll()})"}

    def close(self) -> None:
        """Let the worker end."""
        if self.process.stdin:
            self.process.stdin.close()
        self.process.wait(timeout=60)


class Sides:
    """Workers that take the place of one: some workloads belong to the second."""

    def __init__(self, first: Side, second: Side, seconds: Sequence[str]):
        self.first, self.second, self.seconds = first, second, frozenset(seconds)

    def ask(self, workload: str, calls: int = 1, threads: int | None = None) -> dict[str, Any]:
        """As `Side.ask`."""
        return (self.second if workload in self.seconds else self.first).ask(workload, calls, threads)

    def close(self) -> None:
        """Let both end."""
        self.first.close()
        self.second.close()
