"""Checkpoints of the PyTorch Diffuser (jannerm/diffuser): `state_<label>.pt` and the pickled configurations beside it.

A configuration is a pickled object that holds the name of a class and the arguments to build it with. Reading one must
not import or build anything: the names in the pickle become labels, and what is not plain data beside them is refused.
"""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from diffusion_rl.core.errors import UserError, one_line
from diffusion_rl.core.files import read_bytes
from diffusion_rl.core.pickles import Interpreter, Refused
from diffusion_rl.interop.reference_checkpoint import plain_name
from diffusion_rl.interop.torch_checkpoint import read_pt

_LARGEST_CONFIG, _MOST_ITEMS = 1_000_000, 100_000  # bytes, values
_PLAIN = (type(None), bool, int, float, str)
_DROPPED = ("device",)


class _Label(str):
    """The name of a class of the original, which is never looked up."""


class _Instance:
    """Stands for an object of the original: its class and its state."""

    def __init__(self, label: _Label):
        self.label = label
        self.state: dict[Any, Any] | None = None


class _LabelsOnly(Interpreter):
    """Every class is a label; only the original's package may be named."""

    def find(self, name: str) -> _Label:
        path = name.replace(" ", ".")
        if path.split(".")[0] != "diffuser" or not all(part.isidentifier() for part in path.split(".")):
            raise Refused(f"it wants {path}")
        return _Label(path)

    def create(self, kind: Any, arguments: Any) -> _Instance:
        if type(kind) is not _Label or arguments != ():
            raise Refused(f"it wants to make a {type(kind).__name__}")
        return _Instance(kind)

    def build(self, target: Any, state: Any) -> None:
        if type(target) is not _Instance or type(state) is not dict:
            raise Refused(f"it wants to set the state of a {type(target).__name__}")
        target.state = state


def read_config(path: str | os.PathLike[str]) -> tuple[str, dict[str, Any]]:
    """Returns the class path and arguments of a `<part>_config.pkl`.

    Raises:
        UserError: the file is missing, damaged, or holds anything but a configuration of plain values.
    """
    payload = read_bytes(path, f"no {path}: the configurations must lie beside the original's checkpoint")
    try:
        if len(payload) > _LARGEST_CONFIG:
            raise Refused(f"{len(payload)} bytes are too many")
        config = _LabelsOnly().run(payload)
        if not isinstance(config, _Instance) or not isinstance(config.state, dict):
            raise Refused("it is no configuration")
        label, arguments = config.state["_class"], config.state["_dict"]
        if type(label) is not _Label or not isinstance(arguments, dict):
            raise Refused("it is no configuration")
        items = itertools.count()
        return str(label), {_text(k): _plain(v, items) for k, v in arguments.items()}
    except Exception as error:  # damaged pickles raise whatever their instructions lead to
        raise UserError(f"{path} refused: {one_line(error)}; nothing in it was executed") from error


def _text(key: Any) -> str:
    if type(key) is not str:
        raise Refused("an argument without a name")
    return key


def _plain(value: Any, items: Iterator[int], depth: int = 0) -> Any:
    """Returns the value as JSON has it; `items` counts its parts, of which a few bytes of a pickle can make very
    many."""
    if next(items) > _MOST_ITEMS:
        raise Refused("it holds too many values")
    if type(value) in _PLAIN:
        return value
    if depth < 8 and type(value) in (list, tuple):
        return [_plain(item, items, depth + 1) for item in value]
    if depth < 8 and type(value) is dict and all(type(key) in (str, int) for key in value):
        return {str(key): _plain(item, items, depth + 1) for key, item in value.items()}
    raise Refused(f"it holds a {type(value).__name__}")


def described(part: str, name: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a configuration of the original in the form of ours: {"class" or "loader": "<module>.<Class>", argument:
    value}.

    "diffuser.models.temporal.TemporalUnet" is "models.TemporalUnet" in both systems' options.
    """
    package, *_, last = name.removeprefix("diffuser.").split(".")
    kept = {key: value for key, value in arguments.items() if key not in _DROPPED}
    return {"loader" if part == "dataset" else "class": f"{package}.{last}", **kept}


def averaged_weights(path: str | os.PathLike[str], n_timesteps: int) -> dict[str, np.ndarray]:
    """Returns the averaged weights in a `state_<label>.pt`, without its schedule, which must be of so many steps."""
    weights = _average_in(path, f"{path} is no checkpoint of the PyTorch Diffuser: it has no averaged weights")
    if (steps := _steps(weights)) != n_timesteps:
        raise UserError(f"{path} has a schedule of {steps} steps, its configuration says {n_timesteps}")
    return {name: value for name, value in weights.items() if name.startswith("model.")}


def stacking_weights(path: str | os.PathLike[str], n_timesteps: int) -> dict[str, np.ndarray]:
    """Returns the averaged weights in a `model-<milestone>.pt` of the original's branch `kuka`, under the names of
    ours.

    Its attention is made of two-dimensional convolutions, and its levels have no place for another attention.
    """
    problem = f"{path} is no checkpoint of the PyTorch Diffuser's Kuka experiments"
    weights = _average_in(path, problem)
    if not any(name.startswith("denoise_fn.") for name in weights):
        raise UserError(problem)
    if (steps := _steps(weights)) != n_timesteps:
        raise UserError(f"{path} has a schedule of {steps} steps: plan with --n_diffusion_steps {steps}")
    renamed = {}
    for name, value in weights.items():
        if name.startswith("denoise_fn."):
            own = re.sub(r"^denoise_fn\.((?:downs|ups)\.\d+\.)2\.conv", r"denoise_fn.\g<1>3.conv", name)
            value = value[..., 0] if ".attn.fn." in name and value.ndim == 4 else value
            renamed[own.replace("denoise_fn.", "model.", 1)] = value
    return renamed


def _average_in(path: str | os.PathLike[str], problem: str) -> dict[str, np.ndarray]:
    """Returns arrays of the entry "ema"; UserError with `problem` where there are none."""
    data = read_pt(path)
    weights = data.get("ema") if isinstance(data, dict) else None
    if not isinstance(weights, dict):
        raise UserError(problem)
    arrays = {k: v for k, v in weights.items() if isinstance(k, str) and isinstance(v, np.ndarray)}
    if not arrays:
        raise UserError(problem)
    return {plain_name(name): value for name, value in arrays.items()}


def _steps(weights: Mapping[str, np.ndarray]) -> int:
    """Returns the length of the schedule that lies among the weights."""
    return int(weights["betas"].size) if "betas" in weights else 0
