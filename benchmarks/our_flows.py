"""Our side of the rows of flows.py. Run by benchmarks/run.py."""

from __future__ import annotations

import functools
import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "code"))
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import flows  # noqa: E402
from worker import Workload, serve  # noqa: E402

from diffusion_rl.core.noise import NoiseSource  # noqa: E402
from diffusion_rl.core.threads import configure_threads  # noqa: E402


@functools.cache
def policy(steps: int) -> Any:
    from diffusion_rl.methods.on_policy.reinflow import ReinFlow
    from diffusion_rl.networks.critics import CriticObs
    from diffusion_rl.networks.flow import FlowMLP

    sizes = {"horizon_steps": flows.HORIZON, "action_dim": flows.ACTION, "cond_dim": flows.OBSERVATION}
    networks = {"policy": FlowMLP(**sizes, **flows.VELOCITY), "critic": CriticObs(flows.OBSERVATION, **flows.CRITIC)}
    return ReinFlow(**networks, **flows.policy(steps))


def decision(name: str) -> Workload:
    """Noise drawn; chain and log-probabilities as arrays."""
    each = flows.DECISIONS[name]
    actor, state, rng = policy(each.steps).make_actor(), flows.observations(each.n_envs), NoiseSource(0)
    return lambda: actor.act(state, actor.draw(rng, each.n_envs), deterministic=False)


def minibatch() -> Workload:
    rate = {"first_cycle_steps": 100, "warmup_steps": 10, "min_lr": 2e-5}
    settings: dict[str, Any] = {"fast": True, "repeat_samples": True, "ent_coef": 0.03, "vf_coef": 0.5}
    for part, lr in (("actor", 4.5e-5), ("critic", 6.5e-4)):
        settings |= {f"{part}_lr": lr, f"{part}_lr_scheduler": rate, f"{part}_weight_decay": 0}
    trainer = policy(4).make_trainer(settings, flows.HORIZON)
    data = flows.rollout(4)
    trainer.load(*(data[name] for name in ("state", "chains", "returns", "values", "advantages", "old_log_prob")))
    rows = flows.minibatch()
    return lambda: trainer.minibatch(rows, True, 0)


def makers() -> dict[str, Any]:
    """By the names of the rows."""
    return {name: functools.partial(decision, name) for name in flows.DECISIONS} | {flows.MINIBATCH: minibatch}


if __name__ == "__main__":
    from ours import multiply

    configure_threads()

    serve(makers(), multiply, packages=["tensorflow"])
