"""What is measured: the sizes of the default Hopper fine-tuning, its rows, its arithmetic.

Shape letters: E environments, K denoising steps, F fine-tuned ones, N samples of a rollout, B rows of a minibatch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

CONFIG_FOLDER = "gym/finetune/hopper-v2"
CONFIG_NAME = "ft_ppo_diffusion_mlp"
ENVS, CHUNK_STEPS, HORIZON, ACTION, OBSERVATION = 40, 500, 4, 3, 11
DENOISING, FINE_TUNED, TIME = 20, 10, 16
SAMPLES, MINIBATCH, EPOCHS = ENVS * CHUNK_STEPS, 50_000, 5
ACTOR_WIDTH, CRITIC_WIDTH = 512, 256
PRETRAIN_BATCH, PRETRAIN_STEPS = 128, 10
GEMM_SHAPES = ((1000, 512, 512), (5000, 512, 512), (2048, 2048, 2048))
GEMM_REPEAT = 20

# Arguments of the PyTorch classes.
ACTOR = {
    "action_dim": ACTION,
    "horizon_steps": HORIZON,
    "cond_dim": OBSERVATION,
    "time_dim": TIME,
    "mlp_dims": [ACTOR_WIDTH] * 3,
    "activation_type": "ReLU",
    "residual_style": True,
}
CRITIC = {
    "cond_dim": OBSERVATION,
    "mlp_dims": [CRITIC_WIDTH] * 3,
    "activation_type": "Mish",
    "residual_style": True,
}
SHAPES = {
    "horizon_steps": HORIZON,
    "obs_dim": OBSERVATION,
    "action_dim": ACTION,
    "denoising_steps": DENOISING,
    "device": "cpu",
}
PPO = {
    "gamma_denoising": 0.99,
    "clip_ploss_coef": 0.01,
    "clip_ploss_coef_base": 0.01,
    "clip_ploss_coef_rate": 3,
    "randn_clip_value": 3,
    "min_sampling_denoising_std": 0.1,
    "min_logprob_denoising_std": 0.1,
    "ft_denoising_steps": FINE_TUNED,
}

Workload = Callable[[], Any]  # one call is one measurement


class Row(NamedTuple):
    """A row of the table: names of the workload on the two sides, calls per turn, turns."""

    title: str
    reference: str | None
    ours: str
    calls: int
    turns: int


ROWS = {
    "sampling": Row("sampling, 40 environments, with chain", "sampling", "sampling", 25, 12),
    "minibatch": Row("PPO minibatch, 50 000 rows, both optimizers", "minibatch", "minibatch", 1, 9),
    "old log-probs": Row(
        "old log-probs and values of a rollout, 20 000 x 10 (ours: log-probs captured when sampling)",
        "log_probs",
        "values",
        1,
        5,
    ),
    "log-prob pass": Row("the same, ours with the pass made again", "log_probs", "log_probs", 1, 5),
    "pre-training": Row("pre-training, 10 steps of 128 with loader and EMA", "pretraining", "pretraining", 5, 10),
    "environments": Row("environments, 40 x 4 steps", "environments", "environments", 25, 8),
}


class Rollout(NamedTuple):
    """Synthetic samples of the default rollout, the same on both sides."""

    state: np.ndarray  # [N,To,O]
    chains: np.ndarray  # [N,F+1,H,A]
    returns: np.ndarray  # [N]
    values: np.ndarray  # [N]
    advantages: np.ndarray  # [N]


def rollout(
    seed: int = 0, samples: int = SAMPLES, tuned: int = FINE_TUNED, horizon: int = HORIZON, history: int = 1
) -> Rollout:
    """Draw one; consecutive links of the chains differ by about the sampling noise. Sizes N, F, H, To."""
    g = np.random.default_rng(seed)
    steps = 0.1 * g.standard_normal((samples, tuned + 1, horizon, ACTION))
    vectors = [g.standard_normal(samples) for _ in range(3)]
    arrays = [g.standard_normal((samples, history, OBSERVATION)), np.cumsum(steps, axis=1), *vectors]
    return Rollout(*(a.astype(np.float32) for a in arrays))


def actions(turns: int = 200, seed: int = 0, envs: int = ENVS) -> np.ndarray:
    """Random action chunks [turns,E,H,A] in [-1,1]."""
    return np.random.default_rng(seed).uniform(-1, 1, (turns, envs, HORIZON, ACTION)).astype(np.float32)


# ---------- arithmetic of one minibatch update, counted by hand ----------
#
# A product [m,k] x [k,n] is 2mkn operations; its backward pass is two such products (one, where the input needs no
# gradient). Activations, optimizers and the folding itself are under 1% and left out.


def _residual(rows: int, inputs: int, width: int, outputs: int, backward: bool) -> int:
    """A residual MLP with one block: in -> width, block of two layers, width -> out."""
    inner = 2 * width * width + width * outputs
    return 2 * rows * ((2 if backward else 1) * inputs * width + (3 if backward else 1) * inner)


def _folded(rows: int, inputs: int, width: int, outputs: int, shortcut: int) -> int:
    """The same with the block's second layer folded into the output layer, forward and backward."""
    return 2 * rows * (2 * inputs * width + 3 * (width * width + width * outputs) + shortcut)


def reference_flops() -> int:
    """The reference: frozen and fine-tuned actor on every row, the critic on every row."""
    inputs, outputs = HORIZON * ACTION + TIME + OBSERVATION, HORIZON * ACTION
    frozen = _residual(MINIBATCH, inputs, ACTOR_WIDTH, outputs, backward=False)
    tuned = _residual(MINIBATCH, inputs, ACTOR_WIDTH, outputs, backward=True)
    return frozen + tuned + _residual(MINIBATCH, OBSERVATION, CRITIC_WIDTH, 1, backward=True)


def our_flops() -> int:
    """Ours: the fine-tuned actor folded, with one-hot time; the critic folded, once per observation of the rollout."""
    outputs = HORIZON * ACTION
    inputs = outputs + OBSERVATION + FINE_TUNED
    actor = _folded(MINIBATCH, inputs, ACTOR_WIDTH, outputs, shortcut=2 * inputs * outputs)
    return actor + _folded(SAMPLES, OBSERVATION, CRITIC_WIDTH, 1, shortcut=3 * CRITIC_WIDTH)
