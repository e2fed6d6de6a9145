"""Networks that see images, as functions of (weights, recorded arguments, inputs)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from parity_tests.reference import networks
from parity_tests.reference.networks import Weights, affine, below, either_mlp, normalised

Shifts = Sequence[Tensor]


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
    """Self-attention, written with index names: batch, heads, patches p and q, features."""
    parts = affine(weights, "qkv_proj", x).chunk(3, dim=-1)
    q, k, v = (part.unflatten(-1, (heads, -1)) for part in parts)
    scores = torch.einsum("bphf,bqhf->bhpq", q, k) / q.shape[-1] ** 0.5
    return affine(weights, "out_proj", torch.einsum("bhpq,bqhf->bphf", scores.softmax(-1), v).flatten(2))


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


def features(weights: Weights, kwargs: Mapping[str, Any], cond: Mapping[str, Tensor], shifts: Shifts = ()) -> Tensor:
    """Image features and state [B,F+O]; `shifts` [B,2] for each camera, or none."""
    cameras, state = kwargs.get("num_img", 1), cond["state"].flatten(1)
    recent = cond["rgb"][:, -kwargs.get("img_cond_steps", 1) :].to(state.dtype)
    cfg = kwargs["backbone"]["kwargs"].get("cfg", {}).get("kwargs", {})
    found = []
    for i, view in enumerate(recent.chunk(cameras, dim=2)):
        view = view.flatten(1, 2)
        view = shifted(view, shifts[i]) if len(shifts) else view
        patches = vit(below(weights, "backbone"), cfg, view)
        compress = below(weights, "compress" if cameras == 1 else f"compress{i + 1}")
        if "weight" in compress:
            found.append(spatial_emb(compress, patches, state))
        else:
            found.append(F.relu(normalised(compress, "1", affine(compress, "0", patches.flatten(1)), 1e-5)))
    return torch.cat([*found, state], -1)


def diffusion_mlp(weights: Weights, kwargs: Mapping[str, Any], x: Tensor, t: Tensor, seen: Tensor) -> Tensor:
    """Noise prediction from encoded observations `seen`."""
    own = {k: v for k, v in weights.items() if k.startswith(("time_embedding.", "mlp_mean."))}
    return networks.diffusion_mlp(own, kwargs, x, t, seen)


def gaussian_mlp(weights: Weights, kwargs: Mapping[str, Any], seen: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation [B,H*A]."""
    hidden = kwargs.get("activation_type", "Mish")
    mean = either_mlp(below(weights, "mlp_mean"), seen, hidden).tanh()
    if "logvar" in weights:
        logvar = weights["logvar"].repeat(kwargs["horizon_steps"]).expand_as(mean)
    elif kwargs.get("fixed_std") is not None:
        return mean, torch.full_like(mean, kwargs["fixed_std"])
    else:
        logvar = either_mlp(below(weights, "mlp_logvar"), seen, hidden)
    return mean, (0.5 * logvar.clamp(weights["logvar_min"], weights["logvar_max"])).exp()
