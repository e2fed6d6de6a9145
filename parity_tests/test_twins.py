"""The PyTorch twins are held to the recordings themselves, so that comparing with them means something."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from parity_tests.replay.build import EVALUATION, schedule_tables
from parity_tests.replay.compare import Comparison, gradients_rounding, own_rounding
from parity_tests.replay.files import GOLDENS, Golden, case_files

torch = pytest.importorskip("torch")

from parity_tests.reference import forward  # noqa: E402
from parity_tests.reference.diffusion import Policy, ddim_tables, ddpm_tables  # noqa: E402

POLICIES = {
    "model.diffusion.diffusion.DiffusionModel",
    "model.diffusion.diffusion_vpg.VPGDiffusion",
    "model.diffusion.diffusion_ppo.PPODiffusion",
    EVALUATION,
}
TWINS = POLICIES | set(forward.TWINS) | {"model.common.vit.VitEncoderConfig"}


def policy_outputs(golden: Golden, policy: Policy, arguments: dict[str, Any], draws: list[Any]) -> tuple[Any, ...]:
    """A method of a policy, by its name in the reference."""
    method, cond = golden.meta["method"], arguments.get("cond") or arguments.get("obs") or {}
    state = cond if "rgb" in cond else cond.get("state")
    noise = torch.stack(draws) if draws and all(d.shape == draws[0].shape for d in draws) else None
    base = arguments.get("use_base_policy", False)
    if method == "forward":
        evaluation = golden.meta["class"] == EVALUATION
        return policy.sample(state, noise, arguments.get("deterministic", False), base, evaluation)
    if method == "get_logprobs":
        return policy.chain_log_probs(state, arguments["chains"], base)
    if method == "get_logprobs_subsample":
        rows = (arguments["chains_prev"], arguments["chains_next"], arguments["denoising_inds"])
        return policy.step_log_probs(state, *rows, base)
    if method == "p_losses":
        return (policy.supervised_loss(arguments["x_start"], state, arguments["t"], draws[0]),)
    if method == "q_sample":
        return (policy.noisy(arguments["x_start"], arguments["t"], arguments["noise"]),)
    if method == "p_mean_var":
        t, index = arguments["t"], arguments.get("index")
        position = policy.steps - 1 - t if index is None else index
        mean, std = policy.moments(arguments["x"], position, state, "network", None)
        return mean, 2 * std.log()
    if "reward" in arguments:
        return policy.reinforce_loss(state, arguments["chains"], arguments["reward"])
    if golden.meta["class"].endswith("PPODiffusion"):
        del arguments["obs"]
        arguments.pop("use_bc_loss", None)
        return tuple(policy.ppo_loss(state, **arguments, bc_noise=noise).values())
    t, noise, *_ = draws
    if len(draws) > 2:
        state = state | {"draw": forward.playing(golden.draws[2:], policy.dtype)}
    return (policy.supervised_loss(arguments["x"], state, t, noise),)


def covered(path: Path) -> bool:
    golden = Golden.load(path)
    call = golden.kind == "case" and golden.meta["method"] not in ("__attrs__", "__target__")
    return call and set(golden.classes()) <= TWINS


CASES = [path for path in case_files(GOLDENS) if covered(path)]


@pytest.mark.parametrize("path", CASES, ids=[p.stem for p in CASES])
@pytest.mark.parametrize("precision", ["float32", "float64"])
def test_twin_reproduces_the_recording(path, precision):
    golden, suffix = Golden.load(path), {"float32": "", "float64": "64"}[precision]
    dtype = getattr(torch, precision)
    recorded, meta = golden.group("out" + suffix), golden.meta
    frozen = set(meta["non_trainable"])
    weights = {
        name: forward.tensors(value, dtype).requires_grad_(name not in frozen) for name, value in golden.weights.items()
    }
    arguments, draws = forward.tensors(golden.arguments, dtype), [forward.tensors(d, dtype) for _, d in golden.draws]
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        if meta["class"] in POLICIES:
            values = policy_outputs(golden, _policy(golden, weights), arguments, draws)
        else:
            values = forward.outputs(meta["spec"], weights, arguments, forward.playing(golden.draws, dtype))
    finally:
        torch.set_default_dtype(default)
    outputs = dict(zip(meta["returns"], values, strict=False))
    comparison = Comparison(golden.name + " (twin)", 3, precision)
    for name, value in recorded.items():
        if name in outputs:
            rounding = own_rounding(golden, "out/" + name)
            comparison.check(name, outputs[name].detach(), value, quantity="PyTorch twin", rounding=rounding)
    grads = golden.group("grad" + suffix)
    if grads:
        total = (
            sum(outputs[n].square().mean() for n in meta["returns"])
            if meta["loss"] == "mean_square"
            else sum(weight * outputs[n] for n, weight in meta["loss"].items())
        )
        computed = torch.autograd.grad(total, [weights[n] for n in grads], allow_unused=True)
        scale = max(float(np.abs(g).max()) for g in grads.values())
        rounding = gradients_rounding(golden, scale)
        for (name, value), ours in zip(grads.items(), computed, strict=True):
            options = {"rung": 4, "scale": scale, "rounding": rounding, "quantity": "PyTorch twin"}
            comparison.check("grad " + name, ours, value, **options)


def _policy(golden: Golden, weights: dict[str, Any]) -> Policy:
    """With the tables of the recording: torch's square roots are not the same on every machine."""
    kwargs = golden.meta["spec"]["kwargs"]
    key = f"K{kwargs['denoising_steps']}" + (f"_ddim{kwargs['ddim_steps']}" if kwargs.get("use_ddim") else "")
    tables = {k.split("/")[1]: v for k, v in schedule_tables(GOLDENS).items() if k.split("/")[0] == key}
    weights = weights | {"network." + n[6:]: w for n, w in weights.items() if n.startswith("actor.")}
    return Policy(golden.meta["spec"], weights, {k: torch.from_numpy(v) for k, v in tables.items()})


def test_twin_schedules():
    recorded = Golden.load(GOLDENS / "schedules_all.npz")
    comparison = Comparison("schedules_all (twin)", 1, "float32")
    for key in recorded.meta["keys"]:
        steps, _, ddim_steps = key[1:].partition("_ddim")
        tables = ddpm_tables(int(steps))
        if ddim_steps:
            tables |= ddim_tables(tables, int(ddim_steps))
        for name, value in recorded.group(f"out/{key}").items():
            comparison.check(f"{key}/{name}", tables[name], value, quantity="PyTorch twin")
