"""One measurement of scale.py as a process of its own, whose peak memory is then its own:

    python benchmarks/our_scale.py ROW SIZE [--data FILE.npz] [--seconds S]

Prints a line of JSON, see `Measurement`. Processor time is that of all threads together.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypedDict

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "code"))
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import machine  # noqa: E402
import numpy as np  # noqa: E402
import ours  # noqa: E402
import scale_rows as rows  # noqa: E402
from worker import Workload, measure  # noqa: E402

FEWEST, MOST = 3, 40  # calls that are measured


class Part(TypedDict):
    """What one workload costs: processor seconds, and GB of resident memory at the most so far."""

    build: float  # everything before the first call: data, networks
    first: float  # the first call, which compiles
    call: float  # the median of some calls
    peak_gb: float


class Measurement(TypedDict):
    """What one size costs."""

    start_gb: float  # resident once everything is imported
    parts: dict[str, Part]


Workloads = dict[str, Callable[[], Workload]]  # in the order in which they are measured


def environments(size: int, options: argparse.Namespace) -> Workloads:
    """So many environments: a chunk step of them, and a decision for them."""
    return {"step": lambda: ours.environments(size), "decision": lambda: ours.sampling(envs=size)}


def varied(overrides: Callable[[int], list[str]], size: int, options: argparse.Namespace) -> Workloads:
    """Another size of the policy: a decision for the default environments, an update with a fixed number of rows."""
    changed = overrides(size)
    return {
        "decision": lambda: ours.sampling(overrides=changed),
        "update": lambda: ours.minibatch(rows.MINIBATCH, rows.SAMPLES, changed),
    }


def data(size: int, options: argparse.Namespace) -> Workloads:
    """A file of so many rows: ten steps of pre-training."""
    return {"steps": lambda: ours.pretraining(f"train_dataset_path={options.data}")}


def replay(size: int, options: argparse.Namespace) -> Workloads:
    """A replay buffer of so many rows, filled: updates of the algorithm that the row's name begins with."""
    import our_algorithms

    name = options.row.partition(" ")[0]
    return {"updates": lambda: our_algorithms.updates(ours.config, name, size)}


def cameras(size: int, options: argparse.Namespace) -> Workloads:
    """A decision of a policy that sees so many cameras."""
    return {"decision": lambda: seeing(size)}


def seeing(count: int) -> Workload:
    """A decision from `count` pictures of each environment, the encoder shared by them."""
    from diffusion_rl.config.instantiate import instantiate
    from diffusion_rl.policies.acting import actor_for

    overrides = [f"shape_meta.obs.rgb.shape=[{3 * count},96,96]", "model.network_path=null"]
    overrides += [f"++model.{network}.num_img={count}" for network in ("actor", "critic")]
    cfg = ours.config("robomimic/finetune/lift/ft_ppo_diffusion_mlp_img", *overrides)
    actor, g = actor_for(instantiate(cfg["model"])), np.random.default_rng(0)
    state = g.standard_normal((rows.SEEING, cfg["cond_steps"], cfg["obs_dim"])).astype(np.float32)
    rgb = g.integers(0, 256, (rows.SEEING, cfg["img_cond_steps"], 3 * count, 96, 96), np.uint8)
    return lambda: actor.act(state, actor.draw(ours.noise(), rows.SEEING), deterministic=False, rgb=rgb)


VARIED: dict[str, Callable[[int], list[str]]] = {
    "denoising": lambda size: [f"denoising_steps={size}", f"ft_denoising_steps={rows.TUNED}"],
    "width": lambda size: [f"model.actor.mlp_dims=[{size},{size},{size}]"],
    "chunk": lambda size: [f"horizon_steps={size}", f"act_steps={size}"],
    "history": lambda size: [f"cond_steps={size}"],
}
MAKERS: dict[str, Callable[[int, argparse.Namespace], Workloads]] = {
    "environments": environments,
    **{name: functools.partial(varied, overrides) for name, overrides in VARIED.items()},
    "data": data,
    "idql replay": replay,
    "dipo replay": replay,
    "cameras": cameras,
}


def calls_for(workload: Workload, seconds: float) -> list[float]:
    """Processor seconds of as many calls as fit, and of a few at the least."""
    used: list[float] = []
    while len(used) < FEWEST or (len(used) < MOST and sum(used) < seconds):
        used += measure(workload, 1)["cpu_seconds"]
    return used


def measured(options: argparse.Namespace) -> Measurement:
    """Builds the workloads and calls them."""
    from diffusion_rl.config.instantiate import find_class
    from diffusion_rl.core.threads import configure_threads

    configure_threads(shared=options.row.endswith("replay"))  # as off-policy training has it
    for loop in ("on_policy.training.OnPolicyTraining", "pretraining.training.PreTraining"):
        find_class(f"diffusion_rl.methods.{loop}")
    start, parts = memory(), {}
    for name, make in MAKERS[options.row](options.size, options).items():
        if options.parts and name not in options.parts:
            continue
        began = time.process_time()
        workload = make()
        built = time.process_time()
        workload()
        first = time.process_time()
        call = statistics.median(calls_for(workload, options.seconds))
        parts[name] = Part(build=built - began, first=first - built, call=call, peak_gb=memory())
    return {"start_gb": start, "parts": parts}


def memory() -> float:
    """GB of resident memory at the most so far."""
    return machine.peak_memory(os.getpid()) or 0.0


def main() -> int:
    """Measures, and prints what was measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("row", choices=MAKERS, metavar="ROW", help=", ".join(MAKERS))
    parser.add_argument("size", type=int, metavar="SIZE")
    parser.add_argument("--parts", nargs="+", metavar="PART", help="of its workloads (default: all)")
    parser.add_argument("--data", metavar="FILE.npz", help="demonstrations, for the row data")
    parser.add_argument("--seconds", type=float, default=1.0, help="processor time of the measured calls")
    answer: Any = measured(parser.parse_args())
    print(json.dumps(answer))
    return 0


if __name__ == "__main__":
    sys.exit(main())
