"""Checkpoints as the reference writes them, built from recorded state_dicts, and what each part of them is."""

from __future__ import annotations

import collections
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch

from parity_tests.replay.files import Golden

SHELL = "base_model."
# Under which argument of the model's constructor each part's network stands.
ARGUMENTS = {
    "network": ("network", "actor"),
    "actor": ("network", "actor"),
    "actor_ft": ("network", "actor"),
    "actor_target": ("network", "actor"),
    "target_actor": ("network", "actor"),
    "bc_policy": ("network", "actor"),
    "critic": ("critic",),
    "critic_target": ("critic",),
    "target_critic": ("critic",),
    "critic_q": ("critic", "critic_q"),
    "target_q": ("critic", "critic_q"),
    "critic_v": ("critic_v",),
    "critic_networks": ("critic",),
    "target_networks": ("critic",),
    "eta": ("eta",),
}
KINDS = {
    "DiffusionModel": "diffusion_policy",
    "DiffusionEval": "dppo",
    "VPGDiffusion": "dppo",
    "PPODiffusion": "dppo",
    "PPOExactDiffusion": "dppo",
    "RWRDiffusion": "diffusion_policy",
    "AWRDiffusion": "awr",
    "DQLDiffusion": "dql",
    "DIPODiffusion": "dipo",
    "IDQLDiffusion": "idql",
    "QSMDiffusion": "qsm",
    "GaussianModel": "gaussian_policy",
    "RWR_Gaussian": "gaussian_policy",
    "AWR_Gaussian": "gaussian_awr",
    "PPO_Gaussian": "gaussian_ppo",
    "SAC_Gaussian": "sac",
    "CalQL_Gaussian": "sac",  # the two have the same parts
    "RLPD_Gaussian": "rlpd",
    "IBRL_Gaussian": "ibrl",
    "GMMModel": "gmm_policy",
    "PPO_GMM": "gmm_ppo",
}


def state_dict(golden: Golden) -> collections.OrderedDict[str, torch.Tensor]:
    """The recorded state_dict as tensors: shared where the reference shares them, with the shell of its ensembles."""
    aliases = golden.meta.get("aliases", {})
    state = collections.OrderedDict((k, torch.from_numpy(v.copy())) for k, v in golden.group("w").items())
    state.update((alias, state[name]) for alias, name in aliases.items())
    first = "critic_networks.0."
    shell = {SHELL + k.removeprefix(first): v.to("meta") for k, v in state.items() if k.startswith(first)}
    return collections.OrderedDict({**state, **shell})


def parts(golden: Golden) -> Iterator[tuple[str, dict[str, Any], dict[str, np.ndarray]]]:
    """(name, specification of its network, weights) of each part of a recorded model; members of ensembles singly."""
    kwargs = golden.meta["spec"]["kwargs"]
    grouped: dict[str, dict[str, np.ndarray]] = {}
    for name, value in golden.state_dict.items():
        words = name.split(".")
        length = 2 if words[1].isdigit() else 1
        grouped.setdefault(".".join(words[:length]), {})[".".join(words[length:])] = value
    for part, weights in grouped.items():
        arguments = ARGUMENTS[part.partition(".")[0]]
        yield part, next(kwargs[argument] for argument in arguments if argument in kwargs), weights


def same_tensor(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal to the bit; without elements: of the same type and shape."""
    if a.dtype != b.dtype or a.shape != b.shape or a.is_meta != b.is_meta:
        return False
    return a.is_meta or a.numpy().tobytes() == b.numpy().tobytes()


def sharing(state: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """name -> first name of the same storage."""
    first: dict[int, str] = {}
    return {k: first.setdefault(v.data_ptr(), k) for k, v in state.items() if not v.is_meta and v.numel()}
