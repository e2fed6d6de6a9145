"""The rows of ReinFlow: decisions in 1, 4 and 20 steps, and an iteration's update, at the sizes of its Hopper
configuration."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from workloads import Row

HORIZON, ACTION, OBSERVATION = 4, 3, 11
VELOCITY = {"time_dim": 16, "mlp_dims": [512, 512, 512], "activation_type": "ReLU", "residual_style": True}
CRITIC = {"mlp_dims": [256, 256, 256], "activation_type": "Mish", "residual_style": True}
NOISE = {"min_logprob_denoising_std": 0.1, "max_logprob_denoising_std": 0.24, "min_sampling_denoising_std": 0.1}
SAMPLES, ROWS_OF_MINIBATCH = 20_000, 50_000  # 500 chunks of 40 environments; each sample counts ten times


class Decision(NamedTuple):
    """How many steps a decision has, for how many environments."""

    steps: int
    n_envs: int

    @property
    def title(self) -> str:
        steps = f"{self.steps} step{'s' if self.steps > 1 else ''}"
        return f"a decision in {steps} for {self.n_envs} environment{'s' if self.n_envs > 1 else ''}"


DECISIONS = {f"flow {steps} of {n}": Decision(steps, n) for steps in (1, 4, 20) for n in (1, 40)}
MINIBATCH = "flow minibatch"


def rows() -> dict[str, Row]:
    """The rows of the table, by the names of their workloads."""
    table = {name: Row(each.title, name, name, 20, 8) for name, each in DECISIONS.items()}
    title = f"ReinFlow's minibatch of {ROWS_OF_MINIBATCH} rows, 4 steps"
    table[MINIBATCH] = Row(title, MINIBATCH, MINIBATCH, 1, 6)
    return table


def policy(steps: int) -> dict[str, Any]:
    """Arguments of the policy beside its networks, which both sides have."""
    return {
        **{"act_dim": ACTION, "horizon_steps": HORIZON, "act_min": -1, "act_max": 1, "obs_dim": OBSERVATION},
        **{"cond_steps": 1, "noise_scheduler_type": "learn_decay", "inference_steps": steps},
        **{"ft_denoising_steps": steps, "randn_clip_value": 3, "logprob_min": -1.0, "logprob_max": 1.0},
        **{"clip_ploss_coef": 0.01, "clip_vloss_coef": None, "denoised_clip_value": 1.0, "noise_hidden_dims": [64, 64]},
        **{"explore_net_activation_type": "Tanh", "time_dim_explore": 0, "learn_explore_time_embedding": False},
        "use_time_independent_noise": False,
        **NOISE,
    }


def observations(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((n, 1, OBSERVATION)).astype(np.float32)


def rollout(steps: int, seed: int = 0) -> dict[str, np.ndarray]:
    """What an update is given, [N,...]."""
    g, n = np.random.default_rng(seed), SAMPLES
    columns = {name: g.standard_normal(n).astype(np.float32) for name in ("returns", "values", "advantages")}
    chains = 0.3 * g.standard_normal((n, steps + 1, HORIZON, ACTION)).astype(np.float32)
    old = (0.1 * g.standard_normal(n)).astype(np.float32)
    return {"state": observations(n), "chains": chains, **columns, "old_log_prob": old}


def minibatch(seed: int = 0) -> np.ndarray:
    """Which samples a minibatch has."""
    return np.random.default_rng(seed).permutation(10 * SAMPLES)[:ROWS_OF_MINIBATCH]
