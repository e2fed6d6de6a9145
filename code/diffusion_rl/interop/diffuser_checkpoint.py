"""Checkpoints of the PyTorch Diffuser (jannerm/diffuser): `state_<label>.pt` and the pickled configurations beside it.

A configuration is a pickled object that holds the name of a class and the arguments to build it with. Reading one must
not import or build anything: the names in the pickle become labels, and what is not plain data beside them is refused.
"""

from __future__ import annotations

import io
import os
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from diffusion_rl.core.errors import UserError
from diffusion_rl.interop.torch_checkpoint import read_pt

# Its schedule tables, which are part of its state_dict, and ours.
SCHEDULE_BUFFERS = {
    "betas": "betas",
    "alphas_cumprod": "alphas_cumprod",
    "alphas_cumprod_prev": "alphas_cumprod_prev",
    "sqrt_alphas_cumprod": "sqrt_alphas_cumprod",
    "sqrt_one_minus_alphas_cumprod": "sqrt_one_minus_alphas_cumprod",
    "sqrt_recip_alphas_cumprod": "sqrt_recip_alphas_cumprod",
    "sqrt_recipm1_alphas_cumprod": "sqrt_recipm1_alphas_cumprod",
    "posterior_variance": "ddpm_var",
    "posterior_log_variance_clipped": "ddpm_logvar_clipped",
    "posterior_mean_coef1": "ddpm_mu_coef1",
    "posterior_mean_coef2": "ddpm_mu_coef2",
}
_LARGEST_CONFIG = 1_000_000  # bytes
_PLAIN = (type(None), bool, int, float, str)
_DROPPED = ("device",)


class _Label:
    """Stands for a class of the original: it has its name and takes arguments and state without doing anything."""

    name = ""

    def __init__(self, *arguments: Any):
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _LabelsOnly(pickle._Unpickler):  # type: ignore[name-defined]  # in Python: the compiled one trusts sizes in the file
    """Every class is a label; only the original's package may be named."""

    def find_class(self, module: str, name: str) -> Any:
        if module.split(".")[0] != "diffuser" or not all(part.isidentifier() for part in f"{module}.{name}".split(".")):
            raise pickle.UnpicklingError(f"it wants {module}.{name}")
        return type("_Label", (_Label,), {"name": f"{module}.{name}"})

    def persistent_load(self, pid: Any) -> Any:
        raise pickle.UnpicklingError("it refers to something outside")

    def get_extension(self, code: int) -> None:
        raise pickle.UnpicklingError("it wants a registered extension")


def read_config(path: str | os.PathLike[str]) -> tuple[str, dict[str, Any]]:
    """Class path and arguments of a `<part>_config.pkl`.

    Raises:
        UserError: the file is missing, damaged, or holds anything but a configuration of plain values.
    """
    try:
        payload = Path(path).read_bytes()
        if len(payload) > _LARGEST_CONFIG:
            raise pickle.UnpicklingError(f"{len(payload)} bytes are too many")
        found = _LabelsOnly(io.BytesIO(payload)).load()
        if not isinstance(found, _Label) or not isinstance(found.state, dict):
            raise pickle.UnpicklingError("it is no configuration")
        label, arguments = found.state["_class"], found.state["_dict"]
        if not (isinstance(label, type) and issubclass(label, _Label)) or not isinstance(arguments, dict):
            raise pickle.UnpicklingError("it is no configuration")
        return label.name, {_text(k): _plain(v) for k, v in arguments.items()}
    except FileNotFoundError:
        raise UserError(f"no {path}: the configurations must lie beside the original's checkpoint") from None
    except UserError:
        raise
    except Exception as error:  # damaged pickles raise whatever their instructions lead to
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"{path} refused: {reason}; nothing in it was executed") from error


def _text(key: Any) -> str:
    if type(key) is not str:
        raise pickle.UnpicklingError("an argument without a name")
    return key


def _plain(value: Any, depth: int = 0) -> Any:
    if type(value) in _PLAIN:
        return value
    if depth < 8 and type(value) in (list, tuple):
        return [_plain(item, depth + 1) for item in value]
    if depth < 8 and type(value) is dict and all(type(key) in (str, int) for key in value):
        return {str(key): _plain(item, depth + 1) for key, item in value.items()}
    raise pickle.UnpicklingError(f"it holds a {type(value).__name__}")


def described(part: str, name: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration of the original in the form of ours: {"class" or "loader": "<module>.<Class>", argument: value}.

    "diffuser.models.temporal.TemporalUnet" is "models.TemporalUnet" in both systems' options.
    """
    package, *_, last = name.removeprefix("diffuser.").split(".")
    kept = {key: value for key, value in arguments.items() if key not in _DROPPED}
    return {"loader" if part == "dataset" else "class": f"{package}.{last}", **kept}


def averaged_weights(path: str | os.PathLike[str], n_timesteps: int) -> dict[str, np.ndarray]:
    """The averaged weights in a `state_<label>.pt`, without its schedule, which must be of so many steps."""
    data = read_pt(path)
    if not isinstance(data, dict) or not isinstance(data.get("ema"), dict):
        raise UserError(f"{path} is no checkpoint of the PyTorch Diffuser: it has no averaged weights")
    weights = data["ema"]
    steps = len(weights.get("betas", ()))
    if steps != n_timesteps:
        raise UserError(f"{path} has a schedule of {steps} steps, its configuration says {n_timesteps}")
    return {name: value for name, value in weights.items() if name.startswith("model.")}


def stacking_weights(path: str | os.PathLike[str], n_timesteps: int) -> dict[str, np.ndarray]:
    """The averaged weights in a `model-<milestone>.pt` of the original's branch `kuka`, under the names of ours.

    Its attention is made of two-dimensional convolutions, and its levels have no place for another attention.
    """
    data = read_pt(path)
    weights = data.get("ema") if isinstance(data, dict) else None
    if not isinstance(weights, dict) or not any(str(name).startswith("denoise_fn.") for name in weights):
        raise UserError(f"{path} is no checkpoint of the PyTorch Diffuser's Kuka experiments")
    if (steps := len(weights.get("betas", ()))) != n_timesteps:
        raise UserError(f"{path} has a schedule of {steps} steps: plan with --n_diffusion_steps {steps}")
    found = {}
    for name, value in weights.items():
        if name.startswith("denoise_fn."):
            own = re.sub(r"^denoise_fn\.((?:downs|ups)\.\d+\.)2\.conv", r"denoise_fn.\g<1>3.conv", name)
            value = value[..., 0] if ".attn.fn." in name and value.ndim == 4 else value
            found[own.replace("denoise_fn.", "model.", 1)] = value
    return found
