"""The U-Net over action chunks, as a function of (weights, recorded arguments, inputs): Janner et al. 2022, FiLM."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from parity_tests.reference.networks import ACTIVATIONS, Weights, affine, below, embedded_time, residual_mlp


def unet(weights: Weights, kwargs: Mapping[str, Any], x: Tensor, t: Tensor | int, condition: Tensor) -> Tensor:
    """Noise prediction; x [B,H,A], t [B] or one for all, condition: the state [B,To,O], or encoded observations
    [B,F]."""
    time = embedded_time(below(weights, "time_mlp"), torch.as_tensor(t).expand(len(x)))
    seen = torch.cat([time, encoded_state(weights, kwargs, condition)], -1)

    def blocks(name: str, x: Tensor) -> Tensor:
        for i in range(2):
            x = film_block(below(weights, f"{name}.{i}"), kwargs, x, seen)
        return x

    x, skips, levels = x.mT, [], len(kwargs.get("dim_mults", (1, 2, 4, 8)))
    for level in range(levels):
        x = blocks(f"down_modules.{level}", x)
        skips.append(x)
        if level < levels - 1:
            name = f"down_modules.{level}.2.conv"
            x = F.conv1d(x, weights[name + ".weight"], weights[name + ".bias"], stride=2, padding=1)
    x = blocks("mid_modules", x)
    for level in range(levels - 1):
        x = blocks(f"up_modules.{level}", torch.cat([x, skips.pop()], 1))
        name = f"up_modules.{level}.2.conv"
        x = F.conv_transpose1d(x, weights[name + ".weight"], weights[name + ".bias"], stride=2, padding=1)
    x = conv_block(below(weights, "final_conv.0"), kwargs, x)
    return F.conv1d(x, weights["final_conv.1.weight"], weights["final_conv.1.bias"]).mT


def encoded_state(weights: Weights, kwargs: Mapping[str, Any], state: Tensor) -> Tensor:
    """The state through its residual MLP, if there is one."""
    encoder = below(weights, "cond_mlp")
    return residual_mlp(encoder, state.flatten(1), _hidden(kwargs)) if encoder else state.flatten(1)


def film_block(weights: Weights, kwargs: Mapping[str, Any], x: Tensor, seen: Tensor) -> Tensor:
    """Two convolutions with a skip; between them the condition scales and shifts the channels, or shifts them."""
    act = ACTIVATIONS[_hidden(kwargs)]
    if "cond_encoder.4.weight" in weights:
        film = act(affine(weights, "cond_encoder.2", act(affine(weights, "cond_encoder.0", seen))))
        film = affine(weights, "cond_encoder.4", film)
    else:
        film = affine(weights, "cond_encoder.1", act(seen))
    h = conv_block(below(weights, "blocks.0"), kwargs, x)
    if kwargs.get("cond_predict_scale"):
        scale, shift = film[..., None].chunk(2, dim=1)
        h = scale * h + shift
    else:
        h = h + film[..., None]
    if "residual_conv.weight" in weights:
        x = F.conv1d(x, weights["residual_conv.weight"], weights["residual_conv.bias"])
    return conv_block(below(weights, "blocks.1"), kwargs, h) + x


def conv_block(weights: Weights, kwargs: Mapping[str, Any], x: Tensor) -> Tensor:
    """Convolution, normalisation of groups of channels, activation."""
    x = F.conv1d(x, weights["block.0.weight"], weights["block.0.bias"], padding="same")
    if "block.2.weight" in weights:
        eps = kwargs.get("groupnorm_eps", 1e-5)
        x = F.group_norm(x, kwargs["n_groups"], weights["block.2.weight"], weights["block.2.bias"], eps)
    return ACTIVATIONS[_hidden(kwargs)](x)


def _hidden(kwargs: Mapping[str, Any]) -> str:
    return kwargs.get("activation_type", "Mish")
