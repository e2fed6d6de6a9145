"""Weights of policies from checkpoint files, ours or the reference's."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np

from diffusion_rl.core.errors import UserError
from diffusion_rl.data.assets import resolve
from diffusion_rl.interop.torch_names import load_state_dict
from diffusion_rl.loops.run_state import Checkpoint, load_checkpoint
from diffusion_rl.policies.diffusion import DiffusionPolicy, FineTunedDiffusionPolicy

log = logging.getLogger(__name__)


def open_checkpoint(path: str | Path | None, what: str = "base_policy_path") -> Checkpoint:
    """Load the checkpoint that the configuration names; a missing one is an error that names the cure."""
    if not path:
        raise UserError(f"{what} is not set: give the path of a checkpoint (.safetensors, or the reference's .pt)")
    return load_checkpoint(resolve(str(path)))


def policy_weights(checkpoint: Checkpoint) -> dict[str, np.ndarray]:
    """The weights to act with: the averaged ones of a pre-trained policy, else the model's."""
    return checkpoint.select("ema.") or checkpoint.select("model.")


def is_fine_tuned(weights: dict[str, np.ndarray]) -> bool:
    """Whether these are weights of a fine-tuned policy."""
    return any(name.startswith("actor_ft.") for name in weights)


def load_policy(policy: DiffusionPolicy, checkpoint: Checkpoint, path: Any) -> None:
    """Fill a policy from a pre-trained or fine-tuned checkpoint.

    A pre-trained one fills the base network and its fine-tuned copy; critic and eta stay as they are. A fine-tuned one
    fills everything it holds.
    """
    weights = policy_weights(checkpoint)
    if not isinstance(policy, FineTunedDiffusionPolicy):
        load_state_dict(policy, {k: v for k, v in weights.items() if k.startswith("network.")})
        return
    network = {k.removeprefix("network."): v for k, v in weights.items() if k.startswith("network.")}
    network = network or {k.removeprefix("actor."): v for k, v in weights.items() if k.startswith("actor.")}
    if not network:
        raise UserError(f"{path} holds no diffusion policy (no network.* or actor.* weights)")
    load_state_dict(policy.network, network)
    base = {k.removeprefix("actor."): v for k, v in weights.items() if k.startswith("actor.")}
    load_state_dict(policy.actor, base or network)
    tuned = {k.removeprefix("actor_ft."): v for k, v in weights.items() if k.startswith("actor_ft.")}
    load_state_dict(policy.actor_ft, tuned or base or network)
    for part in ("critic", "eta"):
        module = getattr(policy, part, None)
        values = {k.removeprefix(part + "."): v for k, v in weights.items() if k.startswith(part + ".")}
        if module is not None and values:
            load_state_dict(module, values)


def policy_facts(policy: DiffusionPolicy) -> dict[str, Any]:
    """What a checkpoint says of its policy, beside the configuration."""
    return {
        "denoising_steps": policy.denoising_steps,
        "ft_denoising_steps": getattr(policy, "ft_denoising_steps", 0),
        "obs_dim": policy.obs_dim,
        "action_dim": policy.action_dim,
        "horizon_steps": policy.horizon_steps,
    }


def normalization_facts(path: str | None) -> dict[str, list[float]] | None:
    """The statistics of a normalization file as lists, or None without one."""
    if not path or not Path(path).is_file():
        return None
    with np.load(path, allow_pickle=False) as file:
        return {k: np.asarray(file[k], np.float64).tolist() for k in file.files}
