"""Networks as functions of (weights, inputs). Weights are {state_dict name: tensor}; names tell the architecture."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Weights = Mapping[str, Tensor]
# (torch's function, shape, rate or bound) -> the draw, or None where nothing is drawn
Draw = Callable[[str, tuple[int, ...], float], Tensor | None]

ACTIVATIONS = {
    "ReLU": F.relu,
    "ELU": F.elu,
    "GELU": F.gelu,
    "Tanh": torch.tanh,
    "Mish": F.mish,
    "Softplus": F.softplus,
    "Identity": lambda x: x,
}


def below(weights: Weights, prefix: str) -> dict[str, Tensor]:
    """The weights of a part, without its prefix."""
    start = prefix + "."
    return {k[len(start) :]: v for k, v in weights.items() if k.startswith(start)}


def nothing_drawn(function: str, shape: tuple[int, ...], bound: float) -> None:
    """Evaluation: no dropout, no shifts."""


def affine(weights: Weights, name: str, x: Tensor) -> Tensor:
    """W x + b; weights may be stacked, [M,out,in] and [M,out]: then [B,in] or [M,B,in] to [M,B,out]."""
    return x @ weights[name + ".weight"].mT + weights[name + ".bias"].unsqueeze(-2)


def normalised(weights: Weights, name: str, x: Tensor, eps: float) -> Tensor:
    """LayerNorm, if the weights have one of that name."""
    if name + ".weight" not in weights:
        return x
    gain, offset = (weights[f"{name}.{part}"].unsqueeze(-2) for part in ("weight", "bias"))
    return F.layer_norm(x, gain.shape[-1:], eps=eps) * gain + offset


def dropped(x: Tensor, rate: float, draw: Draw) -> Tensor:
    """Dropout with the drawn 0/1 mask."""
    keep = draw("F.dropout.keep", tuple(x.shape), rate) if rate else None
    return x if keep is None else x * keep / (1 - rate)


def mlp(
    weights: Weights,
    x: Tensor,
    hidden: str,
    out: str = "Identity",
    append: Tensor | None = None,
    append_layers: tuple[int, ...] = (),
    rate: float = 0,
    drop_final: bool = False,
    draw: Draw = nothing_drawn,
) -> Tensor:
    """Linear, LayerNorm, dropout, activation, layer by layer; the last has dropout only with `drop_final`."""
    depth = 1 + max(int(name.split(".")[1]) for name in weights)
    for i in range(depth):
        if append is not None and i in append_layers:
            x = torch.cat([x, append], -1)
        x = affine(weights, f"moduleList.{i}.linear_1", x)
        x = normalised(weights, f"moduleList.{i}.norm_1", x, 1e-5)
        x = dropped(x, rate if i < depth - 1 or drop_final else 0, draw)
        x = ACTIVATIONS[out if i == depth - 1 else hidden](x)
    return x


def residual_mlp(weights: Weights, x: Tensor, hidden: str, out: str = "Identity") -> Tensor:
    """Linear, blocks x + W2 act(norm(W1 act(norm(x)))), Linear."""
    act = ACTIVATIONS[hidden]
    depth = 1 + max(int(name.split(".")[1]) for name in weights)
    for i in range(depth):
        part = below(weights, f"layers.{i}")
        if "l1.weight" in part:
            h = affine(part, "l1", act(normalised(part, "norm1", x, 1e-6)))
            x = x + affine(part, "l2", act(normalised(part, "norm2", h, 1e-6)))
        elif part["weight"].shape == part["bias"].shape:
            x = normalised(weights, f"layers.{i}", x, 1e-5)
        else:
            x = affine(weights, f"layers.{i}", x)
    return ACTIVATIONS[out](x)


def either_mlp(weights: Weights, x: Tensor, hidden: str, out: str = "Identity") -> Tensor:
    """Plain or residual, as the names say."""
    plain = any(name.startswith("moduleList.") for name in weights)
    return (mlp if plain else residual_mlp)(weights, x, hidden, out)


def sinusoidal(t: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
    """[sin, cos] of t at dim/2 frequencies between 1 and 1/10000."""
    half = dim // 2
    steps = torch.arange(half, dtype=dtype)
    angles = t.to(dtype)[:, None] * torch.exp(-math.log(10000) / (half - 1) * steps)
    return torch.cat([angles.sin(), angles.cos()], -1)


def embedded_time(weights: Weights, t: Tensor) -> Tensor:
    """Sinusoidal embedding, Linear, Mish, Linear."""
    first = weights["1.weight"]
    return affine(weights, "3", F.mish(affine(weights, "1", sinusoidal(t, first.shape[1], first.dtype))))


def diffusion_mlp(weights: Weights, kwargs: Mapping[str, Any], x: Tensor, t: Tensor, state: Tensor) -> Tensor:
    """Noise prediction; x [B,H,A], t [B], state [B,To,O]."""
    hidden = kwargs.get("activation_type", "Mish")
    condition = state.flatten(1)
    encoder = below(weights, "cond_mlp")
    if encoder:
        condition = mlp(encoder, condition, hidden)
    time = embedded_time(below(weights, "time_embedding"), t)
    joint = torch.cat([x.flatten(1), time, condition], -1)
    out = either_mlp(below(weights, "mlp_mean"), joint, hidden, kwargs.get("out_activation_type", "Identity"))
    return out.reshape(x.shape)


def critic(weights: Weights, kwargs: Mapping[str, Any], state: Tensor) -> Tensor:
    """State value [B,1]."""
    return either_mlp(below(weights, "Q1"), state.flatten(1), kwargs.get("activation_type", "Mish"))


def double_critic(weights: Weights, kwargs: Mapping[str, Any], state: Tensor, action: Tensor) -> tuple[Tensor, ...]:
    """Action values, one [B] per network; of stacked networks [M,B]."""
    x = torch.cat([state.flatten(1), action.flatten(1)], -1)
    hidden = kwargs.get("activation_type", "Mish")
    return tuple(either_mlp(below(weights, q), x, hidden)[..., 0] for q in ("Q1", "Q2") if below(weights, q))


def eta(cls: str, weights: Weights, kwargs: Mapping[str, Any], state: Tensor) -> Tensor:
    """DDIM's eta [B,1] or [B,A] of the class named `cls`."""
    defaults = {"EtaStateAction": (1, 1e-3, 2)}.get(cls, (0.5, 0.1, 1.0))
    base, low, high = (kwargs.get(k, d) for k, d in zip(("base_eta", "min_eta", "max_eta"), defaults, strict=True))
    if cls in ("EtaFixed", "EtaAction"):
        value = low + (high - low) * (torch.tanh(weights["eta_logit"]) + 1) / 2
        value = value.expand(len(state), -1)
        return value.detach() if cls == "EtaFixed" else value
    hidden, out = kwargs.get("activation_type", "ReLU"), kwargs.get("out_activation_type", "Identity")
    residual = torch.tanh(mlp(below(weights, "mlp_res"), state.flatten(1), hidden, out))
    return (base + residual).clamp(low, high)


def attended(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    heads: int,
    drop: Callable[[Tensor], Tensor] = lambda weights: weights,
) -> Tensor:
    """Attention, written with index names: batch, positions p asked for and q looked at, heads, features.

    `drop`: dropout of its weights.
    """
    q, k, v = (part.unflatten(-1, (heads, -1)) for part in (queries, keys, values))
    scores = torch.einsum("bphf,bqhf->bhpq", q, k) / q.shape[-1] ** 0.5
    return torch.einsum("bhpq,bqhf->bphf", drop(scores.softmax(-1)), v).flatten(2)
