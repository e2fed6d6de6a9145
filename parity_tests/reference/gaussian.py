"""Gaussian and mixture policy networks, as functions of (weights, recorded arguments, inputs).

They give means and standard deviations [B,H*A], or [B,M,H*A] and the modes' logits [B,M].
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from parity_tests.reference.networks import (
    Draw,
    Weights,
    affine,
    attended,
    below,
    dropped,
    either_mlp,
    mlp,
    normalised,
    nothing_drawn,
)

Kwargs = Mapping[str, Any]


def deviation(weights: Weights, kwargs: Kwargs, mean: Tensor, predicted: Tensor | None) -> Tensor:
    """The standard deviation in the shape of the mean: learned per action, fixed, or exp of what is predicted."""
    if "logvar" in weights:
        per_action = weights["logvar"].unflatten(0, (*mean.shape[1:-1], -1))
        predicted = torch.cat([per_action] * kwargs["horizon_steps"], -1).expand_as(mean)
    elif kwargs.get("fixed_std") is not None:
        return torch.full_like(mean, kwargs["fixed_std"])
    return (predicted.clamp(weights["logvar_min"], weights["logvar_max"]) / 2).exp()


def gaussian_mlp(weights: Weights, kwargs: Kwargs, state: Tensor, draw: Draw = nothing_drawn) -> tuple[Tensor, ...]:
    """A trunk with two heads, or a network for the mean alone; a predicted log-variance is squashed into its range."""
    hidden, rate = kwargs.get("activation_type", "Mish"), kwargs.get("dropout", 0)

    def body(name: str, out: str) -> Tensor:
        part = below(weights, name)
        if rate:
            return mlp(part, state.flatten(1), hidden, out, rate=rate, draw=draw)
        return either_mlp(part, state.flatten(1), hidden, out)

    squash = torch.tanh if kwargs.get("tanh_output", True) else lambda x: x
    if kwargs.get("fixed_std") is not None:
        mean = squash(body("mlp_mean", "Identity"))
        return mean, deviation(weights, kwargs, mean, None)
    trunk = body("mlp_base", hidden)
    mean, raw = (mlp(below(weights, head), trunk, "Identity") for head in ("mlp_mean", "mlp_logvar"))
    low, high = weights["logvar_min"], weights["logvar_max"]
    return squash(mean), (0.5 * (low + (high - low) * (raw.tanh() + 1) / 2)).exp()


def gaussian_vision_mlp(weights: Weights, kwargs: Kwargs, seen: Tensor) -> tuple[Tensor, ...]:
    """From encoded observations; a predicted log-variance has a network of its own and is clamped."""
    hidden = kwargs.get("activation_type", "Mish")
    mean = either_mlp(below(weights, "mlp_mean"), seen, hidden).tanh()
    own = below(weights, "mlp_logvar")
    return mean, deviation(weights, kwargs, mean, either_mlp(own, seen, hidden) if own else None)


def gmm_mlp(weights: Weights, kwargs: Kwargs, state: Tensor) -> tuple[Tensor, ...]:
    """Three separate networks."""
    hidden, modes = kwargs.get("activation_type", "Mish"), kwargs.get("num_modes", 5)

    def network(name: str) -> Tensor:
        return either_mlp(below(weights, name), state.flatten(1), hidden)

    mean = network("mlp_mean").unflatten(1, (modes, -1)).tanh()
    predicted = network("mlp_logvar").unflatten(1, (modes, -1)) if below(weights, "mlp_logvar") else None
    return mean, deviation(weights, kwargs, mean, predicted), network("mlp_weights")


def transformer_policy(
    weights: Weights, kwargs: Kwargs, state: Tensor, draw: Draw = nothing_drawn
) -> tuple[Tensor, ...]:
    """Outputs of every step are [mean, log-variance], each [modes, actions]."""
    out, features = transformer(below(weights, "transformer"), kwargs, state.flatten(1), draw)
    modes = kwargs.get("num_modes", 5) if "modes_head.weight" in weights else 1
    out = out.unflatten(-1, (-1, modes, kwargs["action_dim"])).permute(2, 0, 3, 1, 4).flatten(3)  # [1 or 2,B,M,H*A]
    mean, predicted = out[0].tanh(), out[1] if len(out) == 2 else None
    if "modes_head.weight" not in weights:
        mean, predicted = mean[:, 0], None if predicted is None else predicted[:, 0]
        return mean, deviation(weights, kwargs, mean, predicted)
    return mean, deviation(weights, kwargs, mean, predicted), affine(weights, "modes_head", features.flatten(1))


def transformer(weights: Weights, kwargs: Kwargs, state: Tensor, draw: Draw) -> tuple[Tensor, Tensor]:
    """Position embeddings, decoder layers that look at the embedded state, LayerNorm; with and without the head.

    Dropout acts on both embeddings, and at another rate inside the layers: on the weights of each attention, on the
    hidden features, and on what each part adds.
    """
    embedded, rate = kwargs.get("p_drop_emb", 0), kwargs.get("p_drop_attn", 0)
    memory = affine(weights, "cond_obs_emb", state[:, None]) + weights["cond_pos_emb"]
    memory = dropped(memory, embedded, draw)
    memory = affine(weights, "encoder.2", F.mish(affine(weights, "encoder.0", memory)))
    heads, act = kwargs["transformer_num_heads"], getattr(F, kwargs.get("transformer_activation", "gelu"))
    x = dropped(weights["pos_emb"].expand(len(state), -1, -1), embedded, draw)
    for i in range(kwargs["transformer_num_layers"]):
        layer = below(weights, f"decoder.layers.{i}")

        def drop(values: Tensor) -> Tensor:
            return dropped(values, rate, draw)

        inner = normalised(layer, "norm1", x, 1e-5)
        x = x + drop(attention(below(layer, "self_attn"), heads, inner, inner, drop))
        inner = normalised(layer, "norm2", x, 1e-5)
        x = x + drop(attention(below(layer, "multihead_attn"), heads, inner, memory, drop))
        hidden = drop(act(affine(layer, "linear1", normalised(layer, "norm3", x, 1e-5))))
        x = x + drop(affine(layer, "linear2", hidden))
    features = normalised(weights, "ln_f", x, 1e-5)
    return affine(weights, "head", features), features


def attention(weights: Weights, heads: int, asking: Tensor, memory: Tensor, drop: Callable[[Tensor], Tensor]) -> Tensor:
    """Attention of one sequence to another; the projections of queries, keys and values are stacked."""
    kernels, offsets = weights["in_proj_weight"].chunk(3), weights["in_proj_bias"].chunk(3)
    parts = [x @ w.T + b for x, w, b in zip((asking, memory, memory), kernels, offsets, strict=True)]
    return affine(weights, "out_proj", attended(*parts, heads, drop))
