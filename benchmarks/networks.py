"""Sizes of the other networks: those of the configurations of robomimic's square task, and of a long furniture chunk.

Both sides build the same description; its class paths are the reference's, which this repository reads as well.
Shape letters: E environments, B rows, K denoising steps, F fine-tuned ones, H horizon, A action, O observation.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from workloads import Row

ENVS, HORIZON, ACTION, STATE = 50, 4, 7, 23
SEEN_STATE, IMAGE = 9, (3, 96, 96)  # with a camera
KINDS = ("forward", "gradient", "sampling")

_MEASURES = {"horizon_steps": HORIZON, "action_dim": ACTION, "cond_dim": STATE}
_SPREAD = {"fixed_std": 0.1, "learn_fixed_std": True, "std_min": 0.01, "std_max": 0.2}
_MLP = {"mlp_dims": [1024] * 3, "residual_style": True}
_TRANSFORMER = {"transformer_embed_dim": 160, "transformer_num_heads": 4, "transformer_num_layers": 4}
_UNET = {
    "_target_": "model.diffusion.unet.Unet1D",
    "diffusion_step_embed_dim": 16,
    "dim": 64,
    "dim_mults": [1, 2],
    "kernel_size": 5,
    "n_groups": 8,
    "smaller_encoder": False,
    "cond_predict_scale": True,
    "cond_dim": STATE,
    "action_dim": ACTION,
}
_EYES = {
    "backbone": {
        "_target_": "model.common.vit.VitEncoder",
        "obs_shape": list(IMAGE),
        "num_channel": IMAGE[0],
        "img_h": IMAGE[1],
        "img_w": IMAGE[2],
        "cfg": {
            "patch_size": 8,
            "depth": 1,
            "embed_dim": 128,
            "num_heads": 4,
            "embed_style": "embed2",
            "embed_norm": 0,
        },
    },
    "augment": False,
    "spatial_emb": 128,
    "img_cond_steps": 1,
    "cond_dim": SEEN_STATE,
}
_CRITIC = {
    "_target_": "model.common.critic.CriticObs",
    "mlp_dims": [256] * 3,
    "activation_type": "Mish",
    "residual_style": True,
    "cond_dim": STATE,
}
_DPPO = {
    "_target_": "model.diffusion.diffusion_ppo.PPODiffusion",
    "gamma_denoising": 0.99,
    "clip_ploss_coef": 0.01,
    "clip_ploss_coef_base": 0.001,
    "clip_ploss_coef_rate": 3,
    "randn_clip_value": 3,
    "min_sampling_denoising_std": 0.1,
    "min_logprob_denoising_std": 0.1,
    "action_dim": ACTION,
    "critic": _CRITIC,
}
_DDPM = _DPPO | {"denoising_steps": 20, "ft_denoising_steps": 10, "horizon_steps": HORIZON, "obs_dim": STATE}
_DDIM = _DPPO | {
    "denoising_steps": 100,
    "ft_denoising_steps": 5,
    "use_ddim": True,
    "ddim_steps": 5,
    "learn_eta": False,
    "eta": {"_target_": "model.diffusion.eta.EtaFixed", "base_eta": 1, "min_eta": 0.1, "max_eta": 1.0},
    "horizon_steps": HORIZON,
    "obs_dim": SEEN_STATE,
}
_GAUSSIAN = {
    "_target_": "model.rl.gaussian_ppo.PPO_Gaussian",
    "clip_ploss_coef": 0.01,
    "randn_clip_value": 3,
    "horizon_steps": HORIZON,
    "critic": _CRITIC,
}
_GMM = {
    "_target_": "model.rl.gmm_ppo.PPO_GMM",
    "clip_ploss_coef": 0.01,
    "horizon_steps": HORIZON,
    "critic": _CRITIC,
}


class Case(NamedTuple):
    """One network in its policy."""

    title: str
    policy: dict[str, Any]  # with the network as `actor`
    rows: int  # B of forward and gradient: a minibatch
    chunk: int = 1000  # rows that this repository works on at a time
    turns: int = 3

    @property
    def denoises(self) -> bool:
        return "denoising_steps" in self.policy

    @property
    def sees(self) -> bool:
        return "backbone" in self.policy["actor"]


CASES = {
    "unet": Case("U-Net, 4 steps", _DDPM | {"actor": _UNET}, 10_000),
    "long unet": Case(
        "U-Net, 16 steps, 3 levels",
        _DDPM
        | {"horizon_steps": 16, "action_dim": 10, "obs_dim": 58}
        | {"actor": _UNET | {"dim_mults": [1, 2, 4], "action_dim": 10, "cond_dim": 58}},
        1_000,
        chunk=250,
    ),
    "vision mlp": Case(
        "MLP that sees, 96 x 96",
        _DDIM
        | {
            "actor": _EYES
            | {
                "_target_": "model.diffusion.mlp_diffusion.VisionDiffusionMLP",
                "time_dim": 32,
                "mlp_dims": [768] * 3,
                "residual_style": True,
                "horizon_steps": HORIZON,
                "action_dim": ACTION,
            }
        },
        100,
        chunk=10,
    ),
    "vision unet": Case(
        "U-Net that sees, 96 x 96",
        _DDIM
        | {"actor": _UNET | _EYES | {"_target_": "model.diffusion.unet.VisionUnet1D", "diffusion_step_embed_dim": 32}},
        100,
        chunk=10,
    ),
    "gaussian mlp": Case(
        "Gaussian MLP",
        _GAUSSIAN | {"actor": {"_target_": "model.common.mlp_gaussian.Gaussian_MLP", **_MLP, **_MEASURES, **_SPREAD}},
        10_000,
    ),
    "gmm mlp": Case(
        "Gaussian mixture MLP",
        _GMM
        | {
            "actor": {
                "_target_": "model.common.mlp_gmm.GMM_MLP",
                "num_modes": 5,
                **_MLP,
                **_MEASURES,
                **_SPREAD,
            }
        },
        10_000,
    ),
    "gaussian transformer": Case(
        "Gaussian transformer",
        _GAUSSIAN
        | {
            "actor": {
                "_target_": "model.common.transformer.Gaussian_Transformer",
                **_TRANSFORMER,
                **_MEASURES,
                **_SPREAD,
            }
        },
        10_000,
    ),
    "gmm transformer": Case(
        "Gaussian mixture transformer",
        _GMM
        | {
            "actor": {
                "_target_": "model.common.transformer.GMM_Transformer",
                "num_modes": 5,
                **_TRANSFORMER,
                **_MEASURES,
                **_SPREAD,
            }
        },
        10_000,
    ),
}


def rows() -> dict[str, Row]:
    """The rows of the table, by the names of their workloads."""
    table = {}
    for name, case in CASES.items():
        titles = {
            "forward": f"{case.title}: forward, {case.rows} rows",
            "gradient": f"{case.title}: forward and backward, {case.rows} rows",
            "sampling": f"{case.title}: sampling, {ENVS} environments",
        }
        for kind in KINDS:
            calls = (5 if case.denoises else 40) if kind == "sampling" else 1
            table[f"{name} {kind}"] = Row(titles[kind], f"{name} {kind}", f"{name} {kind}", calls, case.turns)
        if case.sees:
            key = f"{name} log-probs"
            title = f"{case.title}: log-probabilities of {case.rows} chains"
            table[key] = Row(title, key, key, 1, case.turns)
    return table


class Inputs(NamedTuple):
    """What a network is given, the same on both sides."""

    x: np.ndarray  # [B,H,A]
    t: np.ndarray  # [B]
    state: np.ndarray  # [B,1,O]
    rgb: np.ndarray | None  # [B,1,C,Hi,Wi] bytes
    chains: np.ndarray | None  # [B,F+1,H,A]


def inputs(case: Case, n_rows: int, seed: int = 0) -> Inputs:
    """Draw them."""
    g = np.random.default_rng(seed)
    policy, actor = case.policy, case.policy["actor"]
    chunk = (policy["horizon_steps"], actor["action_dim"])
    x = g.standard_normal((n_rows, *chunk)).astype(np.float32)
    t = g.integers(0, policy.get("denoising_steps", 1), n_rows)
    state = g.standard_normal((n_rows, 1, actor["cond_dim"])).astype(np.float32)
    rgb = g.integers(0, 256, (n_rows, 1, *IMAGE), dtype=np.uint8) if case.sees else None
    chains = None
    if case.denoises:
        steps = 0.1 * g.standard_normal((n_rows, policy["ft_denoising_steps"] + 1, *chunk))
        chains = np.cumsum(steps, axis=1).astype(np.float32)
    return Inputs(x, t, state, rgb, chains)
