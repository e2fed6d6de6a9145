"""Networks that see images, as functions of (weights, recorded arguments, inputs)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from parity_tests.reference import networks
from parity_tests.reference.networks import Draw, Weights, affine, attended, below, dropped, normalised, nothing_drawn


def vit(weights: Weights, cfg: Mapping[str, Any], pixels: Tensor) -> Tensor:
    """Patch features [B,P,D] of images [B,C,H,W]."""
    x = pixels / 255.0 - 0.5
    embed = below(weights, "vit.patch_embed")
    if "conv.weight" in embed:
        x = F.conv2d(x, embed["conv.weight"], embed["conv.bias"], stride=8)
    else:
        x = F.conv2d(x, embed["embed.0.weight"], embed["embed.0.bias"], stride=4)
        if "embed.1.weight" in embed:
            x = F.instance_norm(x, weight=embed["embed.1.weight"], bias=embed["embed.1.bias"])
        x = F.conv2d(F.relu(x), embed["embed.3.weight"], embed["embed.3.bias"], stride=2)
    x = x.flatten(2).mT + weights["vit.pos_embed"]
    for i in range(cfg.get("depth", 1)):
        block = below(weights, f"vit.net.{i}")
        x = x + attention(below(block, "mha"), cfg.get("num_heads", 4), normalised(block, "layer_norm1", x, 1e-5))
        hidden = affine(block, "linear1", normalised(block, "layer_norm2", x, 1e-5))
        x = x + affine(block, "linear2", F.gelu(hidden))
    return normalised(weights, "vit.norm", x, 1e-5)


def attention(weights: Weights, heads: int, x: Tensor) -> Tensor:
    """Self-attention; one projection gives queries, keys and values."""
    return affine(weights, "out_proj", attended(*affine(weights, "qkv_proj", x).chunk(3, dim=-1), heads))


def spatial_emb(weights: Weights, features: Tensor, state: Tensor) -> Tensor:
    """[B,P,D] and [B,O] -> one vector."""
    channels = features.mT
    if weights["input_proj.0.weight"].shape[1] > channels.shape[-1]:
        channels = torch.cat([channels, state[:, None].expand(-1, channels.shape[1], -1)], -1)
    y = F.relu(normalised(weights, "input_proj.1", affine(weights, "input_proj.0", channels), 1e-5))
    return (weights["weight"] * y).sum(1)


def shifted(images: Tensor, shifts: Tensor, pad: int = 4) -> Tensor:
    """Crops of the images padded by replication; shifts [B,2] (x, y)."""
    height, width = images.shape[2:]
    padded = F.pad(images, (pad,) * 4, mode="replicate")
    pairs = zip(padded, shifts.tolist(), strict=True)
    return torch.stack([image[:, y : y + height, x : x + width] for image, (x, y) in pairs])


def features(
    weights: Weights, kwargs: Mapping[str, Any], cond: Mapping[str, Any], draw: Draw = nothing_drawn
) -> Tensor:
    """Image features and state [B,F+O]. Every camera's images are shifted first, then come the masks of dropout."""
    cameras, state, rate = kwargs.get("num_img", 1), cond["state"].flatten(1), kwargs.get("dropout", 0)
    recent = cond["rgb"][:, -kwargs.get("img_cond_steps", 1) :].to(state.dtype)
    cfg = kwargs["backbone"]["kwargs"].get("cfg", {}).get("kwargs", {})
    views = [view.flatten(1, 2) for view in recent.chunk(cameras, dim=2)]
    for i, view in enumerate(views):
        shifts = draw("torch.randint", (len(view), 1, 1, 2), 9) if kwargs.get("augment") else None
        views[i] = view if shifts is None else shifted(view, shifts.flatten(1))
    patches = [vit(below(weights, "backbone"), cfg, view) for view in views]
    found = []
    for i, patch in enumerate(patches):
        compress = below(weights, "compress" if cameras == 1 else f"compress{i + 1}")
        if "weight" in compress:
            found.append(dropped(spatial_emb(compress, patch, state), rate, draw))
        else:
            flat = normalised(compress, "1", affine(compress, "0", patch.flatten(1)), 1e-5)
            found.append(F.relu(dropped(flat, rate, draw)))
    return torch.cat([*found, state], -1)


def diffusion_mlp(weights: Weights, kwargs: Mapping[str, Any], x: Tensor, t: Tensor, seen: Tensor) -> Tensor:
    """Noise prediction from encoded observations `seen`."""
    own = {k: v for k, v in weights.items() if k.startswith(("time_embedding.", "mlp_mean."))}
    return networks.diffusion_mlp(own, kwargs, x, t, seen)
