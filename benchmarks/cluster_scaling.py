"""How exact mode grows with actors, on simulators that sleep, and what that says of clusters.

    python benchmarks/cluster_scaling.py --measure          # one machine plays up to 500 actors; writes the constants
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
from pathlib import Path
from typing import Any

import numpy as np

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY / "code"))

from diffusion_rl.cluster.remote import RemoteVectorEnv  # noqa: E402
from diffusion_rl.cluster.session import ClusterSettings, connect  # noqa: E402
from diffusion_rl.cluster.shard import Actors  # noqa: E402
from diffusion_rl.cluster.simulators import Facts, Reply  # noqa: E402
from diffusion_rl.envs.interface import StepResult  # noqa: E402
from diffusion_rl.envs.make import plan_vector_env  # noqa: E402

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


def main() -> int:
    """Measures, or draws."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", action="store_true")
    parser.add_argument("--most", type=int, default=COUNTS[-1])
    options = parser.parse_args()
    if options.measure:
        rows = measure(tuple(n for n in COUNTS if n <= options.most))
        RESULTS.write_text(json.dumps({"step_seconds": SECONDS, "rows": rows}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
