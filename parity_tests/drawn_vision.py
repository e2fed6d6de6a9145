"""Drawn specifications of networks that see images, and images for them."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import strategies as st

from parity_tests.drawn import Draws, activations, hidden_dims, spec, widths

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
        embed_dim=heads * draw(st.integers(3, 5)),
        num_heads=heads,
        embed_style=style,
        embed_norm=draw(st.integers(0, 1)),
    )
    shape = [channels, height, width]
    return spec(ENCODER, obs_shape=shape, cfg=cfg, num_channel=channels, img_h=height, img_w=width)


@st.composite
def seeing(draw: Any, size: dict[str, int], dense: bool, genuine: bool) -> tuple[dict[str, Any], int]:
    """Arguments of the part that sees, and the length of the image history. `dense`: the spatial embedding may miss."""
    cameras, steps, augment = draw(st.integers(1, 2)), draw(st.integers(1, 2)), draw(st.booleans())
    # the reference fails on a longer history with two cameras (quirk 10)
    history = steps if cameras == 2 and genuine else steps + draw(st.integers(0, 2))
    arguments = {
        "backbone": draw(encoders(3 * steps, square=augment)),  # it augments square images only
        "cond_dim": size["obs_dim"] * size["cond_steps"],
        "img_cond_steps": steps,
        "num_img": cameras,
        "augment": augment,
        "dropout": draw(st.sampled_from([0, 0.3])),
        "spatial_emb": draw(widths) if cameras == 2 or not dense else draw(st.sampled_from([0, 3, 5])),
    }
    if not arguments["spatial_emb"]:
        arguments["visual_feature_dim"] = draw(widths)
    return arguments, history


@st.composite
def networks(draw: Any, size: dict[str, int], kind: str, genuine: bool = False) -> tuple[dict[str, Any], int]:
    """A diffusion network, Gaussian network or critic, and the length of the image history.

    `genuine`, here and below: one that does not crash in the reference.
    """
    arguments, history = draw(seeing(size, kind != CRITIC, genuine))
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
def unet_options(draw: Any, cond_dim: int, genuine: bool, keep_width: bool = False) -> dict[str, Any]:
    """What U-Nets for states and for images have in common; `keep_width`: the state's encoder gives its own width."""
    encoders = [None, [3, cond_dim]] if keep_width else [None, [3, 2], [4, 4, 4, 5]]
    return {
        "diffusion_step_embed_dim": draw(st.sampled_from([4, 6])),
        "dim": 2 * draw(st.integers(1, 2)),
        # the reference fails where the first level is not of width dim
        "dim_mults": draw(st.sampled_from([[1], [1, 1], [1, 2], [1, 2, 1]] + ([] if genuine else [[2, 1], [3]]))),
        "smaller_encoder": draw(st.booleans()),
        "cond_mlp_dims": draw(st.sampled_from(encoders)),
        "kernel_size": draw(st.sampled_from([3, 5])),
        "n_groups": draw(st.sampled_from([None, 1, 2])),
        "activation_type": draw(st.sampled_from(["Mish", "ReLU"])),
        "cond_predict_scale": draw(st.booleans()),
        "groupnorm_eps": draw(st.sampled_from([1e-5, 1e-3])),
    }


def unet_horizon(draw: Any, options: dict[str, Any]) -> int:
    """A horizon that can be halved as often as the U-Net does; with two levels an odd one will do."""
    levels, steps = len(options["dim_mults"]), draw(st.integers(1, 5))
    return steps if levels == 2 else steps * 2 ** (levels - 1)


@st.composite
def unets(draw: Any, size: dict[str, int], genuine: bool = False) -> tuple[dict[str, Any], int]:
    """A U-Net, and the length of the image history. The horizon is `unet_horizon`'s."""
    # quirk 9: the reference's needs the spatial embedding, and an encoder of the state that keeps its width
    arguments, history = draw(seeing(size, not genuine, genuine))
    options = draw(unet_options(arguments["cond_dim"], genuine, keep_width=genuine))
    return spec(UNET, action_dim=size["action_dim"], **arguments, **options), history


def images(specification: dict[str, Any], draws: Draws, batch: int, history: int) -> np.ndarray:
    """Bytes [B,To,C,Hi,Wi] with the cameras' channels one after another."""
    kwargs = specification["kwargs"]
    height, width = (kwargs["backbone"]["kwargs"][k] for k in ("img_h", "img_w"))
    return draws.integers(256, batch, history, 3 * kwargs["num_img"], height, width).astype(np.uint8)


def observation(
    specification: dict[str, Any], draws: Draws, size: dict[str, int], batch: int, history: int
) -> dict[str, np.ndarray]:
    return {"state": draws.state(size, batch), "rgb": images(specification, draws, batch, history)}
