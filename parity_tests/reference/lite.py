"""DiffuserLite's transformer, flow loss, Euler sampling and updates, as functions of (weights, inputs)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from parity_tests.reference.networks import Weights, affine, below


def dit(weights: Weights, x: Tensor, t: Tensor, condition: Tensor | None, heads: int) -> Tensor:
    """Velocity [B,H,O] of states x at times t [B]; condition [B,E]."""
    time = below(weights, "map_noise")
    angles = 2 * math.pi * t[:, None] * time["freqs"]
    embedded = affine(time, "mlp.0", torch.cat([angles.cos(), angles.sin()], 1))
    embedded = affine(time, "mlp.2", F.mish(embedded))
    embedded = embedded if condition is None else embedded + condition
    embedded = F.mish(affine(weights, "map_emb.2", F.mish(affine(weights, "map_emb.0", embedded))))
    x = affine(weights, "x_proj", x) + positions(x.shape[1], weights["x_proj.bias"])
    for i in range(1 + max(int(name.split(".")[1]) for name in weights if name.startswith("blocks."))):
        x = block(below(weights, f"blocks.{i}"), x, embedded, heads)
    last = below(weights, "final_layer")
    shift, scale = affine(last, "adaLN_modulation.1", F.silu(embedded))[:, None].chunk(2, -1)
    return affine(last, "linear", modulated(x, shift, scale))


def positions(length: int, like: Tensor) -> Tensor:
    """Sine and cosine of the position in one column each; elsewhere those of zero."""
    half = torch.zeros(length, len(like) // 2, dtype=like.dtype)
    half[:, 0] = torch.arange(length, dtype=like.dtype)
    return torch.cat([half.sin(), half.cos()], 1)


def modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift


def block(weights: Weights, x: Tensor, embedded: Tensor, heads: int) -> Tensor:
    """The block whose attention is added to its own input."""
    parts = affine(weights, "adaLN_modulation.1", F.silu(embedded))[:, None].chunk(6, -1)
    shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = parts
    x = modulated(x, shift_1, scale_1)
    projected = F.linear(x, weights["attn.in_proj_weight"], weights["attn.in_proj_bias"])
    split = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in projected.chunk(3, -1))
    mixed = F.scaled_dot_product_attention(*split).transpose(1, 2).flatten(2)
    x = x + gate_1 * affine(weights, "attn.out_proj", mixed)
    hidden = F.gelu(affine(weights, "mlp.0", modulated(x, shift_2, scale_2)), approximate="tanh")
    return x + gate_2 * affine(weights, "mlp.3", hidden)


def embedded_return(weights: Weights, condition: Tensor) -> Tensor:
    """[B,1] -> [B,E]"""
    return affine(weights, "mlp.mlp.1", F.leaky_relu(affine(weights, "mlp.mlp.0.0", condition)))


def velocity(weights: Weights, x: Tensor, t: Tensor, condition: Tensor | None, keep: Tensor, heads: int) -> Tensor:
    """Of the whole network of a level."""
    told = None if condition is None else embedded_return(below(weights, "condition"), condition) * keep[:, None]
    return dit(below(weights, "diffusion"), x, t, told, heads)


def loss(
    weights: Weights,
    x0: Tensor,
    x1: Tensor,
    t: Tensor,
    condition: Tensor | None,
    keep: Tensor,
    mask: Tensor,
    by_entry: Tensor,
    heads: int,
) -> Tensor:
    """Of rectified flow, with known entries [H,O]."""
    x = x0 + t[:, None, None] * (x1 - x0)
    x = x * (1 - mask) + x0 * mask
    return ((velocity(weights, x, t, condition, keep, heads) - (x0 - x1)) ** 2 * by_entry * (1 - mask)).mean()


def grid(steps: int) -> list[float]:
    return [(k / steps) ** 1.5 for k in range(steps + 1)]


def sample(
    weights: Weights, x: Tensor, known: Tensor, mask: Tensor, steps: int, condition: Tensor, guidance: float, heads: int
) -> Tensor:
    """Euler's method from noise x; both models are evaluated whatever the guidance."""
    times, keep = grid(steps), torch.ones(len(x), dtype=x.dtype)
    x = x * (1 - mask) + known * mask
    for k in range(steps, 0, -1):
        t = torch.full((len(x),), times[k], dtype=x.dtype)
        told = velocity(weights, x, t, condition, keep, heads)
        untold = velocity(weights, x, t, None, keep, heads)
        x = x + (times[k] - times[k - 1]) * (guidance * told + (1 - guidance) * untold)
        x = x * (1 - mask) + known * mask
    return x
