"""Steps of robomimic's tasks a processor second beside robomimic's own wrapper; simulation's share of an iteration.

    python benchmarks/simulation.py --robomimic-python PYTHON    # that has robomimic 0.3.0, robosuite and torch
    python benchmarks/simulation.py --share                      # the share, for lift and can with 8 environments

Prints Markdown tables; benchmarks/README.md explains the rows.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
import types
from pathlib import Path
from typing import Any

from worker import Side, Unavailable, Workload, serve

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
TASKS = ("lift", "can", "square", "transport")
STEPS, CALLS, TURNS = 50, 2, 5  # steps of a call, calls of a turn
EPISODE = 300  # steps


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--robomimic-python", metavar="PYTHON", help="interpreter that has robomimic itself")
    parser.add_argument("--share", action="store_true", help="simulation's share of an iteration instead")
    parser.add_argument("--serve", choices=("ours", "reference"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        make = our_env if options.serve == "ours" else their_env
        serve({task: lambda task=task: stepping(make(task)) for task in TASKS}, lambda m, k, n: lambda: None)
        return 0
    print("\n".join(shares() if options.share else compare(options.robomimic_python)))
    return 0


# ---------- one process of each side


def meta(task: str) -> dict[str, Any]:
    return json.loads((ROOT / "cfg" / "robomimic" / "env_meta" / f"{task}.json").read_text())


def our_env(task: str) -> Any:
    sys.path.insert(0, str(ROOT / "code"))
    from diffusion_rl.envs import robomimic

    return robomimic.make_simulator(meta(task), low_dim_keys=["object"], image_keys=[], render=False, seed=0)


def their_env(task: str) -> Any:
    try:
        import mujoco_py  # noqa: F401
    except Exception:  # robomimic asks it for the name of an exception only
        sys.modules["mujoco_py"] = types.ModuleType("mujoco_py")
    try:
        import robomimic.utils.env_utils as env_utils
        import robomimic.utils.obs_utils as obs_utils
    except ImportError as error:
        raise Unavailable(f"robomimic itself ({error})") from error
    obs_utils.initialize_obs_modality_mapping_from_dict({"low_dim": ["object"]})
    env = env_utils.create_env_from_metadata(meta(task), render=False, render_offscreen=False, use_image_obs=False)
    env.env.hard_reset = False
    return env


def stepping(env: Any) -> Workload:
    """Random actions, a new episode now and then."""
    import numpy as np

    rng, done = np.random.default_rng(0), 0
    np.random.seed(0)
    env.reset()

    def call() -> None:
        nonlocal done
        for _ in range(STEPS):
            if done and done % EPISODE == 0:
                env.reset()
            env.step(rng.uniform(-1, 1, env.action_dimension))
            done += 1

    return call


# ---------- the tables


def compare(python: str | None) -> list[str]:
    """Both sides in turn, in processor time: what a core makes."""
    script = Path(__file__).resolve()
    sides = {"ours": Side(sys.executable, script, ["--serve", "ours"])}
    if python:
        sides = {"reference": Side(python, script, ["--serve", "reference"])} | sides
    lines = [
        "| steps a processor second | robomimic's wrapper | this repository | ratio (range) |",
        "|---|---|---|---|",
    ]
    for task in TASKS:
        rates: dict[str, list[float]] = {name: [] for name in sides}
        for _ in range(TURNS):
            for name, side in sides.items():
                answer = side.ask(task, CALLS)
                if "cpu_seconds" not in answer:
                    raise SystemExit(f"{name}: not measured: {answer['unavailable']}")
                rates[name].append(STEPS * CALLS / sum(answer["cpu_seconds"]))
        cells = [f"{statistics.median(rates[name]):.0f}" if name in rates else "–" for name in ("reference", "ours")]
        ratios = [b / a for a, b in zip(rates.get("reference", []), rates["ours"], strict=False)]
        spread = f"**{statistics.median(ratios):.1f}x** ({min(ratios):.1f} to {max(ratios):.1f})" if ratios else "–"
        lines.append(f"| {task} | {cells[0]} | {cells[1]} | {spread} |")
    for side in sides.values():
        side.close()
    return lines


def shares() -> list[str]:
    """Of the seconds of an iteration of DPPO, those that the loop waits for its environments."""
    from ours import config

    from diffusion_rl.config.instantiate import find_class

    lines = ["| 8 environments, 150 chunk steps | iteration | of it simulation |", "|---|---|---|"]
    for task in ("lift", "can"):
        with tempfile.TemporaryDirectory() as folder:
            small = ["env.n_envs=8", "train.n_steps=150", "train.batch_size=1000", "train.n_train_itr=4"]
            small += ["train.actor_lr_scheduler.warmup_steps=0", "+train.force_train=true"]
            cfg = config(f"robomimic/finetune/{task}/ft_ppo_diffusion_mlp", *small)
            cfg["logdir"] = f"{folder}/run"
            loop = find_class(cfg._target_)(cfg)
            waited, step = [0.0], loop.venv.step

            def timed(actions: Any, step: Any = step, waited: list[float] = waited) -> Any:
                began = time.perf_counter()
                result = step(actions)
                waited[-1] += time.perf_counter() - began
                return result

            end = loop._end_iteration

            def ended(end: Any = end, waited: list[float] = waited) -> Any:
                waited.append(0.0)
                return end()

            loop.venv.step, loop._end_iteration = timed, ended
            whole, simulated = loop.run()[-1]["seconds"], waited[-2]  # of the last: the first compile
            lines.append(f"| {task} | {whole:.1f} s | {simulated / whole:.0%} |")
    return lines


if __name__ == "__main__":
    sys.exit(main())
