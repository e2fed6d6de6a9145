"""A drawn call of every network: its specification, and the arguments of its forward pass.

The names are the reference's. `genuine` leaves out what crashes there and works here (quirks.md).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from hypothesis import strategies as st

from parity_tests import drawn, drawn_vision
from parity_tests.drawn import Draws, activations, hidden_dims, spec, widths

Prepare = Callable[[Draws], dict[str, Any]]
Call = tuple[dict[str, Any], Prepare]
Size = dict[str, int]

rates = st.sampled_from([0, 0.3])


def _mlp(draw: Any, size: Size, batch: int, genuine: bool) -> Call:
    dims = draw(st.lists(widths, min_size=2, max_size=5))
    append = draw(st.integers(0, 3))
    layers = sorted(draw(st.sets(st.integers(0, len(dims) - 2), min_size=1))) if append else None
    flags = ("use_layernorm", "use_layernorm_final", "use_drop_final")
    options = {flag: draw(st.booleans()) for flag in flags} | {"dropout": draw(rates)}
    options |= {"activation_type": draw(activations), "out_activation_type": draw(activations)}
    options |= {"append_dim": append, "append_layers": layers}

    def prepare(d: Draws) -> dict[str, Any]:
        return {"x": d.normal(batch, dims[0])} | ({"append": d.normal(batch, append)} if append else {})

    return spec("model.common.mlp.MLP", dim_list=dims, **options), prepare


def _residual_mlp(draw: Any, size: Size, batch: int, genuine: bool) -> Call:
    dims = [draw(st.integers(1, 9)), *draw(hidden_dims(True)), draw(widths)]
    options = {flag: draw(st.booleans()) for flag in ("use_layernorm", "use_layernorm_final")}
    options |= {"activation_type": draw(activations), "out_activation_type": draw(activations)}
    return spec("model.common.mlp.ResidualMLP", dim_list=dims, **options), lambda d: {"x": d.normal(batch, dims[0])}


def _of_state(size: Size, batch: int, *more: str) -> Prepare:
    """Arguments of a network that takes the observation, with a chunk and denoising steps before or an action after."""

    def prepare(d: Draws) -> dict[str, Any]:
        noisy = {"x": d.chunk(size, batch), "time": d.integers(20, batch)} if "noisy" in more else {}
        action = {"action": d.chunk(size, batch)} if "action" in more else {}
        return noisy | {"cond": {"state": d.state(size, batch)}} | action

    return prepare


def _diffusion_mlp(draw: Any, size: Size, batch: int, genuine: bool) -> Call:
    return draw(drawn.diffusion_mlps(size)), _of_state(size, batch, "noisy")


def _unet(draw: Any, size: Size, batch: int, genuine: bool) -> Call:
    options = draw(drawn_vision.unet_options(size["obs_dim"] * size["cond_steps"], genuine))
    size = size | {"horizon_steps": drawn_vision.unet_horizon(draw, options)}
    prepare = unet_times(draw, _of_state(size, batch, "noisy"))
    return spec("model.diffusion.unet.Unet1D", **size_arguments(size, horizon=False), **options), prepare


def unet_times(draw: Any, prepare: Prepare) -> Prepare:
    """U-Nets also take one step for the whole batch, as a number or as a tensor without dimensions."""
    one = draw(st.sampled_from([None, int, np.array]))
    return prepare if one is None else lambda d: (given := prepare(d)) | {"time": one(given["time"][0])}


def size_arguments(size: Size, horizon: bool = True) -> dict[str, int]:
    """The constructor arguments that the sizes give."""
    steps = {"horizon_steps": size["horizon_steps"]} if horizon else {}
    return {"action_dim": size["action_dim"], "cond_dim": size["obs_dim"] * size["cond_steps"]} | steps


def _spread(draw: Any, predicted: bool = True) -> dict[str, Any]:
    fixed = draw(st.sampled_from([0.1, 0.4] + [None] * predicted))
    low, high = draw(st.sampled_from([(0.01, 1.0), (0.2, 0.3)]))  # the second range is often left
    return {
        "fixed_std": fixed,
        "learn_fixed_std": fixed is not None and draw(st.booleans()),
        "std_min": low,
        "std_max": high,
    }


def _gaussian_mlp(draw: Any, size: Size, batch: int, genuine: bool) -> Call:
    residual, options = draw(st.booleans()), _spread(draw)
    # a residual trunk without an output layer has two hidden dimensions more than blocks
    dims = draw(hidden_dims(residual))
    dims = [*dims, dims[0]] if residual and options["fixed_std"] is None else dims
    options |= {
        "mlp_dims": dims,
        "activation_type": draw(activations),
        "tanh_output": draw(st.booleans()),
        "use_layernorm": draw(st.booleans()),
        "residual_style": residual,
        "dropout": 0 if residual else draw(rates),
    }
    return spec("model.common.mlp_gaussian.Gaussian_MLP", **size_arguments(size), **options), _of_state(size, batch)


def _gmm_mlp(draw: Any, size: Size, batch: int, genuine: bool) -> Call:
    residual = draw(st.booleans())
    options = _spread(draw) | {
        "mlp_dims": draw(hidden_dims(residual)),
        "num_modes": draw(st.integers(1, 4)),
        "activation_type": draw(activations),
        "use_layernorm": draw(st.booleans()),
        "residual_style": residual,
    }
    return spec("model.common.mlp_gmm.GMM_MLP", **size_arguments(size), **options), _of_state(size, batch)


def _transformer(kind: str) -> Callable[..., Call]:
    mixture = kind.startswith("GMM")

    def call(draw: Any, size: Size, batch: int, genuine: bool) -> Call:
        heads = draw(st.integers(1, 3))
        options = _spread(draw, predicted=not (mixture and genuine)) | {  # quirk 18
            "transformer_embed_dim": heads * draw(st.integers(3, 5)),
            "transformer_num_heads": heads,
            "transformer_num_layers": draw(st.integers(1, 2)),
            "transformer_activation": draw(st.sampled_from(["gelu", "relu"])),
            "p_drop_emb": draw(st.sampled_from([0.0, 0.1, 0.5])),
            # torch draws the masks of attention's weights where nobody can give them
            "p_drop_attn": 0.0 if genuine else draw(st.sampled_from([0.0, 0.3])),
        }
        options |= {"num_modes": draw(st.integers(1, 4))} if mixture else {}
        return spec(f"model.common.transformer.{kind}", **size_arguments(size), **options), _of_state(size, batch)

    return call


def _critic(draw: Any, size: Size, batch: int, genuine: bool) -> Call:
    return draw(drawn.critics(size)), _of_state(size, batch)


def action_critics(draw: Any, size: Size, double_q: bool) -> dict[str, Any]:
    residual = draw(st.booleans())
    arguments = size_arguments(size)
    arguments["action_steps"] = arguments.pop("horizon_steps")
    return spec(
        "model.common.critic.CriticObsAct",
        **arguments,
        mlp_dims=draw(hidden_dims(residual)),
        activation_type=draw(activations),
        use_layernorm=draw(st.booleans()),
        residual_tyle=residual,
        residual_style=True,  # ignored, as in the reference (quirk 1)
        double_q=double_q,
    )


def _action_critic(draw: Any, size: Size, batch: int, genuine: bool) -> Call:
    return action_critics(draw, size, draw(st.booleans())), _of_state(size, batch, "action")


def _eta(draw: Any, size: Size, batch: int, genuine: bool) -> Call:
    return draw(drawn.etas(size)), _of_state(size, batch)


def _seeing(kind: str) -> Callable[..., Call]:
    def call(draw: Any, size: Size, batch: int, genuine: bool) -> Call:
        if kind == drawn_vision.UNET:
            specification, history = draw(drawn_vision.unets(size, genuine))
            size = size | {"horizon_steps": drawn_vision.unet_horizon(draw, specification["kwargs"])}
        else:
            specification, history = draw(drawn_vision.networks(size, kind, genuine))

        def prepare(d: Draws) -> dict[str, Any]:
            noisy = {"x": d.chunk(size, batch), "time": d.integers(20, batch)} if "diffusion" in kind else {}
            return noisy | {"cond": drawn_vision.observation(specification, d, size, batch, history)}

        return specification, unet_times(draw, prepare) if kind == drawn_vision.UNET else prepare

    return call


def _image_encoder(draw: Any, size: Size, batch: int, genuine: bool) -> Call:
    specification = draw(drawn_vision.encoders(channels=draw(st.integers(1, 4))))
    flatten = {"flatten": True} if draw(st.booleans()) else {}
    shape = (batch, *specification["kwargs"]["obs_shape"])
    return specification, lambda d: {"obs": 255 * d.generator.random(shape, np.float32)} | flatten


def _spatial_emb(draw: Any, size: Size, batch: int, genuine: bool) -> Call:
    sizes = {k: draw(st.integers(1, 6)) for k in ("num_patch", "patch_dim")}
    sizes |= {"proj_dim": draw(widths), "prop_dim": draw(st.integers(0, 4))}

    def prepare(d: Draws) -> dict[str, Any]:
        patches = d.normal(batch, sizes["num_patch"], sizes["patch_dim"])
        return {"feat": patches, "prop": d.normal(batch, sizes["prop_dim"])}

    return spec("model.common.modules.SpatialEmb", **sizes, dropout=draw(st.sampled_from([0, 0.25]))), prepare


def _shifts(draw: Any, size: Size, batch: int, genuine: bool) -> Call:
    side, channels = draw(st.integers(2, 9)), draw(st.integers(1, 3))  # the reference shifts square images only

    def prepare(d: Draws) -> dict[str, Any]:
        return {"x": d.integers(256, batch, channels, side, side).astype(np.float32)}

    return spec("model.common.modules.RandomShiftsAug", pad=draw(st.integers(1, 4))), prepare


KINDS: dict[str, Callable[..., Call]] = {
    "MLP": _mlp,
    "ResidualMLP": _residual_mlp,
    "DiffusionMLP": _diffusion_mlp,
    "VisionDiffusionMLP": _seeing(drawn_vision.NETWORK),
    "Unet1D": _unet,
    "VisionUnet1D": _seeing(drawn_vision.UNET),
    "VitEncoder": _image_encoder,
    "SpatialEmb": _spatial_emb,
    "RandomShiftsAug": _shifts,
    "Gaussian_MLP": _gaussian_mlp,
    "Gaussian_VisionMLP": _seeing(drawn_vision.GAUSSIAN),
    "GMM_MLP": _gmm_mlp,
    "Gaussian_Transformer": _transformer("Gaussian_Transformer"),
    "GMM_Transformer": _transformer("GMM_Transformer"),
    "CriticObs": _critic,
    "CriticObsAct": _action_critic,
    "ViTCritic": _seeing(drawn_vision.CRITIC),
    "Eta": _eta,
}


@st.composite
def calls(draw: Any, kind: str, genuine: bool = False) -> Call:
    """A call of a network of a kind, with a specification and arguments of drawn sizes."""
    fewest = 2 if "Unet" in kind else 1  # torch refuses to normalise a single number
    return KINDS[kind](draw, draw(drawn.sizes()), draw(st.integers(fewest, 5)), genuine)
