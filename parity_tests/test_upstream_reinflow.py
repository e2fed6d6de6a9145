"""ReinFlow's genuine code, live: `pytest parity_tests/test_upstream_reinflow.py --upstream-reinflow PATH`.

Not collected without it.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from omegaconf import OmegaConf

from diffusion_rl.config.compose import compose, shipped_configs
from diffusion_rl.config.instantiate import flatten
from parity_tests import drawn
from parity_tests.replay import case
from parity_tests.replay.flow_calls import FLOW, PPO_FLOW, PPO_SHORTCUT, SHORTCUT

torch = pytest.importorskip("torch")

from parity_tests import live  # noqa: E402

pytestmark = pytest.mark.upstream_reinflow
H, A, O, B = 3, 2, 5, 4  # noqa: E741
SIZES = {"horizon_steps": H, "action_dim": A}
MLP = {"mlp_dims": [16, 16, 16], "residual_style": True, "activation_type": "ReLU"}
VIT = {"patch_size": 8, "depth": 1, "embed_dim": 16, "num_heads": 2, "embed_style": "embed2", "embed_norm": 0}
LOSS = {"pg_loss": 1.0, "entropy_loss": 0.03, "v_loss": 0.5}
RETURNS = (
    *("pg_loss", "entropy_loss", "v_loss", "bc_loss", "clipfrac", "approx_kl", "ratio"),
    *("oldlogprob_min", "oldlogprob_max", "oldlogprob_std", "newlogprob_min", "newlogprob_max", "newlogprob_std"),
    *("noise_std", "values_mean"),
)
COUNTED = {
    **{"normalize_denoising_horizon": True, "normalize_act_space_dimension": True},
    "account_for_initial_stochasticity": True,
}


@pytest.fixture(scope="module", autouse=True)
def checkout(request):
    path = request.config.getoption("--upstream-reinflow")
    live.make_importable(path)
    return Path(path)


def spec(path: str, **kwargs: Any) -> dict[str, Any]:
    return {"class": path, "kwargs": kwargs}


def backbone() -> dict[str, Any]:
    config = spec("model.common.vit.VitEncoderConfig", **VIT)
    sizes = {"num_channel": 3, "img_h": 32, "img_w": 32}
    return spec("model.common.vit.VitEncoder", obs_shape=[3, 32, 32], cfg=config, **sizes)


NETWORKS = {
    "flow": spec(f"{FLOW}FlowMLP", **SIZES, cond_dim=O, time_dim=8, cond_mlp_dims=[12, 6], **MLP),
    "shortcut": spec(f"{SHORTCUT}ShortCutFlowMLP", **SIZES, cond_dim=O, td_emb_dim=8, cond_mlp_dims=[12, 8], **MLP),
    "flow that sees": spec(
        f"{FLOW}VisionFlowMLP", **SIZES, backbone=backbone(), cond_dim=O, spatial_emb=8, time_dim=8, **MLP
    ),
    "shortcut that sees": spec(
        f"{SHORTCUT}ShortCutFlowViT", **SIZES, backbone=backbone(), prop_dim=O, spatial_emb=8, td_emb_dim=8, **MLP
    ),
}


def observation(draws: drawn.Draws, sees: bool) -> dict[str, np.ndarray]:
    state = {"state": draws.normal(B, 1, O)}
    return state | ({"rgb": draws.normal(B, 1, 3, 32, 32, scale=50.0)} if sees else {})


def policy(kind: str, steps: int) -> dict[str, Any]:
    noise = {"min_logprob_denoising_std": 0.1, "max_logprob_denoising_std": 0.24, "min_sampling_denoising_std": 0.1}
    bounds = {"act_min": -1, "act_max": 1, "logprob_min": -1.0, "logprob_max": 1.0, "denoised_clip_value": 1.0}
    unused = {"clip_ploss_coef_base": 0.01, "clip_ploss_coef_rate": 3, "clip_vloss_coef": None}
    unused |= {"logprob_debug_sample": False, "logprob_debug_recalculate": False, "actor_policy_path": None}
    critic = spec("model.common.critic.CriticObs", cond_dim=O, mlp_dims=[16, 16, 16], residual_style=True)
    embedding = {"time_dim_explore": 0, "learn_explore_time_embedding": False, "use_time_independent_noise": False}
    return spec(
        PPO_SHORTCUT if kind == "shortcut" else PPO_FLOW,
        **{"device": "cpu", "policy": NETWORKS[kind], "critic": critic, "act_dim": A, "horizon_steps": H},
        **{"obs_dim": O, "cond_steps": 1, "noise_scheduler_type": "learn_decay", "inference_steps": steps},
        **{"ft_denoising_steps": steps, "randn_clip_value": 3, "clip_ploss_coef": 0.01, "noise_hidden_dims": [8]},
        **{"explore_net_activation_type": "Tanh"},
        **noise | bounds | unused | embedding,
    )


@pytest.mark.parametrize("kind", NETWORKS)
@pytest.mark.parametrize("seed", range(3))
def test_networks(kind, seed):
    def prepare(model: Any, draws: drawn.Draws) -> dict[str, Any]:
        size = {"dt": draws.normal(B, scale=0.3)} if "shortcut" in kind else {}
        size = {"d": size["dt"]} if kind == "shortcut that sees" else size
        given = {"action": draws.normal(B, H, A), "time": draws.normal(B, scale=0.3), **size}
        return given | {"cond": observation(draws, "sees" in kind)}

    draws = drawn.Draws(seed, "float32")
    case.replay(live.record_call(NETWORKS[kind], "forward", prepare, ("out",), "mean_square", draws))


@pytest.mark.parametrize("kind", ["flow", "shortcut"])
@pytest.mark.parametrize("steps", [1, 4])
def test_log_probabilities(kind, steps):
    def prepare(model: Any, draws: drawn.Draws) -> dict[str, Any]:
        chains = draws.normal(B, steps + 1, H, A, scale=0.6)
        switches = {"get_entropy": True, "verbose_entropy_stats": False, **COUNTED}
        return {"cond": observation(draws, False), "x_chain": chains, **switches}

    returns = ("logprob", "entropy", "std_mean")
    case.replay(live.record_call(policy(kind, steps), "get_logprobs", prepare, returns, "mean_square"))


@pytest.mark.parametrize("kind", ["flow", "shortcut"])
@pytest.mark.parametrize("steps", [1, 4])
def test_the_loss(kind, steps):
    def prepare(model: Any, draws: drawn.Draws) -> dict[str, Any]:
        rows = {name: draws.normal(B) for name in ("returns", "oldvalues", "advantages")}
        old = draws.normal(B, scale=0.1) + np.float32(0.3)
        given = {"obs": observation(draws, False), "chains": draws.normal(B, steps + 1, H, A, scale=0.3), **rows}
        return given | {"oldlogprobs": old, "verbose": False, **COUNTED}

    case.replay(live.record_call(policy(kind, steps), "loss", prepare, RETURNS, LOSS))


# ---------- configurations ----------

#: Keys whose values differ on purpose, or mean something else.
OTHERWISE = (
    r"(^|\.)(_target_|device|seed|name|\w*path|denoising_steps|save_model_freq|log_freq|type|freq|num_img)$"
    r"|model\.policy\.augment$"
)
COMPARED = ("train.", "model.", "env.n_envs", "env.max_episode_steps", "env.best_reward", "env.wrappers")
ALONE = ("horizon_steps", "act_steps", "obs_dim", "action_dim", "cond_steps", "ft_denoising_steps")


def shared_configs(checkout: Path) -> list[str]:
    names = [name for name in shipped_configs() if re.search(r"/(pre|ft_ppo)_(reflow|shortcut)_mlp", name)]
    return [name for name in names if (checkout / "cfg" / f"{name}.yaml").exists()]


def test_configurations(checkout):
    """Every value of training, model and environments that both have, in every configuration that both have."""
    for name in ("REINFLOW_LOG_DIR", "REINFLOW_DATA_DIR", "REINFLOW_WANDB_ENTITY", "REINFLOW_DIR"):
        os.environ.setdefault(name, "unused")
    OmegaConf.register_new_resolver("eval", lambda text: eval(text, {}), replace=True)
    OmegaConf.register_new_resolver("now", lambda text: text, replace=True)
    names, compared = shared_configs(checkout), 0
    assert len(names) >= 20
    for name in names:
        cfg = OmegaConf.load(checkout / "cfg" / f"{name}.yaml")
        for key in ("defaults", "hydra", "wandb", "eval_env"):
            cfg.pop(key, None)
        if "env" not in cfg:  # forgotten there
            continue
        theirs = flatten(OmegaConf.to_container(cfg, resolve=True))
        composed = compose(name)
        del composed.hydra
        ours = flatten(OmegaConf.to_container(composed, resolve=True))
        for key in theirs.keys() & ours.keys():
            if (key.startswith(COMPARED) or key in ALONE) and not re.search(OTHERWISE, key):
                compared += 1
                assert number(ours[key]) == number(theirs[key]), (name, key, ours[key], theirs[key])
    assert compared > 20 * len(names)


def number(value: Any) -> Any:
    try:
        return float(value)
    except (TypeError, ValueError):
        return value
