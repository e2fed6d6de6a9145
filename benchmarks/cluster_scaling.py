"""How exact mode grows with actors, on simulators that sleep, and what that says of clusters.

    python benchmarks/cluster_scaling.py --measure          # one machine plays up to 500 actors; writes the constants
    python benchmarks/cluster_scaling.py --overhead         # exact mode beside the environments of one machine
    python benchmarks/cluster_scaling.py                    # table and figure of the model, from those constants

An actor sleeps for as long as a chunk step of its task simulates and answers with as many bytes; everything else is
what a run does: `RemoteVectorEnv`, Ray, a message to each actor and back in every chunk step. (500 processes do not fit
on a small machine: 25 sleeping actors share one.) Writes benchmarks/cluster_scaling.json and
figure/cluster/scaling.png.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY / "code"))

from diffusion_rl.cluster.remote import RemoteVectorEnv  # noqa: E402
from diffusion_rl.cluster.session import ClusterSettings, connect  # noqa: E402
from diffusion_rl.cluster.shard import Actors  # noqa: E402
from diffusion_rl.cluster.simulators import Facts, Reply  # noqa: E402
from diffusion_rl.config.compose import compose, prepare  # noqa: E402
from diffusion_rl.envs.interface import StepResult  # noqa: E402
from diffusion_rl.envs.make import make_vector_env, plan_vector_env  # noqa: E402
from diffusion_rl.reports.style import COLOURS, MARKERS, STYLE  # noqa: E402

FIGURE = REPOSITORY / "figure" / "cluster" / "scaling.png"
RESULTS = REPOSITORY / "benchmarks" / "cluster_scaling.json"
SHARED = 25  # sleeping actors of a process
SECONDS = 0.1  # of a chunk step: lift's 4 actions at 60 to 80 steps a second and core take 50 to 70 ms, can's 8 100 ms
COUNTS = (1, 2, 5, 10, 20, 50, 100, 200, 500)
WIDTH, ACTIONS = 19, (4, 7)  # lift's observation and chunk


class Sleeping:
    """Answers like `Simulators` of one environment, after a sleep."""

    def here(self) -> None:
        """Says that the process runs."""

    def build(self, plan: Any) -> Facts:
        """Builds nothing."""
        return Facts({"state": (WIDTH,)}, ACTIONS[1], False, "here", 0)

    def call(self, method: str, arguments: tuple, keep: bool) -> Reply:
        """Sleeps through a step."""
        if method == "reset":
            return Reply({"state": np.zeros((1, 1, WIDTH))})
        time.sleep(SECONDS)
        no, one = np.zeros(1, bool), np.zeros(1)
        return Reply(StepResult({"state": np.zeros((1, 1, WIDTH))}, one, no, no, {"executed_steps": np.ones(1, int)}))


class SleepingActors(Actors):
    """Gives out actors that share processes."""

    def __init__(self, ray: Any):
        super().__init__(ray)
        self._make = ray.remote(Sleeping)
        self._given, self._processes = 0, []

    def start(self, shares: bool | None = None) -> Any:
        if self._given % SHARED == 0:
            self._processes.append(self._make.options(num_cpus=0, max_concurrency=SHARED).remote())
        self._given += 1
        return self._processes[-1]

    def end(self, actor: Any) -> None:
        if actor in self._processes:
            self._processes.remove(actor)
            super().end(actor)


def measure(counts: tuple[int, ...], n_steps: int = 60) -> list[dict[str, float]]:
    """Returns seconds of a chunk step, and the driver's processor time in it, by the number of actors."""
    ray = connect(ClusterSettings())
    env = {"name": "hopper-medium-v2", "n_envs": 1, "wrappers": {}}
    results = []
    for n in counts:
        plan = plan_vector_env(env, obs_dim=WIDTH, action_dim=ACTIONS[1], act_steps=ACTIONS[0], seed=0, n_envs=n)
        venv = RemoteVectorEnv(plan, ClusterSettings(actors=n), SleepingActors(ray))
        venv.reset()
        actions, times = np.zeros((n, *ACTIONS)), []
        for _ in range(5):
            venv.step(actions)
        before = time.process_time()
        for _ in range(n_steps):
            began = time.perf_counter()
            venv.step(actions)
            times.append(time.perf_counter() - began)
        used = (time.process_time() - before) / n_steps
        venv.close()
        results.append({"actors": n, "seconds": float(np.median(times)), "driver_seconds": used})
        row = results[-1]
        print(
            f"{n:4d} actors: {1000 * row['seconds']:.1f} ms a step, efficiency {SECONDS / row['seconds']:.2f}, "
            f"driver {1000 * used:.2f} ms",
            flush=True,
        )
    return results


# ---------- one machine ----------


def overhead(task: str, n_envs: int, actors: tuple[int, ...], n_steps: int) -> list[dict[str, Any]]:
    """Returns milliseconds of a chunk step of a task's environments here and at actors, in turns, by their number."""
    composed = compose(f"{task}/ft_ppo_diffusion_mlp", [f"env.n_envs={n_envs}"])
    del composed.hydra
    cfg = prepare(composed)
    dims = {name: cfg[name] for name in ("obs_dim", "action_dim", "act_steps")}
    rng, results = np.random.default_rng(0), []
    chunks = rng.uniform(-1, 1, (n_steps, n_envs, dims["act_steps"], dims["action_dim"]))
    for n in actors:
        here = make_vector_env(cfg["env"], **dims, seed=0)
        there = RemoteVectorEnv(plan_vector_env(cfg["env"], **dims, seed=0), ClusterSettings(actors=n))
        times: dict[str, list[float]] = {"here": [], "there": []}
        for venv in (here, there):
            venv.reset()
        for chunk in chunks:
            for name, venv in (("here", here), ("there", there)):
                began = time.perf_counter()
                venv.step(chunk)
                times[name].append(1000 * (time.perf_counter() - began))
        ratio = float(np.sum(times["there"]) / np.sum(times["here"]))
        for venv in (here, there):
            venv.close()
        row = {name: float(np.mean(values)) for name, values in times.items()}
        results.append({"task": task, "environments": n_envs, "actors": n, **row, "ratio": ratio})
        print(
            f"{task}, {n_envs} environments at {n} actors: {row['there']:.1f} ms, here {row['here']:.1f} ms, "
            f"{ratio:.2f}",
            flush=True,
        )
    return results


# ---------- the model ----------

CORES = 32  # of a node
BANDWIDTH = 1e9 / 8  # bytes a second of the driver's network: a gigabit
NODES = (1, 3, 10, 30, 100, 300, 1000)


@dataclass(frozen=True)
class Task:
    """What one iteration of a task costs, measured on one core each.

    Attributes:
        environments, steps, actions: E, S and Ta of the configuration.
        step_seconds: of one environment step.
        decide_seconds: of one environment's decision.
        row_seconds: of one row of an epoch, and epochs * rows of a chunk step of one environment.
        bytes_each: an observation, chain and log-probabilities of a chunk step.
    """

    environments: int
    steps: int
    actions: int
    step_seconds: float
    decide_seconds: float
    row_seconds: float
    rows: int
    bytes_each: int


TASKS = {
    "hopper": Task(40, 500, 4, 62e-6, 1e-4, 6.4e-6, 50, 900),
    "lift": Task(50, 300, 4, 1 / 100, 1e-4, 6.4e-6, 100, 1400),
    "can": Task(50, 300, 4, 1 / 80, 1e-4, 6.4e-6, 100, 1500),
    "square": Task(50, 400, 4, 1 / 90, 1e-4, 6.4e-6, 100, 1500),
    "transport": Task(50, 400, 8, 1 / 58, 2e-4, 8e-6, 50, 4000),
}


def iteration(task: Task, nodes: int, message: float, wide: bool, replicas: int = 1) -> dict[str, float]:
    """Returns the seconds of an iteration with an environment on every core, and what they are made of.

    message: the driver's processor time for one actor in one step.
    """
    actors = nodes * CORES
    simulate = task.actions * task.step_seconds
    if wide:
        collect = task.steps * (simulate + task.decide_seconds) + actors * task.steps * task.bytes_each / BANDWIDTH
        driver = actors * (message + task.steps * task.bytes_each / BANDWIDTH)
    else:
        driver = task.steps * actors * (message + task.decide_seconds / 2)
        collect = task.steps * (simulate + actors * (message + task.decide_seconds / 2))
    update = actors * task.steps * task.rows * task.row_seconds / replicas
    return {"collect": collect, "driver": driver, "update": update, "total": collect + update}


def saturation(task: Task, message: float) -> float:
    """Returns the nodes at which the driver of exact mode is busy for as long as a chunk step simulates."""
    return task.actions * task.step_seconds / (message + task.decide_seconds / 2) / CORES


def per_message(rows: list[dict[str, float]]) -> float:
    """Fits the driver's processor time for one actor in one step."""
    n, used = (np.array([row[key] for row in rows]) for key in ("actors", "driver_seconds"))
    return float(np.polyfit(n, used, 1)[0])


def table(message: float) -> str:
    """Returns the model as a table of Markdown."""
    lines = ["| task | mode | " + " | ".join(f"{n} node{'s' * (n > 1)}" for n in NODES) + " | driver saturated at |"]
    lines.append("|---" * (len(NODES) + 3) + "|")
    for name, task in TASKS.items():
        for wide in (False, True):
            cells = []
            for nodes in NODES:
                parts = iteration(task, nodes, message, wide, replicas=nodes)
                steps = nodes * CORES * task.steps * task.actions
                cells.append(f"{steps / parts['total'] / 1000:.3g}")
            end = "" if wide else f"{saturation(task, message):.2g} nodes"
            lines.append(f"| {name} | {'wide' if wide else 'exact'} | {' | '.join(cells)} | {end} |")
    return "\n".join(lines)


def draw(results: dict[str, Any], path: Path) -> None:
    """Draws efficiency against actors, and environment steps a second against nodes."""
    message = per_message(results["rows"])
    with plt.rc_context(STYLE):
        figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4))
        actors = [row["actors"] for row in results["rows"]]
        left.plot(actors, [results["step_seconds"] / row["seconds"] for row in results["rows"]], "o-", label="measured")
        model = [results["step_seconds"] / (results["step_seconds"] + n * message) for n in actors]
        left.plot(actors, model, "--", color="0.4", label=f"{1e6 * message:.0f} µs of the driver for a message")
        left.set(xscale="log", ylim=(0, 1.05), xlabel="actors", ylabel="efficiency, 0.1 s a chunk step")
        for (name, task), colour, marker in zip(TASKS.items(), COLOURS, MARKERS, strict=False):
            for wide, line in ((False, "-"), (True, "--")):
                rates = []
                for nodes in NODES:
                    steps = nodes * CORES * task.steps * task.actions
                    rates.append(steps / iteration(task, nodes, message, wide, replicas=nodes)["total"])
                label = name if not wide else None
                right.plot(NODES, rates, line, marker=marker, color=colour, label=label)
        right.set(xscale="log", yscale="log", xlabel="nodes of 32 cores", ylabel="environment steps a second")
        left.legend()
        right.legend(title="exact; dashed: wide", loc="center left", bbox_to_anchor=(1.01, 0.5))
        figure.tight_layout()
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, metadata={"Description": "python benchmarks/cluster_scaling.py"})


def main() -> int:
    """Measures, or draws."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", action="store_true")
    parser.add_argument("--most", type=int, default=COUNTS[-1])
    parser.add_argument("--overhead", action="store_true", help="beside the environments of one machine")
    options = parser.parse_args()
    results: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    if options.overhead:
        lift = overhead("robomimic/finetune/lift", 4, (1, 2, 4), 40)
        results["overhead"] = [*lift, *overhead("gym/finetune/hopper-v2", 40, (1, 2, 4), 200)]
    if options.measure:
        results |= {"step_seconds": SECONDS, "rows": measure(tuple(n for n in COUNTS if n <= options.most))}
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    print(table(per_message(results["rows"])))
    draw(results, FIGURE)
    return 0


if __name__ == "__main__":
    sys.exit(main())
