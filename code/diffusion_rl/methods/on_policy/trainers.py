"""Which trainer belongs to which on-policy algorithm."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffusion_rl.core.errors import UserError
from diffusion_rl.methods.on_policy.dpoer import DPOER
from diffusion_rl.methods.on_policy.dpoer_trainer import DPOERTrainer
from diffusion_rl.methods.on_policy.dppo import DPPO
from diffusion_rl.methods.on_policy.dppo_exact import ExactDPPO
from diffusion_rl.methods.on_policy.dppo_exact_trainer import ExactDPPOTrainer
from diffusion_rl.methods.on_policy.dppo_trainer import DPPOTrainer
from diffusion_rl.methods.on_policy.ppo import ChunkPPO
from diffusion_rl.methods.on_policy.ppo_trainer import PPOTrainer

TRAINERS: dict[type, type[PPOTrainer]] = {
    DPOER: DPOERTrainer,  # before the class it derives from
    DPPO: DPPOTrainer,
    ExactDPPO: ExactDPPOTrainer,
    ChunkPPO: PPOTrainer,
}


def on_policy_trainer(algorithm: Any, train: Mapping[str, Any], reward_horizon: int) -> PPOTrainer:
    """The trainer of an algorithm; arguments as of `PPOTrainer`.

    Raises:
        UserError: this loop cannot train it.
    """
    for kind, trainer in TRAINERS.items():
        if isinstance(algorithm, kind):
            return trainer(algorithm, train, reward_horizon)
    raise UserError(f"model._target_ is {type(algorithm).__name__}, which is not trained on-policy")
