"""Trains on a Ray cluster of three nodes of this machine while actors and whole nodes are killed; compares.

    python benchmarks/cluster_faults.py --task hopper --output benchmarks/cluster_hopper

Nodes are Ray's own (`ray.cluster_utils.Cluster`): processes of this machine that know of each other by network only.
Writes <output>.json (what was killed when, and every iteration's time with and without) and prints whether the last
checkpoints are equal, tensor by tensor. Exit status 1: they are not.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from safetensors.numpy import load_file

REPOSITORY = Path(__file__).resolve().parent.parent
COMMON = ["wandb=null", "tensorboard=false", "train.save_model_freq=1000", "seed=0"]
TASKS = {
    "hopper": ["--config-name=ft_ppo_diffusion_mlp", "--config-dir=cfg/gym/finetune/hopper-v2"]
    + ["env.n_envs=12", "train.n_steps=150", "train.batch_size=5000", "train.val_freq=1000", "train.force_train=true"],
    "lift": ["--config-name=ft_ppo_diffusion_mlp", "--config-dir=cfg/robomimic/finetune/lift"]
    + ["env.n_envs=6", "train.n_steps=40", "train.batch_size=1000", "train.val_freq=1000", "train.force_train=true"],
}


def command(task: str, iterations: int, folder: Path, *more: str) -> list[str]:
    """Returns the command of a training."""
    program = [sys.executable, "script/run.py", *TASKS[task], *COMMON]
    return [*program, f"train.n_train_itr={iterations}", f"logdir={folder}", *more]


def rows(folder: Path) -> list[dict[str, Any]]:
    """Returns the metrics of a run so far."""
    file = folder / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []


def simulators() -> list[psutil.Process]:
    """Returns the processes of actors that simulate."""
    return [
        p for p in psutil.process_iter(["name", "cmdline"]) if "ray::Simulators" in " ".join(p.info["cmdline"] or [])
    ]


class Killer:
    """Kills actors and nodes of a cluster at random moments while a program runs.

    Moments are drawn in iterations, so that all of them come whatever the machine's speed: 4.7 is in the fifth one,
    when seven tenths of its usual time have passed.

    Args:
        iterations: of the program; the first and the last are spared.
        seconds: an iteration usually takes.
    """

    def __init__(
        self, cluster: Any, nodes: list[Any], actors: int, n_nodes: int, iterations: int, seconds: float, seed: int
    ):
        self.cluster, self.nodes, self.seconds = cluster, nodes, seconds
        self.random = random.Random(seed)
        self.plan = ["actor"] * actors + ["node"] * n_nodes
        self.random.shuffle(self.plan)
        self.moments = sorted(self.random.uniform(1, iterations - 1) for _ in self.plan)
        self.done: list[dict[str, Any]] = []

    def run(self, program: subprocess.Popen, folder: Path) -> int:
        """Kills all that is planned, unless the program ends before; returns its exit status."""
        began = {0: time.monotonic()}  # number of an iteration -> when
        for moment, what in zip(self.moments, self.plan, strict=True):
            number = int(moment)
            while True:
                now = time.monotonic()
                began.setdefault(len(rows(folder)), now)
                due = len(rows(folder)) > number or now >= began.get(number, now + 1) + self.seconds * (moment - number)
                if due and simulators():  # else it has not begun, or all are being replaced
                    break
                if program.poll() is not None:
                    return program.returncode
                time.sleep(0.1)
            getattr(self, what)()
            self.done.append({"what": what, "time": time.time()})
        return program.wait()

    def actor(self) -> None:
        """Kills a process."""
        try:
            os.kill(self.random.choice(simulators()).pid, signal.SIGKILL)
        except (ProcessLookupError, IndexError):
            self.actor()

    def node(self) -> None:
        """Kills a node with everything on it; another one joins."""
        node = self.nodes.pop(self.random.randrange(len(self.nodes)))
        self.cluster.remove_node(node, allow_graceful=False)
        self.nodes.append(self.cluster.add_node(num_cpus=1))


def main() -> int:
    """Runs both trainings and compares them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=TASKS, default="hopper")
    parser.add_argument("--iterations", type=int, default=20)
    parser.add_argument("--actors-killed", type=int, default=20)
    parser.add_argument("--nodes-killed", type=int, default=3)
    parser.add_argument("--actors", type=int, default=3)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--draw", type=Path, nargs="+", metavar="FILE", help="draw what was written before")
    options = parser.parse_args()
    if options.draw:
        draw(options.draw, REPOSITORY / "figure" / "cluster" / "faults.png")
        return 0
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    from ray.cluster_utils import Cluster

    work = Path(tempfile.mkdtemp())
    run = {"cwd": REPOSITORY, "check": True, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    print("without a cluster …", flush=True)
    subprocess.run(command(options.task, options.iterations, work / "alone"), **run)
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
    seconds = float(np.median([row["seconds"] for row in rows(work / "alone")]))
    counts = options.actors_killed, options.nodes_killed
    killer = Killer(cluster, nodes, *counts, options.iterations, seconds, seed=0)
    print(f"on three nodes, killing {options.actors_killed} actors and {options.nodes_killed} nodes …", flush=True)
    more = ["env.cluster=ray", f"env.actors={options.actors}", f"ray.address={cluster.address}"]
    with (work / "killed.log").open("w") as log:
        training = command(options.task, options.iterations, work / "killed", *more)
        status = killer.run(subprocess.Popen(training, cwd=REPOSITORY, stdout=log, stderr=log), work / "killed")
    cluster.shutdown()
    if status:
        print((work / "killed.log").read_text()[-3000:])
        return status
    return compare(options, work, killer.done)


def draw(files: list[Path], path: Path) -> None:
    """Draws iteration times with and without kills, of the files that `compare` wrote."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    sys.path.insert(0, str(REPOSITORY / "code"))
    from diffusion_rl.reports.style import COLOURS, STYLE

    with plt.rc_context(STYLE):
        figure, panels = plt.subplots(1, len(files), figsize=(4.5 * len(files), 3.2), squeeze=False)
        for panel, file in zip(panels[0], files, strict=True):
            data = json.loads(file.read_text())
            for name, label, colour in (("alone", "one machine", "0.5"), ("killed", "three nodes, killed", COLOURS[0])):
                rows = data[name][1:]  # the first one compiles
                panel.plot(
                    [row["itr"] for row in rows], [row["seconds"] for row in rows], "o-", color=colour, label=label
                )
            lost = [row for row in data["killed"][1:] if row["actors_lost"]]
            top = max(row["seconds"] for row in data["killed"][1:])
            for row in lost:
                panel.annotate(f"{row['actors_lost']}", (row["itr"], top * 1.06), ha="center", color=COLOURS[1])
            kills = data["kills"]
            nodes = sum(kill["what"] == "node" for kill in kills)
            panel.set(ylim=(0, top * 1.25), xlabel="iterations", ylabel="seconds of an iteration")
            same = "all weights equal" if not data["different_tensors"] else "WEIGHTS DIFFER"
            panel.set_title(f"{data['task']}: {len(kills) - nodes} actors and {nodes} nodes killed, {same}")
            panel.xaxis.set_major_locator(plt.MaxNLocator(integer=True))
            panel.legend()
        figure.text(0.01, 0.01, "above the lines: actors lost in an iteration", color=COLOURS[1], fontsize=8)
        figure.tight_layout(rect=(0, 0.03, 1, 1))
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, metadata={"Description": "python benchmarks/cluster_faults.py --draw FILE ..."})


def compare(options: argparse.Namespace, work: Path, kills: list[dict[str, Any]]) -> int:
    """Writes what happened; returns the exit status."""
    last = [sorted((work / name / "checkpoint").glob("*.safetensors"))[-1] for name in ("alone", "killed")]
    alone, killed = (load_file(path) for path in last)
    different = sorted(k for k in alone.keys() | killed.keys() if not np.array_equal(alone.get(k), killed.get(k)))
    histories = {name: rows(work / name) for name in ("alone", "killed")}
    lost = sum(row["actors_lost"] for row in histories["killed"])
    count = {what: sum(kill["what"] == what for kill in kills) for what in ("actor", "node")}
    print(f"{len(alone)} tensors, {len(different)} different {different[:5]}")
    print(
        f"killed {count['actor']} actors and {count['node']} nodes; {lost} actors lost, "
        f"{sum(row['calls_repeated'] for row in histories['killed'])} calls repeated, "
        f"{len(histories['killed'])} of {options.iterations} iterations"
    )
    if options.output:
        keep = ("itr", "seconds", "episode_return", "actors_lost", "calls_repeated")
        data = {name: [{k: row[k] for k in keep if k in row} for row in h] for name, h in histories.items()}
        facts = {"task": options.task, "actors": options.actors, "different_tensors": different, "tensors": len(alone)}
        options.output.with_suffix(".json").write_text(json.dumps(facts | {"kills": kills} | data, indent=1) + "\n")
    return int(bool(different))


if __name__ == "__main__":
    sys.exit(main())
