"""Diffuser's networks, losses and guided steps, as functions of (weights, inputs): Janner et al. 2022.

Trajectories are [B,H,D], actions first; inside the networks they are [B,C,H].
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from parity_tests.reference.networks import Weights, affine, below, embedded_time

Tables = Mapping[str, Tensor]
Conditions = Mapping[int, Tensor]
GROUPS = 8


def unet(weights: Weights, x: Tensor, t: Tensor) -> Tensor:
    """Noise or clean trajectory [B,H,D]; t [B]."""
    time, x, skips = embedded_time(below(weights, "time_mlp"), t), x.mT, []
    levels = 1 + max(int(name.split(".")[1]) for name in weights if name.startswith("downs."))

    def stage(name: str, x: Tensor) -> Tensor:
        for i in range(2):
            x = temporal_block(below(weights, f"{name}.{i}"), x, time)
        return attended(below(weights, f"{name}.2"), x)

    for level in range(levels):
        x = stage(f"downs.{level}", x)
        skips.append(x)
        if level < levels - 1:
            x = halved(weights, f"downs.{level}.3.conv", x)
    x = temporal_block(below(weights, "mid_block1"), x, time)
    x = temporal_block(below(weights, "mid_block2"), attended(below(weights, "mid_attn"), x), time)
    for level in range(levels - 1):
        x = stage(f"ups.{level}", torch.cat([x, skips.pop()], 1))
        name = f"ups.{level}.3.conv"
        x = F.conv_transpose1d(x, weights[name + ".weight"], weights[name + ".bias"], stride=2, padding=1)
    x = block(below(weights, "final_conv.0"), x)
    return F.conv1d(x, weights["final_conv.1.weight"], weights["final_conv.1.bias"]).mT


def value(weights: Weights, x: Tensor, t: Tensor) -> Tensor:
    """Return of noisy trajectories, [B]."""
    time, x = embedded_time(below(weights, "time_mlp"), t), x.mT
    for level in range(1 + max(int(name.split(".")[1]) for name in weights if name.startswith("blocks."))):
        for i in range(2):
            x = temporal_block(below(weights, f"blocks.{level}.{i}"), x, time)
        x = halved(weights, f"blocks.{level}.2.conv", x)
    for i in (1, 2):
        x = halved(weights, f"mid_down{i}.conv", temporal_block(below(weights, f"mid_block{i}"), x, time))
    hidden = affine(weights, "final_block.0", torch.cat([x.flatten(1), time], -1))
    return affine(weights, "final_block.2", F.mish(hidden))[:, 0]


def temporal_block(weights: Weights, x: Tensor, time: Tensor) -> Tensor:
    """Two convolutions with a skip, the embedded time added in between."""
    h = block(below(weights, "blocks.0"), x) + affine(weights, "time_mlp.1", F.mish(time))[..., None]
    if "residual_conv.weight" in weights:
        x = F.conv1d(x, weights["residual_conv.weight"], weights["residual_conv.bias"])
    return block(below(weights, "blocks.1"), h) + x


def block(weights: Weights, x: Tensor) -> Tensor:
    """Convolution, normalisation of groups of channels, Mish."""
    x = F.conv1d(x, weights["block.0.weight"], weights["block.0.bias"], padding="same")
    return F.mish(F.group_norm(x, GROUPS, weights["block.2.weight"], weights["block.2.bias"]))


def halved(weights: Weights, name: str, x: Tensor) -> Tensor:
    return F.conv1d(x, weights[name + ".weight"], weights[name + ".bias"], stride=2, padding=1)


def attended(weights: Weights, x: Tensor, heads: int = 4) -> Tensor:
    """Linear attention over time with a skip; nothing where there are no weights of it."""
    if not weights:
        return x
    seen = F.layer_norm(x.mT, x.shape[1:2]).mT * weights["fn.norm.g"] + weights["fn.norm.b"]
    q, k, v = F.conv1d(seen, weights["fn.fn.to_qkv.weight"]).unflatten(1, (3, heads, -1)).unbind(1)
    context = torch.einsum("bhdn,bhen->bhde", k.softmax(-1), v)
    out = torch.einsum("bhde,bhdn->bhen", context, q / q.shape[2] ** 0.5).flatten(1, 2)
    return x + F.conv1d(out, weights["fn.fn.to_out.weight"], weights["fn.fn.to_out.bias"])


def put(x: Tensor, conditions: Conditions, action_dim: int) -> Tensor:
    """The observations at the given times in place."""
    x = x.clone()
    for t, observation in conditions.items():
        x[:, t, action_dim:] = observation
    return x


def noisy(tables: Tables, x: Tensor, t: Tensor, noise: Tensor) -> Tensor:
    signal, rest = (tables[name][t][:, None, None] for name in ("sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod"))
    return signal * x + rest * noise


def loss(
    weights: Weights,
    tables: Tables,
    by_entry: Tensor,
    x: Tensor,
    conditions: Conditions,
    t: Tensor,
    noise: Tensor,
    action_dim: int,
    predict_epsilon: bool,
) -> Tensor:
    """Weighted squared error of the noise, or of the clean trajectory with the known entries in place."""
    output = unet(weights, put(noisy(tables, x, t, noise), conditions, action_dim), t)
    target = noise if predict_epsilon else x
    output = output if predict_epsilon else put(output, conditions, action_dim)
    return ((output - target) ** 2 * by_entry).mean()


def guided_step(
    weights: Weights,
    tables: Tables,
    score: Callable[[Tensor, Tensor], Tensor],
    x: Tensor,
    conditions: Conditions,
    t: Tensor,
    noise: Tensor,
    action_dim: int,
    *,
    scale: float,
    n_guide_steps: int,
    t_stopgrad: int,
    scale_grad_by_std: bool,
) -> tuple[Tensor, Tensor]:
    """x_{t-1} of a network that predicts clean trajectories, and the values before the last move along the gradient."""
    log_variance = tables["ddpm_logvar_clipped"][t][:, None, None]
    values = torch.zeros(len(x), dtype=x.dtype)
    for _ in range(n_guide_steps):
        x = x.detach().requires_grad_()
        values = score(x, t)
        (direction,) = torch.autograd.grad(values.sum(), x)
        direction = direction * log_variance.exp() if scale_grad_by_std else direction
        direction = torch.where((t < t_stopgrad)[:, None, None], torch.zeros(()), direction)
        x = put(x.detach() + scale * direction, conditions, action_dim)
    coefficients = [tables[name][t][:, None, None] for name in ("ddpm_mu_coef1", "ddpm_mu_coef2")]
    mean = coefficients[0] * unet(weights, x, t) + coefficients[1] * x
    drawn = torch.where((t == 0)[:, None, None], torch.zeros(()), noise)
    return mean + (0.5 * log_variance).exp() * drawn, values.detach()
