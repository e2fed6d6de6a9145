"""The rows of gpu.py in PyTorch, on its default device: the twins of parity_tests/reference, which need no checkout.

Shape letters: E environments, N samples of a rollout, B rows of a minibatch, H horizon, O observation, D transition.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import planners
import torch
import workloads as w
from parity_tests.reference import trajectories
from parity_tests.reference.diffusion import ddpm_tables
from twins import Twins, here
from worker import Workload

DECAY, RATE = 0.995, 1e-3  # of the averaged weights, of learning


def finished(call: Callable[[], Any]) -> Workload:
    """The same, over only when the GPU is."""

    def whole() -> None:
        call()
        if torch.get_default_device().type == "cuda":
            torch.cuda.synchronize()

    return whole


def makers(envs: int, samples: int, minibatch: int, task: str, guided: bool, folder: Path) -> list[Any]:
    """Sampling, a minibatch, pre-training and a plan; folder: where unet.npz and value.npz lie."""
    twins = Twins()
    return [
        lambda: finished(twins.sampling(envs)),
        lambda: finished(twins.minibatch(samples, minibatch)),
        lambda: finished(pretraining(Twins())),
        lambda: finished(plan(task, guided, folder)),
    ]


def pretraining(twins: Twins) -> Workload:
    """Ten steps: batches gathered, loss, AdamW, an average of the weights."""
    policy = twins.policy
    trained = {name: v.requires_grad_() for name, v in policy.weights.items() if name.startswith("network")}
    average = {name: v.detach().clone() for name, v in trained.items()}
    optimizer = torch.optim.AdamW(trained.values(), lr=RATE, weight_decay=1e-6)
    data = w.rollout()
    states, chunks = here(data.state), here(data.chains[:, 0])

    def call() -> None:
        for _ in range(w.PRETRAIN_STEPS):
            rows = torch.randint(0, len(states), (w.PRETRAIN_BATCH,))
            t, noise = torch.randint(0, w.DENOISING, (w.PRETRAIN_BATCH,)), torch.randn(chunks[rows].shape)
            optimizer.zero_grad()
            policy.supervised_loss(chunks[rows], states[rows], t, noise).backward()
            optimizer.step()
            with torch.no_grad():
                for name, value in trained.items():
                    average[name].lerp_(value, 1 - DECAY)

    return call


def plan(task: str, guided: bool, folder: Path) -> Workload:
    """A decision of Diffuser: 64 plans in 20 steps, the observation as an array in, plans as an array out."""
    case, tables = planners.CASES[task], ddpm_tables(planners.DENOISING)
    unet, value = ({k: here(v) for k, v in np.load(folder / f"{name}.npz").items()} for name in ("unet", "value"))
    shape, seen = (planners.SAMPLES, case.horizon, case.transition_dim), planners.numbers(1, case.observation_dim)
    facts = {"n_guide_steps": planners.GUIDE_STEPS if guided else 0, "t_stopgrad": case.t_stopgrad}

    def call() -> Any:
        known = {0: here(seen)}
        x = trajectories.put(torch.randn(shape), known, case.action_dim)
        for step in reversed(range(planners.DENOISING)):
            t = torch.full((planners.SAMPLES,), step)
            x, _ = trajectories.guided_step(
                *(unet, tables, lambda x, t: trajectories.value(value, x, t), x, known, t, torch.randn(shape)),
                *(case.action_dim,),
                scale=case.scale,
                scale_grad_by_std=True,
                **facts,
            )
            x = trajectories.put(x.detach(), known, case.action_dim)
        return x.cpu().numpy()

    return call
