"""Drawn specifications of networks that see images, and images for them."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import strategies as st

from parity_tests.drawn import Draws, activations, hidden_dims, spec

ENCODER = "model.common.vit.VitEncoder"
ENCODER_CONFIG = "model.common.vit.VitEncoderConfig"
NETWORK = "model.diffusion.mlp_diffusion.VisionDiffusionMLP"
GAUSSIAN = "model.common.mlp_gaussian.Gaussian_VisionMLP"
CRITIC = "model.common.critic.ViTCritic"
UNET = "model.diffusion.unet.VisionUnet1D"


@st.composite
def encoders(draw: Any, channels: int = 3, square: bool = False) -> dict[str, Any]:
    """An image encoder with either patch embedding."""
    style, heads = draw(st.sampled_from(["embed1", "embed2"])), draw(st.integers(1, 3))
    height = draw(st.sampled_from([16, 24, 32]))
    width = height if square else draw(st.sampled_from([16, 24, 32]))
    cfg = spec(
        ENCODER_CONFIG,
        depth=draw(st.integers(1, 2)),
        embed_dim=heads * draw(st.integers(1, 4)),
        num_heads=heads,
        embed_style=style,
        embed_norm=draw(st.integers(0, 1)),
    )
    shape = [channels, height, width]
    return spec(ENCODER, obs_shape=shape, cfg=cfg, num_channel=channels, img_h=height, img_w=width)


@st.composite
def seeing(draw: Any, size: dict[str, int], dense: bool = True) -> tuple[dict[str, Any], int]:
    """Arguments of the part that sees, and the length of the image history."""
    cameras, steps, augment = draw(st.integers(1, 2)), draw(st.integers(1, 2)), draw(st.booleans())
    # the reference fails on a longer history with two cameras (quirk 10)
    history = steps if cameras == 2 else steps + draw(st.integers(0, 2))
    arguments = {
        "backbone": draw(encoders(3 * steps, square=augment)),  # it augments square images only
        "cond_dim": size["obs_dim"] * size["cond_steps"],
        "img_cond_steps": steps,
        "num_img": cameras,
        "augment": augment,
        "dropout": draw(st.sampled_from([0, 0.3])),
        "spatial_emb": draw(st.integers(2, 6)) if cameras == 2 or not dense else draw(st.sampled_from([0, 2, 5])),
    }
    if not arguments["spatial_emb"]:
        arguments["visual_feature_dim"] = draw(st.integers(1, 6))
    return arguments, history


@st.composite
def networks(draw: Any, size: dict[str, int], kind: str = NETWORK) -> tuple[dict[str, Any], int]:
    """A diffusion network, Gaussian network or critic, and the length of the image history."""
    arguments, history = draw(seeing(size, dense=kind != CRITIC))
    residual = draw(st.booleans())
    arguments |= {
        "mlp_dims": draw(hidden_dims(residual)),
        "activation_type": draw(activations),
        "use_layernorm": draw(st.booleans()),
        "residual_style": residual,
    }
    if kind != CRITIC:
        arguments |= {k: size[k] for k in ("action_dim", "horizon_steps")}
    if kind == NETWORK:
        arguments["time_dim"] = draw(st.sampled_from([4, 6, 16]))
    if kind == GAUSSIAN:
        arguments["fixed_std"] = draw(st.sampled_from([None, 0.1]))
        arguments["learn_fixed_std"] = arguments["fixed_std"] is not None and draw(st.booleans())
    return spec(kind, **arguments), history


@st.composite
def unets(draw: Any, size: dict[str, int]) -> tuple[dict[str, Any], int]:
    """A U-Net, and the length of the image history. The horizon must be even."""
    arguments, history = draw(seeing(size, dense=False))  # the reference's needs the spatial embedding (quirk 9)
    groups = draw(st.sampled_from([None, 1, 2]))
    arguments |= {
        "action_dim": size["action_dim"],
        "diffusion_step_embed_dim": draw(st.sampled_from([4, 6])),
        "dim": 2 * draw(st.integers(1, 2)),
        "dim_mults": draw(st.sampled_from([[1], [1, 1], [1, 2]])),
        "smaller_encoder": draw(st.booleans()),
        # and an encoder of the state that keeps its width
        "cond_mlp_dims": draw(st.sampled_from([None, [3, arguments["cond_dim"]]])),
        "kernel_size": draw(st.sampled_from([3, 5])),
        "n_groups": groups,
        "activation_type": draw(st.sampled_from(["Mish", "ReLU"])),
        "cond_predict_scale": draw(st.booleans()),
    }
    return spec(UNET, **arguments), history


def images(specification: dict[str, Any], draws: Draws, batch: int, history: int) -> np.ndarray:
    """Bytes [B,To,C,Hi,Wi] with the cameras' channels one after another."""
    kwargs = specification["kwargs"]
    height, width = (kwargs["backbone"]["kwargs"][k] for k in ("img_h", "img_w"))
    return draws.integers(256, batch, history, 3 * kwargs["num_img"], height, width).astype(np.uint8)


def observation(
    specification: dict[str, Any], draws: Draws, size: dict[str, int], batch: int, history: int
) -> dict[str, np.ndarray]:
    return {"state": draws.state(size, batch), "rgb": images(specification, draws, batch, history)}
