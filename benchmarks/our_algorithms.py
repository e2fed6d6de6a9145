"""Our side of the rows of algorithms.py."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import algorithms as a
from worker import Workload

from diffusion_rl.config.instantiate import instantiate
from diffusion_rl.config.targets import REFERENCE_TARGETS
from diffusion_rl.core.noise import NoiseSource
from diffusion_rl.data.replay import ReplayBuffer, fields
from diffusion_rl.methods.off_policy.algorithm import Progress
from diffusion_rl.methods.off_policy.buffers import Buffers, Rows
from diffusion_rl.methods.off_policy.learner import Learner

WARMED_UP = 10**6  # an iteration in which nothing waits any more


def resolved(config: Callable[..., Any], name: str) -> Any:
    """The configuration of a case without its pre-trained policy."""
    return config(a.CASES[name].config, *a.CASES[name].overrides, "++model.network_path=null")


def described(config: Callable[..., Any], name: str) -> dict[str, Any]:
    """The same for the reference: plain values, its class paths."""
    from omegaconf import OmegaConf

    theirs = {ours: reference for reference, ours in reversed(REFERENCE_TARGETS.items())}

    def translated(node: Any) -> Any:
        if isinstance(node, dict):
            return {k: theirs[v] if k == "_target_" else translated(v) for k, v in node.items()}
        return [translated(each) for each in node] if isinstance(node, list) else node

    plain: Any = resolved(config, name)
    plain = OmegaConf.to_container(plain, resolve=True) if OmegaConf.is_config(plain) else plain
    shapes = ("act_steps", "horizon_steps", "cond_steps", "obs_dim", "action_dim")
    return {
        "model": translated(dict(plain["model"])) | {"device": "cpu"},
        "train": dict(plain["train"]),
        **{key: plain[key] for key in shapes},
    }


def updates(config: Callable[..., Any], name: str, capacity: int = a.ROWS) -> Workload:
    """The updates of a case; capacity: rows of the buffer, which is filled in as many pieces as iterations would."""
    cfg = resolved(config, name)
    train, noise = cfg["train"], NoiseSource(0)
    algorithm = instantiate(cfg["model"])
    kept = algorithm.experience(train)
    data = a.experience(cfg)
    shapes = (cfg["cond_steps"], cfg["obs_dim"]), (cfg["act_steps"], cfg["action_dim"])
    stores = []
    for names in (kept.fields, kept.offline_fields):
        stores.append(ReplayBuffer(capacity, fields(names, *shapes)) if names else None)
        for first in range(0, capacity if names else 0, a.ROWS):
            stores[-1].add(**{field: data[field][: capacity - first] for field in names})
            stores[-1].flush()
    buffers = Buffers(stores[0], stores[1])
    learner, rows = Learner(algorithm, train, buffers), Rows(buffers, noise, a.ENVS)
    every = a.ROWS if train.get("batch_size") else 1
    phases = [p for p in algorithm.phases(train, Progress(WARMED_UP, every, capacity, a.UPDATES)) if p.n > 0]
    most = max(p.n for p in phases)
    if a.CASES[name].updates > 1:
        phases = [p._replace(n=max(1, p.n * a.CASES[name].updates // most)) for p in phases]

    def call() -> None:
        for phase in phases:
            learner.run(phase, noise, rows, lambda n, losses: None)

    return call


def makers(config: Callable[..., Any]) -> dict[str, Any]:
    """By the names of the rows."""
    return {row: functools.partial(updates, config, row.partition(" ")[0]) for row in a.rows()}
