"""Every network's twin by its class in the reference, and its recording in the format of the golden files."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from parity_tests.reference import gaussian, networks, unet, vision
from parity_tests.reference.networks import Draw, Weights
from parity_tests.replay.files import Golden

Kwargs = Mapping[str, Any]
Arguments = Mapping[str, Any]


def _state(arguments: Arguments) -> Tensor:
    return arguments["cond"]["state"]


def _mlp(weights: Weights, kwargs: Kwargs, a: Arguments, draw: Draw) -> Tensor:
    hidden, out = kwargs.get("activation_type", "Tanh"), kwargs.get("out_activation_type", "Identity")
    appended = a.get("append"), tuple(kwargs.get("append_layers") or ())
    rate, last = kwargs.get("dropout", 0), kwargs.get("use_drop_final", False)
    return networks.mlp(weights, a["x"], hidden, out, *appended, rate, last, draw)


def _residual_mlp(weights: Weights, kwargs: Kwargs, a: Arguments, draw: Draw) -> Tensor:
    hidden, out = kwargs.get("activation_type", "Mish"), kwargs.get("out_activation_type", "Identity")
    return networks.residual_mlp(weights, a["x"], hidden, out)


def _encoder(weights: Weights, kwargs: Kwargs, a: Arguments, draw: Draw) -> Tensor:
    patches = vision.vit(weights, kwargs["cfg"]["kwargs"], a["obs"])
    return patches.flatten(1) if a.get("flatten") else patches


def _spatial_emb(weights: Weights, kwargs: Kwargs, a: Arguments, draw: Draw) -> Tensor:
    return networks.dropped(vision.spatial_emb(weights, a["feat"], a["prop"]), kwargs["dropout"], draw)


def _shifts(weights: Weights, kwargs: Kwargs, a: Arguments, draw: Draw) -> Tensor:
    pad = kwargs["pad"]
    return vision.shifted(a["x"], draw("torch.randint", (len(a["x"]), 1, 1, 2), 2 * pad + 1).flatten(1), pad)


def _vision_mlp(weights: Weights, kwargs: Kwargs, a: Arguments, draw: Draw) -> Tensor:
    return vision.diffusion_mlp(weights, kwargs, a["x"], a["time"], vision.features(weights, kwargs, a["cond"], draw))


def _vision_unet(weights: Weights, kwargs: Kwargs, a: Arguments, draw: Draw) -> Tensor:
    """What joins the patches is the state that comes out of its encoder; it is encoded once."""
    encoded = unet.encoded_state(weights, kwargs, _state(a))
    seen = vision.features(weights, kwargs, a["cond"] | {"state": encoded}, draw)
    own = {k: v for k, v in weights.items() if not k.startswith("cond_mlp.")}
    return unet.unet(own, kwargs, a["x"], a["time"], seen)


def _eta(kind: str) -> Callable[..., Tensor]:
    return lambda weights, kwargs, a, draw: networks.eta(kind, weights, kwargs, _state(a))


# class in the reference -> twin(weights, kwargs, arguments, draw)
TWINS: dict[str, Callable[[Weights, Kwargs, Arguments, Draw], Tensor | tuple[Tensor, ...]]] = {
    "model.common.mlp.MLP": _mlp,
    "model.common.mlp.ResidualMLP": _residual_mlp,
    "model.common.critic.CriticObs": lambda w, k, a, _: networks.critic(w, k, _state(a)),
    "model.common.critic.CriticObsAct": lambda w, k, a, _: networks.double_critic(w, k, _state(a), a["action"]),
    "model.common.critic.ViTCritic": lambda w, k, a, d: networks.critic(w, k, vision.features(w, k, a["cond"], d)),
    "model.common.modules.SpatialEmb": _spatial_emb,
    "model.common.modules.RandomShiftsAug": _shifts,
    "model.common.vit.VitEncoder": _encoder,
    "model.common.mlp_gaussian.Gaussian_MLP": lambda w, k, a, d: gaussian.gaussian_mlp(w, k, _state(a), d),
    "model.common.mlp_gaussian.Gaussian_VisionMLP": lambda w, k, a, d: gaussian.gaussian_vision_mlp(
        w, k, vision.features(w, k, a["cond"], d)
    ),
    "model.common.mlp_gmm.GMM_MLP": lambda w, k, a, _: gaussian.gmm_mlp(w, k, _state(a)),
    "model.common.transformer.Gaussian_Transformer": lambda w, k, a, d: gaussian.transformer_policy(w, k, _state(a), d),
    "model.common.transformer.GMM_Transformer": lambda w, k, a, d: gaussian.transformer_policy(w, k, _state(a), d),
    "model.diffusion.mlp_diffusion.DiffusionMLP": lambda w, k, a, _: networks.diffusion_mlp(
        w, k, a["x"], a["time"], _state(a)
    ),
    "model.diffusion.mlp_diffusion.VisionDiffusionMLP": _vision_mlp,
    "model.diffusion.unet.Unet1D": lambda w, k, a, _: unet.unet(w, k, a["x"], a["time"], _state(a)),
    "model.diffusion.unet.VisionUnet1D": _vision_unet,
    "model.diffusion.modules.SinusoidalPosEmb": lambda w, k, a, _: networks.sinusoidal(
        a["x"], k["dim"], torch.get_default_dtype()
    ),
    **{f"model.diffusion.eta.{kind}": _eta(kind) for kind in ("EtaFixed", "EtaAction", "EtaState", "EtaStateAction")},
}


def outputs(spec: dict[str, Any], weights: Weights, arguments: Arguments, draw: Draw) -> tuple[Tensor, ...]:
    """The twin's outputs for a specification."""
    out = TWINS[spec["class"]](weights, spec["kwargs"], arguments, draw)
    return out if isinstance(out, tuple) else (out,)


def tensors(value: Any, dtype: torch.dtype) -> Any:
    """Arrays as tensors, those of floating-point numbers in `dtype`; nested dictionaries inside out."""
    if isinstance(value, dict):
        return {k: tensors(v, dtype) for k, v in value.items()}
    if isinstance(value, (np.ndarray, np.generic)):
        tensor = torch.from_numpy(np.array(value))
        return tensor.to(dtype) if tensor.is_floating_point() else tensor
    return value


def playing(draws: list[tuple[str, np.ndarray]], dtype: torch.dtype) -> Draw:
    """Plays recorded draws, as long as they are of the function asked for (an evaluation drew no masks)."""
    left = list(draws)

    def draw(function: str, shape: tuple[int, ...], bound: float) -> Tensor | None:
        return tensors(left.pop(0)[1], dtype) if left and left[0][0] == function else None

    return draw


def recorded(
    spec: dict[str, Any],
    weights: Mapping[str, np.ndarray],
    arguments: dict[str, Any],
    generator: np.random.Generator,
) -> Golden:
    """The twin's outputs, and the gradients of the sum of their mean squares, in both precisions.

    Args:
        weights: float32, under the names of the state_dict.
        arguments: of the call, arrays by name.
        generator: draws shifts and dropout masks.
    """
    kept: list[tuple[str, np.ndarray]] = []

    def first(function: str, shape: tuple[int, ...], bound: float) -> Tensor:
        keep = function == "F.dropout.keep"
        array = generator.random(shape) >= bound if keep else generator.integers(0, int(bound), shape)
        kept.append((function, array))
        return torch.from_numpy(array)

    frozen = [name for name in weights if name.rsplit(".", 1)[-1] in ("logvar_min", "logvar_max")]
    arrays = {"w/" + name: value for name, value in weights.items()}
    meta = {
        "kind": "case", "spec": spec, "class": spec["class"], "target": None, "mode": "train", "loss": "mean_square",
        "method": "__call__" if ".eta." in spec["class"] or spec["class"].endswith("Aug") else "forward",
        "arg_names": list(arguments), "kwargs": {}, "non_trainable": frozen, "grad_none": [], "state_after": None,
        "args": [stored(name, value, arrays) for name, value in arguments.items()],
    }  # fmt: skip
    for dtype, suffix in ((torch.float32, ""), (torch.float64, "64")):
        leaves = {name: tensors(value, dtype).requires_grad_(name not in frozen) for name, value in weights.items()}
        draw = playing(kept, dtype) if suffix else first
        values = outputs(spec, leaves, tensors(arguments, dtype), draw)
        meta["returns"] = [f"out{i}" for i in range(len(values))]
        arrays |= {f"out{suffix}/out{i}": value.detach().numpy() for i, value in enumerate(values)}
        total = sum(value.square().mean() for value in values)
        trained = [name for name in leaves if name not in frozen]
        found: Any = [None] * len(trained)
        if total.requires_grad:
            found = torch.autograd.grad(total, [leaves[n] for n in trained], allow_unused=True)
        grads = {name: grad for name, grad in zip(trained, found, strict=True) if grad is not None}
        meta["grad_none"] = [name for name in trained if name not in grads]
        arrays |= {f"grad{suffix}/{name}": grad.numpy() for name, grad in grads.items()}
    meta["draws"] = [{"name": f"in/draw_{i:03d}", "fn": function} for i, (function, _) in enumerate(kept)]
    arrays |= {f"in/draw_{i:03d}": array for i, (_, array) in enumerate(kept)}
    return Golden(f"twin/{spec['class'].rsplit('.', 1)[-1]}, drawn", meta, arrays)


def stored(name: str, value: Any, arrays: dict[str, np.ndarray]) -> Any:
    """Put an argument's arrays among the others and refer to them, as the golden files do."""
    if isinstance(value, dict):
        return {k: stored(f"{name}.{k}", v, arrays) for k, v in value.items()}
    if isinstance(value, np.ndarray):
        arrays["in/" + name] = value
        return "@in/" + name
    return value
