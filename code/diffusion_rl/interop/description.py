"""What the names and shapes of a checkpoint's tensors tell: which method they are of, and their networks' architecture.

The reference's files hold nothing but tensors. Here a "part" is what stands first in a tensor's name (`network`,
`critic`, `target_q`, …) and "weights" are the tensors of one part, named without it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

Weights = Mapping[str, np.ndarray]

# The parts of each model, beside `actor`, `eta` and `ensemble_params`, which tell nothing. Cal-QL has those of SAC.
_KINDS: dict[str, dict[frozenset[str], str]] = {
    "diffusion": {
        frozenset({"network"}): "diffusion_policy",
        frozenset({"network", "critic"}): "awr",
        frozenset({"network", "actor_ft", "critic"}): "dppo",
        frozenset({"network", "actor_ft"}): "dppo",
        frozenset({"actor_ft", "critic"}): "dppo",
        frozenset({"actor_ft"}): "dppo",
        frozenset({"network", "critic", "critic_target"}): "dql",
        frozenset({"network", "critic", "critic_target", "actor_target"}): "dipo",
        frozenset({"network", "critic_q", "target_q"}): "qsm",
        frozenset({"network", "critic_q", "target_q", "critic_v"}): "idql",
    },
    "gaussian": {
        frozenset({"network"}): "gaussian_policy",
        frozenset({"network", "critic"}): "gaussian_awr",
        frozenset({"network", "actor_ft", "critic"}): "gaussian_ppo",
        frozenset({"network", "critic", "target_critic"}): "sac",
        frozenset({"network", "critic_networks", "target_networks"}): "rlpd",
        frozenset({"network", "critic_networks", "target_networks", "target_actor", "bc_policy"}): "ibrl",
    },
    "gmm": {
        frozenset({"network"}): "gmm_policy",
        frozenset({"network", "actor_ft", "critic"}): "gmm_ppo",
    },
}
_DIFFUSION = ("DiffusionMLP", "VisionDiffusionMLP", "Unet1D", "VisionUnet1D")
_MIXTURE = ("GMMMLP", "GMMTransformer")


def parts_of(tensors: Weights, group: str = "model") -> dict[str, dict[str, np.ndarray]]:
    """Returns the weights of each part of a group, in their order; of an ensemble, part by part
    (`critic_networks.0`)."""
    parts: dict[str, dict[str, np.ndarray]] = {}
    for name, value in tensors.items():
        if match := re.match(rf"{group}\.(\w+(?:\.\d+)?)\.(.+)", name):
            parts.setdefault(match[1], {})[match[2]] = value
    return parts


def infer_kind(tensors: Weights) -> str:
    """Returns the method that these `model.*` (or, without them, `ema.*`) tensors are of (`_KINDS`), or "unknown"."""
    parts = parts_of(tensors) or parts_of(tensors, "ema")
    acting = next((parts[name] for name in ("network", "actor_ft", "actor") if name in parts), {})
    network = describe_network(acting).get("class", "")
    family = "diffusion" if network in _DIFFUSION else "gmm" if network in _MIXTURE else "gaussian"
    names = frozenset(name.partition(".")[0] for name in parts) - {"actor", "eta", "ensemble_params"}
    return _KINDS[family].get(names, "unknown") if network else "unknown"


def describe_networks(tensors: Weights) -> dict[str, dict[str, Any]]:
    """Returns the class and architecture of each part of the model, members of an ensemble counted; parts of no known
    class are left out."""
    networks: dict[str, dict[str, Any]] = {}
    for name, weights in (parts_of(tensors) or parts_of(tensors, "ema")).items():
        part, _, member = name.partition(".")
        if member and part in networks:
            networks[part]["members"] += 1
        elif facts := describe_network(weights):
            if member and facts["class"] == "CriticObs":
                facts["class"] = "CriticObsAct"  # ensembles are of action values, one Q in each
            networks[part] = {"members": 1, **facts} if member else facts
    return networks


def describe_network(weights: Weights) -> dict[str, Any]:
    """Returns "class", as this package calls it, and the dimensions that its shapes tell; {} for anything else."""
    try:
        return _facts(weights)
    except (LookupError, ValueError):  # the names of a network, but shapes that none has
        return {}


def _facts(weights: Weights) -> dict[str, Any]:
    parts = {name.partition(".")[0] for name in weights}
    sees, facts = "backbone" in parts, {}
    if "time_embedding" in parts:
        facts = {"class": "VisionDiffusionMLP" if sees else "DiffusionMLP", **_diffusion_mlp(weights, sees)}
    elif "time_mlp" in parts:
        facts = {"class": "VisionUnet1D" if sees else "Unet1D", **_unet(weights)}
    elif "transformer" in parts:
        facts = {"class": "GMMTransformer" if "modes_head" in parts else "GaussianTransformer"}
    elif "mlp_weights" in parts:
        modes = _mlp(weights, "mlp_weights").get("output_dim")
        facts = {"class": "GMMMLP", "num_modes": modes, **_mlp(weights, "mlp_mean")}
    elif "logvar_min" in parts:
        facts = {"class": "GaussianVisionMLP" if sees else "GaussianMLP"}
        facts |= _mlp(weights, "mlp_base" if "mlp_base" in parts else "mlp_mean")
    elif "Q1" in parts:
        kind = "ViTCritic" if sees else "CriticObsAct" if "Q2" in parts else "CriticObs"
        facts = {"class": kind, **_mlp(weights, "Q1")}
    elif "eta_logit" in parts:
        facts = {"class": "EtaFixed" if weights["eta_logit"].size == 1 else "EtaAction"}
    elif "mlp_res" in parts:
        mlp = _mlp(weights, "mlp_res")
        facts = {"class": "EtaState" if mlp.get("output_dim") == 1 else "EtaStateAction", **mlp}
    if facts and sees and "backbone.vit.pos_embed" in weights:
        facts |= dict(zip(("num_patch", "embed_dim"), weights["backbone.vit.pos_embed"].shape[-2:], strict=True))
    return facts


def _mlp(weights: Weights, name: str) -> dict[str, Any]:
    """Returns the dimensions of the MLP called `name`."""
    residual = f"{name}.layers.0.weight" in weights
    layer = r"layers\.\d+(\.l[12])?\.weight" if residual else r"moduleList\.\d+\.linear_1\.weight"
    pattern = re.compile(rf"{re.escape(name)}\.{layer}")
    layers = [value.shape for key, value in weights.items() if pattern.fullmatch(key) and value.ndim == 2]
    if not layers:
        return {}
    return {
        "input_dim": layers[0][1],
        "mlp_dims": [out for out, _ in layers[:-1]],
        "output_dim": layers[-1][0],
        "residual_style": residual,
        "use_layernorm": any(re.match(rf"{re.escape(name)}\..*\.norm_?1\.weight", key) for key in weights),
    }


def _diffusion_mlp(weights: Weights, sees: bool) -> dict[str, Any]:
    """Returns the dimensions under the constructor's names; cond_dim is To * O and output_dim H * A."""
    mlp = _mlp(weights, "mlp_mean")
    if not mlp or "time_embedding.1.weight" not in weights:
        return {}
    time_dim, width = weights["time_embedding.1.weight"].shape[-1], mlp.pop("input_dim")
    facts = {"time_dim": time_dim, **mlp}
    if not sees:
        cond = _mlp(weights, "cond_mlp")
        facts["cond_mlp_dims"] = [*cond["mlp_dims"], cond["output_dim"]] if cond else None
        facts["cond_dim"] = cond["input_dim"] if cond else width - time_dim - mlp["output_dim"]
    return facts


def _unet(weights: Weights) -> dict[str, Any]:
    """Returns the widths of the way down, and what the ends tell."""
    down = re.compile(r"down_modules\.\d+\.0\.blocks\.0\.block\.0\.weight")
    widths = [value.shape for key, value in weights.items() if down.fullmatch(key) and value.ndim == 3]
    if not widths or "time_mlp.1.weight" not in weights:
        return {}
    return {
        "diffusion_step_embed_dim": weights["time_mlp.1.weight"].shape[-1],
        "action_dim": widths[0][1],
        "widths": [shape[0] for shape in widths],
        "kernel_size": widths[0][2],
    }
