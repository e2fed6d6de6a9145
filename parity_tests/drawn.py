"""Drawn specifications, and the same drawn weights in both frameworks."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st

from diffusion_rl.core.keras import precision
from diffusion_rl.core.noise import NoiseSource, initial_weights
from diffusion_rl.interop import torch_names
from diffusion_rl.networks.layers import variables_of
from parity_tests.reference.diffusion import Policy
from parity_tests.replay.build import build

NETWORK = "model.diffusion.mlp_diffusion.DiffusionMLP"
CRITIC = "model.common.critic.CriticObs"
PRETRAINED = "model.diffusion.diffusion.DiffusionModel"
FINE_TUNED = "model.diffusion.diffusion_vpg.VPGDiffusion"
PPO = "model.diffusion.diffusion_ppo.PPODiffusion"
ETA = "model.diffusion.eta."

activations = st.sampled_from(["ReLU", "ELU", "GELU", "Tanh", "Mish", "Softplus", "Identity"])
seeds = st.integers(0, 2**31)
widths = st.integers(3, 12)  # LayerNorm over two numbers gives their signs: float32 says nothing about it


def spec(cls: str, **kwargs: Any) -> dict[str, Any]:
    return {"class": cls, "kwargs": kwargs}


@st.composite
def hidden_dims(draw: Any, residual: bool) -> list[int]:
    """Dimensions of hidden layers; residual networks have an odd number of them, all of one width."""
    if residual:
        return [draw(widths)] * draw(st.sampled_from([1, 3, 5]))
    return draw(st.lists(widths, min_size=1, max_size=3))


@st.composite
def sizes(draw: Any) -> dict[str, int]:
    """Dimensions of a task."""
    return {
        "action_dim": draw(st.integers(1, 4)),
        "horizon_steps": draw(st.integers(1, 5)),
        "obs_dim": draw(st.integers(1, 6)),
        "cond_steps": draw(st.integers(1, 3)),
    }


@st.composite
def diffusion_mlps(draw: Any, size: dict[str, int]) -> dict[str, Any]:
    residual = draw(st.booleans())
    return spec(
        NETWORK,
        action_dim=size["action_dim"],
        horizon_steps=size["horizon_steps"],
        cond_dim=size["obs_dim"] * size["cond_steps"],
        time_dim=draw(st.sampled_from([4, 6, 16])),
        mlp_dims=draw(hidden_dims(residual)),
        cond_mlp_dims=draw(st.none() | st.lists(st.integers(1, 6), min_size=1, max_size=2)),
        activation_type=draw(activations),
        out_activation_type=draw(st.sampled_from(["Identity", "Tanh"])),
        use_layernorm=draw(st.booleans()),
        residual_style=residual,
    )


@st.composite
def critics(draw: Any, size: dict[str, int]) -> dict[str, Any]:
    residual = draw(st.booleans())
    return spec(
        CRITIC,
        cond_dim=size["obs_dim"] * size["cond_steps"],
        mlp_dims=draw(hidden_dims(residual)),
        activation_type=draw(activations),
        use_layernorm=draw(st.booleans()),
        residual_style=residual,
    )


@st.composite
def etas(draw: Any, size: dict[str, int]) -> dict[str, Any]:
    kind = draw(st.sampled_from(["EtaFixed", "EtaAction", "EtaState", "EtaStateAction"]))
    kwargs: dict[str, Any] = {"min_eta": 0.2, "base_eta": 0.6, "max_eta": draw(st.sampled_from([0.9, 1.3]))}
    if kind.endswith("Action"):
        kwargs["action_dim"] = size["action_dim"]
    if "State" in kind:
        kwargs |= {"input_dim": size["obs_dim"] * size["cond_steps"], "mlp_dims": [5], "gain": 2.0}
    return spec(ETA + kind, **kwargs)


optional_bound = st.sampled_from([None, 0.5, 1.0])


@st.composite
def policies(draw: Any, cls: str = PPO) -> tuple[dict[str, Any], dict[str, int]]:
    """A whole policy of a class with its options, and the sizes of its task."""
    size = draw(sizes())
    ddim = draw(st.booleans())
    steps = draw(st.integers(3, 20))
    kwargs: dict[str, Any] = {k: size[k] for k in ("action_dim", "horizon_steps", "obs_dim")}
    kwargs |= {
        "denoising_steps": steps,
        "denoised_clip_value": draw(optional_bound),
        "randn_clip_value": draw(st.sampled_from([0.7, 3, 10])),
        "final_action_clip_value": draw(optional_bound),
        "predict_epsilon": True if ddim else draw(st.booleans()),
    }
    if ddim:
        steps = draw(st.integers(2, min(steps, 6)))
        kwargs |= {"use_ddim": True, "ddim_steps": steps, "eps_clip_value": draw(st.sampled_from([None, 0.8]))}
    network = draw(diffusion_mlps(size))
    if cls == PRETRAINED:
        return spec(cls, network=network, **kwargs), size
    kwargs |= {
        "actor": network,
        "critic": draw(critics(size)),
        "ft_denoising_steps": draw(st.integers(2, steps)),
        "min_sampling_denoising_std": draw(st.sampled_from([0.05, 0.1, 0.3])),
        "min_logprob_denoising_std": draw(st.sampled_from([0.05, 0.1, 0.3])),
    }
    if ddim:
        kwargs |= {"eta": draw(etas(size)), "learn_eta": draw(st.booleans())}
    if cls == PPO:
        kwargs |= {
            "gamma_denoising": draw(st.sampled_from([1.0, 0.99, 0.7])),
            "clip_ploss_coef": draw(st.sampled_from([0.01, 0.2])),
            "clip_ploss_coef_base": draw(st.sampled_from([0.001, 0.01])),
            "clip_ploss_coef_rate": draw(st.sampled_from([1, 3])),
            "clip_vloss_coef": draw(st.sampled_from([None, 0.1])),
            "clip_advantage_lower_quantile": draw(st.sampled_from([0, 0.05, 0.3])),
            "clip_advantage_upper_quantile": draw(st.sampled_from([1, 0.95, 0.6])),
            "norm_adv": draw(st.booleans()),
        }
    return spec(cls, **kwargs), size


def build_drawn(specification: dict[str, Any], seed: int, dtype: str) -> Any:
    """Our object with drawn weights: every tensor perturbed, so that gains are not one and copies are not equal."""
    source = NoiseSource(seed)
    with precision(dtype), initial_weights(source):
        model = build(specification)
    for variable in variables_of(model):
        variable.assign_add(0.2 * source.normal(variable.shape, dtype=variable.dtype.as_numpy_dtype))
    return model


def torch_weights(model: Any) -> dict[str, torch.Tensor]:
    """The model's weights as tensors that want gradients; names of one variable share one tensor."""
    tensors: dict[tuple[int, int | None], torch.Tensor] = {}
    weights = {}
    for p in torch_names.named_parameters(model):
        key = (id(p.variable), p.member)
        if key not in tensors:
            tensors[key] = torch.from_numpy(np.array(p.to_torch(p.variable.numpy()))).requires_grad_()
        weights[p.name] = tensors[key]
    return weights


def twin_of(model: Any, specification: dict[str, Any]) -> Policy:
    """The torch twin of one of our policies, with the same weights and schedule tables."""
    tables = {k: torch.from_numpy(np.array(v)) for k, v in vars(model.schedule).items()}
    if model.ddim_schedule is not None:
        tables |= {k: torch.from_numpy(np.array(v)) for k, v in vars(model.ddim_schedule).items()}
    return Policy(specification, torch_weights(model), tables)


class Draws:
    """Drawn arrays, the same for both frameworks."""

    def __init__(self, seed: int, dtype: str = "float64"):
        self.generator, self.dtype = np.random.default_rng(seed), dtype

    def normal(self, *shape: int, scale: float = 1.0) -> np.ndarray:
        return np.asarray(scale * self.generator.standard_normal(shape), self.dtype)

    def integers(self, high: int, *shape: int) -> np.ndarray:
        return self.generator.integers(0, high, shape)

    def state(self, size: dict[str, int], batch: int) -> np.ndarray:
        return self.normal(batch, size["cond_steps"], size["obs_dim"])

    def chunk(self, size: dict[str, int], *batch: int) -> np.ndarray:
        return self.normal(*batch, size["horizon_steps"], size["action_dim"])


def ppo_batch(model: Any, draws: Draws, size: dict[str, int], batch: int) -> dict[str, np.ndarray]:
    """A plausible PPO minibatch: chains from the model itself, old log-probabilities close to the present ones."""
    state = draws.state(size, batch)
    noise = draws.chunk(size, model.sampling_steps + 1, batch)
    chains = model.sample({"state": state}, noise).chains.numpy()
    inds = draws.integers(model.ft_denoising_steps, batch)
    rows = np.arange(batch)
    previous, following = chains[rows, inds], chains[rows, inds + 1]
    log_prob = model.log_probs_subsample({"state": state}, previous, following, inds)[0].numpy()
    values = model.critic({"state": state}).numpy()[:, 0]
    return {
        "state": state,
        "chains_prev": previous,
        "chains_next": following,
        "denoising_inds": inds,
        "returns": values + draws.normal(batch, scale=0.5),
        "oldvalues": values + draws.normal(batch, scale=0.15),
        "advantages": draws.normal(batch, scale=2.0),
        "oldlogprobs": log_prob + draws.normal(*log_prob.shape, scale=0.05),
    }
