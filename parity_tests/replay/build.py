"""From the reference's class paths and weights to our objects."""

from __future__ import annotations

import dataclasses
import importlib
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from diffusion_rl.config.targets import REFERENCE_TARGETS
from diffusion_rl.core.keras import floatx
from diffusion_rl.interop import torch_names
from parity_tests.replay.compare import Mismatch
from parity_tests.replay.files import GOLDENS, Golden
from parity_tests.replay.roots import Roots

# From the reference's classes and functions to ours: those that configurations name, and what recordings name besides.
OURS: dict[str, str] = REFERENCE_TARGETS | {
    "model.common.mlp.MLP": "diffusion_rl.networks.mlp.MLP",
    "model.flow.mlp_flow.ExploreNoiseNet": "diffusion_rl.networks.flow.NoiseRange",
    "model.common.mlp.ResidualMLP": "diffusion_rl.networks.mlp.ResidualMLP",
    "model.common.vit.VitEncoderConfig": "diffusion_rl.networks.vit.VitEncoderConfig",
    "model.common.modules.SpatialEmb": "diffusion_rl.networks.vision.SpatialEmb",
    "model.common.modules.RandomShiftsAug": "diffusion_rl.networks.vision.RandomShiftsAug",
    "model.diffusion.modules.SinusoidalPosEmb": "diffusion_rl.networks.layers.sinusoidal_embedding",
    "model.diffusion.sampling.cosine_beta_schedule": "diffusion_rl.diffusion.schedules.cosine_betas",
    "agent.dataset.sequence.StitchedSequenceQLearningDataset": "diffusion_rl.data.sequences.QLearningDataset",
    "agent.finetune.train_awr_diffusion_agent.td_values": "diffusion_rl.core.returns.td_lambda",
    "model.diffusion.diffusion_idql.expectile_loss": "diffusion_rl.methods.off_policy.idql.expectile_loss",
    "agent.pretrain.train_agent.EMA": "diffusion_rl.core.ema.ema_update",
    "util.scheduler.CosineAnnealingWarmupRestarts": "diffusion_rl.core.lr_schedules.CosineWarmupRestarts",
}

SINUSOIDAL = "model.diffusion.modules.SinusoidalPosEmb"
NOISE_NETWORK = "model.flow.mlp_flow.ExploreNoiseNet"
EVALUATION = "model.diffusion.diffusion_eval.DiffusionEval"


def locate(path: str) -> Any:
    """Our object for a class path of the reference."""
    module, name = OURS[path].rsplit(".", 1)
    return getattr(importlib.import_module(module), name)


def build(spec: Any) -> Any:
    """Build our object from a recorded specification, recursively. Checkpoint paths are dropped: weights are loaded."""
    if isinstance(spec, dict) and "class" in spec:
        kwargs = {k: build(v) for k, v in spec["kwargs"].items() if v != "@CKPT"}
        if spec["class"] == SINUSOIDAL:
            return _Sinusoidal(**kwargs)
        if spec["class"] == NOISE_NETWORK:
            return _noise_network(**kwargs)
        return locate(spec["class"])(**kwargs)
    if isinstance(spec, dict):
        return {k: build(v) for k, v in spec.items()}
    return [build(v) for v in spec] if isinstance(spec, list) else spec


def _noise_network(
    in_dim: int,
    out_dim: int,
    logprob_denoising_std_range: list[float],
    device: str,
    hidden_dims: list[int] | None = None,
    activation_type: str = "Tanh",
) -> Any:
    """ReinFlow's network of the noise, whose bounds are one argument there."""
    return locate(NOISE_NETWORK)(in_dim, out_dim, hidden_dims or [16], *logprob_denoising_std_range, activation_type)


class _Sinusoidal:
    """The reference's module form of a function of ours."""

    def __init__(self, dim: int):
        self.dim = dim

    def __call__(self, x: Any) -> Any:
        from diffusion_rl.core.keras import floatx

        return locate(SINUSOIDAL)(x, self.dim, floatx())


def build_case(golden: Golden, recorded_tables: bool = True, roots: Roots | None = None) -> Any:
    """Our object with the recorded weights and schedule tables; loading must use every tensor and find every one.

    Args:
        roots: the recorder's square roots; afterwards they know which of them are open.
    """
    spec = golden.meta.get("spec")
    if spec is None:
        return None
    model = build(spec)
    weights = golden.weights
    if weights:
        load(golden.name, model, weights)
    if hasattr(model, "schedule") and recorded_tables:
        inject_schedule(golden, model, roots or Roots())
    return model


def load(case: str, model: Any, weights: dict[str, np.ndarray]) -> None:
    """Strict loading, then the round trip: what we would write is bit for bit what was read."""
    ours = torch_names.state_dict(model)
    if not any(k.startswith("actor_ft.") for k in weights):
        # A pre-trained checkpoint evaluated as such has no fine-tuned network; ours has one that must stay unused:
        # NaN weights would show if it were not.
        ft = {k: np.full_like(v, np.nan) for k, v in ours.items() if k.startswith("actor_ft.")}
        if ft:
            weights = weights | ft
    try:
        torch_names.load_state_dict(model, weights, strict=True)
    except Exception as error:
        raise Mismatch(
            f"{case}: the reference's state_dict does not load: {error}\n"
            "What next: names and layouts are made in diffusion_rl/interop/torch_names.py."
        ) from error
    written = torch_names.state_dict(model)
    if written.keys() != weights.keys():
        raise Mismatch(
            f"{case}: state_dict names differ: only ours {sorted(written.keys() - weights.keys())[:5]}, "
            f"only the reference {sorted(weights.keys() - written.keys())[:5]}"
        )
    for name, value in weights.items():
        back = np.asarray(written[name])
        if back.shape != value.shape or not np.array_equal(back.astype(value.dtype), value, equal_nan=True):
            raise Mismatch(f"{case}: {name} does not survive loading and writing bit for bit")


@lru_cache
def schedule_tables(folder: Path) -> dict[str, np.ndarray]:
    """The reference's float32 schedule tensors recorded in a folder, "K20_ddim5/betas" -> array."""
    path = folder / "schedules_all.npz"
    return Golden.load(path).group("out") if path.exists() else {}


def recorded_schedule(golden: Golden, model: Any) -> dict[str, np.ndarray]:
    """The schedule tensors recorded for this case: in the file itself, its folder, or the shipped folder."""
    own = golden.subgroup("sched")
    key = f"K{model.denoising_steps}" + (f"_ddim{model.ddim_steps}" if getattr(model, "use_ddim", False) else "")
    for folder in (golden.path.parent, GOLDENS):
        found = {k[len(key) + 1 :]: v for k, v in schedule_tables(folder).items() if k.startswith(key + "/")}
        if found:
            return found | own
    return own


def table(model: Any, name: str) -> np.ndarray:
    """A schedule table by the reference's attribute name."""
    return getattr(model.ddim_schedule if name.startswith("ddim_") else model.schedule, name)


def built_in_float64(tables: dict[str, np.ndarray], sqrt_alphas: np.ndarray) -> dict[str, np.ndarray]:
    """The tables as the reference computes them in a process whose default precision is float64.

    Whole agents were recorded so: betas and alphas_cumprod are float32 still, but a float64 one in front of
    alphas_cumprod_prev carries its precision on to the variance and the two coefficients of the mean.
    """
    one, f64 = np.float32(1), np.float64
    before, betas = tables["alphas_cumprod_prev"].astype(f64), tables["betas"].astype(f64)
    rest = (one - tables["alphas_cumprod"]).astype(f64)
    variance = betas * (1 - before) / rest
    return tables | {
        "alphas_cumprod_prev": before,
        "ddpm_var": variance,
        "ddpm_logvar_clipped": np.log(np.maximum(variance, 1e-20)),
        "ddpm_mu_coef1": betas * np.sqrt(before) / rest,
        "ddpm_mu_coef2": (1 - before) * sqrt_alphas.astype(f64) / rest,
    }


def roots_of_alphas(tables: dict[str, np.ndarray], alphas: np.ndarray, roots: Roots, used: bool) -> np.ndarray:
    """Square roots of alphas, which are not recorded; those of the schedule are a factor of the recorded second
    coefficient of the mean."""
    one = np.float32(1)

    def fits(root: np.ndarray) -> np.ndarray:
        before, rest = one - tables["alphas_cumprod_prev"], one - tables["alphas_cumprod"]
        return (alphas != tables["alphas"]) | (before * root / rest == tables["ddpm_mu_coef2"])

    return roots(alphas, fits if tables else None, used)


def inject_flow_roots(golden: Golden, model: Any, tables: dict[str, np.ndarray], roots: Roots) -> None:
    """Give the flow of an exact likelihood the recorder's square roots, of which only those of the schedule stand in
    its tables."""
    flow, eps = model.sde.tables(model.schedule, model.sde_min_beta), model.predict_epsilon
    alphas = np.float32(1) - flow.betas
    found = {"sqrt_alphas": roots_of_alphas(tables, alphas, roots, used=not eps)}
    if (flow.betas != model.schedule.betas).any():
        abar = np.cumprod(alphas, dtype=np.float64).astype(np.float32)
        found["sqrt_one_minus_alphas_cumprod"] = roots(np.float32(1) - abar, used=eps)
    for name, value in found.items():
        if not np.allclose(getattr(flow, name), value, rtol=5e-7, atol=2e-7):
            raise Mismatch(f"{golden.name}: the flow's table {name} is not the reference's")
    model.sde.tables = lambda *_: flow._replace(**found)


def inject_schedule(golden: Golden, model: Any, roots: Roots) -> None:
    """Give the model the recorded tables, checked against its own first.

    The reference's float32 square roots differ from ours in the last bit, and its float64 twins go on from exactly
    those tables; without them nothing could agree beyond 1e-7.
    """
    recorded = tables = recorded_schedule(golden, model)
    roots.read(recorded)
    if tables and golden.kind == "agent" and floatx() == "float64":
        used = not getattr(model, "use_ddim", False)
        tables = built_in_float64(tables, roots_of_alphas(tables, tables["alphas"], roots, used))
    for name, value in tables.items():
        ours = table(model, name)
        if ours.shape != value.shape or not np.allclose(ours, value, rtol=5e-7, atol=2e-7, equal_nan=True):
            raise Mismatch(f"{golden.name}: schedule table {name} is not the reference's")
    for attribute in ("schedule", "ddim_schedule"):
        own = getattr(model, attribute)
        if own is not None:
            fields = {f.name for f in dataclasses.fields(own)}
            setattr(model, attribute, dataclasses.replace(own, **{k: v for k, v in tables.items() if k in fields}))
    if hasattr(model, "sde"):
        inject_flow_roots(golden, model, recorded, roots)
