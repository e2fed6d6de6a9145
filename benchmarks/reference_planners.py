"""The PyTorch side of the rows of planners.py: a checkout of the authors' Diffuser. Run by benchmarks/run.py."""

from __future__ import annotations

import contextlib
import functools
import io
import sys
from pathlib import Path
from typing import Any

import planners as p
import torch
from worker import Workload, serve

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from parity_tests.surroundings import import_diffuser  # noqa: E402


def checkout(path: str) -> tuple[Any, Any, Any]:
    """(temporal networks, diffusions, sampling) of the authors' code."""
    temporal, diffusion, sampling = import_diffuser(path, "models.temporal", "models.diffusion", "sampling")
    return temporal, diffusion, sampling


def models(code: Any, case: p.Case) -> tuple[Any, Any]:
    temporal, diffusion, _ = code
    sizes = {"horizon": case.horizon, "observation_dim": case.observation_dim, "action_dim": case.action_dim}
    sizes |= {"n_timesteps": p.DENOISING, "predict_epsilon": False}
    shapes = {"horizon": case.horizon, "transition_dim": case.transition_dim, "cond_dim": case.observation_dim}
    shapes |= {"dim_mults": case.dim_mults}
    with contextlib.redirect_stdout(io.StringIO()):
        unet = temporal.TemporalUnet(**shapes, attention=case.attention)
        value = temporal.ValueFunction(**shapes)
    options = {"clip_denoised": False, "action_weight": 10}
    return (
        diffusion.GaussianDiffusion(unet, loss_type="l2", **options, **sizes),
        diffusion.ValueDiffusion(value, loss_type="value_l2", **sizes),
    )


def decision(code: Any, name: str, guided: bool) -> Workload:
    case, sampling = p.CASES[name], code[2]
    diffusion, value = models(code, case)
    observation = torch.from_numpy(p.numbers(case.observation_dim)).repeat(p.SAMPLES, 1)
    guidance: dict[str, Any] = {}
    if guided:
        guidance = {"guide": sampling.ValueGuide(value), "sample_fn": sampling.n_step_guided_p_sample}
        guidance |= {"n_guide_steps": p.GUIDE_STEPS, "scale": case.scale, "t_stopgrad": case.t_stopgrad}
        guidance |= {"scale_grad_by_std": True}

    def call() -> None:
        diffusion({0: observation}, verbose=False, **guidance).trajectories.numpy()

    return call


def training(code: Any, name: str, of_value: bool) -> Workload:
    case = p.CASES[name]
    model = models(code, case)[of_value]
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-4)

    def call() -> None:
        for _ in range(p.TRAINING_STEPS):
            for _ in range(p.MICRO_BATCHES):
                x = torch.randn(p.BATCH, case.horizon, case.transition_dim)
                target = [torch.randn(p.BATCH, 1)] if of_value else []
                loss, _ = model.loss(x, {0: x[:, 0, case.action_dim :]}, *target)
                (loss / p.MICRO_BATCHES).backward()
            optimizer.step()
            optimizer.zero_grad()

    return call


def makers(code: Any) -> dict[str, Any]:
    """By the names of the rows."""
    found: dict[str, Any] = {}
    for name in p.CASES:
        found |= {f"{name} {kind}": functools.partial(decision, code, name, kind == "guided") for kind in p.KINDS[:2]}
        found |= {f"{name} {kind}": functools.partial(training, code, name, kind != "training") for kind in p.KINDS[2:]}
    return found


if __name__ == "__main__":
    from reference import multiply

    serve(makers(checkout(sys.argv[1])), multiply, torch.set_num_threads, ["torch"])
