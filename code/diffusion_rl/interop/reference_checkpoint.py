"""The reference's checkpoints and ours, one into the other.

    reference .pt                                          ours
    {"epoch": n, "model": {…}, "ema": {…}}   pre-trained   model.<name>, ema.<name>, metadata["epoch"]
    {"itr": n, "model": {…}}                 fine-tuned    model.<name>,             metadata["itr"]

Names, order, types and bits survive both ways. A fine-tuned model of the reference lists its base policy twice, as
`network.*` and as `actor.*`; ours keeps both names, and going back the two share one storage again while
they are equal. What ours holds beyond that (optimizer, state of training, configuration) has no place in a `.pt` file.
"""

from __future__ import annotations

import collections
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from diffusion_rl.core.errors import UserError

_GROUPS = ("model", "ema")
_COUNTERS = ("epoch", "itr")
_POLICIES = ("network", "actor_ft", "actor")
_TIME_EMBEDDING = ".time_embedding.", ".time_mlp."


def from_reference(data: Any, name: str = "the checkpoint") -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """(tensors, metadata) of ours for what `read_pt` gave.

    The metadata say what the tensors tell: "kind", "network" (see `describe_network`), the counter ("epoch" or "itr"),
    and under "reference" the file's own entries in their order.

    Raises:
        UserError: `data` is not a checkpoint of the reference.
    """
    if not isinstance(data, dict) or not isinstance(data.get("model"), dict):
        raise UserError(f'{name} is not a checkpoint of the reference: it has no "model" with a state_dict')
    tensors: dict[str, np.ndarray] = {}
    entries: dict[str, Any] = {}
    for key, value in data.items():
        if key in _GROUPS:
            tensors.update(_prefixed(key, value, name))
        elif isinstance(key, str) and _is_scalar(value):
            entries[key] = value
        else:
            raise UserError(f"{name} is not a checkpoint of the reference: unexpected entry {str(key)[:50]!r}")
    metadata: dict[str, Any] = {"format": 1, "kind": infer_kind(tensors)}
    metadata |= {counter: entries.pop(counter) for counter in _COUNTERS if counter in entries}
    if network := describe_network(tensors):
        metadata["network"] = network
    metadata["reference"] = {"keys": list(data), "entries": entries}
    return tensors, metadata


def to_reference(tensors: Mapping[str, np.ndarray], metadata: Mapping[str, Any]) -> dict[str, Any]:
    """What `write_pt` needs for a `.pt` file that the reference loads.

    Raises:
        UserError: there are no `model.*` tensors.
    """
    groups = {group: _without_prefix(group, tensors) for group in _GROUPS}
    if not groups["model"]:
        raise UserError("only checkpoints with model.* tensors can become a .pt file of the reference; these have none")
    groups["model"] = _with_network(groups["model"])
    origin = metadata.get("reference", {})
    counters = {counter: metadata[counter] for counter in _COUNTERS if counter in metadata}
    present = counters | origin.get("entries", {}) | {group: state for group, state in groups.items() if state}
    return {key: present[key] for key in origin.get("keys", present) if key in present}


def infer_kind(tensors: Mapping[str, np.ndarray]) -> str:
    """What these weights are of.

    "dppo" (a diffusion policy with a fine-tuned copy); "diffusion_policy", "gaussian_policy" or "gmm_policy"
    (pre-trained ones); or "unknown".
    """
    for prefix, kind in (("model.actor_ft.", "dppo"), ("model.network.", "diffusion_policy")):
        if any(name.startswith(prefix) and any(mark in name for mark in _TIME_EMBEDDING) for name in tensors):
            return kind
    if "model.network.logvar_min" in tensors and not any(name.startswith("model.critic.") for name in tensors):
        mixture = any(name.startswith(("model.network.mlp_weights.", "model.network.modes_head.")) for name in tensors)
        return "gmm_policy" if mixture else "gaussian_policy"
    return "unknown"


def describe_network(tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """The architecture of the (first) MLP diffusion policy among the tensors, under the constructor's argument names.

    Keys: time_dim, mlp_dims, residual_style, use_layernorm, cond_mlp_dims, cond_dim (To * O), output_dim (H * A).
    Empty when there is none.
    """
    for policy in _POLICIES:
        weights = _without_prefix(f"model.{policy}", tensors)
        if {"time_embedding.1.weight", "time_embedding.3.weight"} <= set(weights):
            return _describe_mlp(weights)
    return {}


def _describe_mlp(weights: Mapping[str, np.ndarray]) -> dict[str, Any]:
    time_dim = weights["time_embedding.1.weight"].shape[-1]
    residual = "mlp_mean.layers.0.weight" in weights
    pattern = r"mlp_mean\.layers\.\d+(\.l[12])?\.weight" if residual else r"mlp_mean\.moduleList\.\d+\.linear_1\.weight"
    layers = [value.shape for name, value in weights.items() if re.fullmatch(pattern, name) and value.ndim == 2]
    cond = [
        value.shape
        for name, value in weights.items()
        if re.fullmatch(r"cond_mlp\.moduleList\.\d+\.linear_1\.weight", name) and value.ndim == 2
    ]
    if not layers:
        return {}
    output_dim = layers[-1][0]
    return {
        "time_dim": time_dim,
        "mlp_dims": [out for out, _ in layers[:-1]],
        "residual_style": residual,
        "use_layernorm": any(re.match(r"mlp_mean\..*\.norm_?1\.weight", name) for name in weights),
        "cond_mlp_dims": [out for out, _ in cond] or None,
        "cond_dim": cond[0][1] if cond else layers[0][1] - time_dim - output_dim,
        "output_dim": output_dim,
    }


def _is_scalar(value: Any) -> bool:
    if isinstance(value, int):
        return -(2**63) <= value < 2**63
    return value is None or isinstance(value, (str, float))


def _prefixed(group: str, state: Any, name: str) -> dict[str, np.ndarray]:
    if not isinstance(state, dict):
        raise UserError(f'{name} is not a checkpoint of the reference: its "{group}" is no state_dict')
    for key, value in state.items():
        if not isinstance(key, str) or not isinstance(value, np.ndarray):
            raise UserError(f'{name}: the entry {str(key)[:50]!r} of its "{group}" is not a tensor')
    return {f"{group}.{key}": value for key, value in state.items()}


def _without_prefix(group: str, tensors: Mapping[str, np.ndarray]) -> collections.OrderedDict[str, np.ndarray]:
    """The tensors of a group under their own names; `actor.*` is the very array of `network.*` where they are equal."""
    start = len(group) + 1
    state = collections.OrderedDict((k[start:], v) for k, v in tensors.items() if k.startswith(f"{group}."))
    for name, value in state.items():
        base = state.get(f"network.{name.removeprefix('actor.')}") if name.startswith("actor.") else None
        if base is not None and _same_bits(value, base):
            state[name] = base
    return state


def _with_network(state: collections.OrderedDict[str, np.ndarray]) -> collections.OrderedDict[str, np.ndarray]:
    """Add `network.*`, which the reference wants, to a fine-tuned model that has only `actor.*`."""
    if any(name.startswith("network.") for name in state) or not any(name.startswith("actor_ft.") for name in state):
        return state
    network = {f"network.{name[6:]}": value for name, value in state.items() if name.startswith("actor.")}
    return collections.OrderedDict({**network, **state})


def _same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
