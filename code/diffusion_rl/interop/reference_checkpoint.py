"""The reference's checkpoints and ours, one into the other.

    reference .pt                                          ours
    {"epoch": n, "model": {…}, "ema": {…}}   pre-trained   model.<name>, ema.<name>, metadata["epoch"]
    {"itr": n, "model": {…}}                 fine-tuned    model.<name>,             metadata["itr"]

Names, order, types and bits survive both ways, whatever the method.

* One tensor under two names: the reference lists the acting network of most methods twice (`network.*` and `actor.*`,
  or `actor_ft.*`). Ours keeps both names, and going back the two share one storage again while they are equal.
* Tensors without elements: models with an ensemble of critics list `base_model.*`, an empty shell of one of them. Ours
  notes type and shape in the metadata.

What ours holds beyond that (optimizer, state of training, configuration) has no place in a `.pt` file.
"""

from __future__ import annotations

import collections
from collections.abc import Mapping
from typing import Any

import numpy as np

from diffusion_rl.core.errors import UserError
from diffusion_rl.interop.description import describe_networks, infer_kind, parts_of
from diffusion_rl.interop.torch_checkpoint import MetaTensor

State = collections.OrderedDict[str, Any]

_GROUPS = ("model", "ema")
_STACKED = "ensemble_params."  # ensembles as they are trained: in our checkpoints, not in the reference's (quirk 49)
_COUNTERS = ("epoch", "itr")
_ENSEMBLE, _SHELL = "critic_networks.0.", "base_model."


def from_reference(data: Any, name: str = "the checkpoint") -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """(tensors, metadata) of ours for what `read_pt` gave.

    The metadata say what the tensors tell: "kind" and "networks" (see `description`) and the counter ("epoch" or
    "itr"); and under "reference" what is needed to write the same file again: its "keys" in their order, its other
    "entries", "aliases" (part -> the part whose tensors it shares, by group), and "empty" (names of tensors without
    elements -> [type, shape], by group).

    Raises:
        UserError: `data` is not a checkpoint of the reference.
    """
    if not isinstance(data, dict) or not isinstance(data.get("model"), dict):
        raise UserError(
            f'{name} is not a checkpoint of the reference: it has no "model" with a state_dict; give the state_<n>.pt '
            "that a training wrote"
        )
    tensors: dict[str, np.ndarray] = {}
    entries: dict[str, Any] = {}
    empty: dict[str, Any] = {}
    for key, value in data.items():
        if key in _GROUPS:
            _require_state_dict(key, value, name)
            tensors.update({f"{key}.{k}": v for k, v in value.items() if isinstance(v, np.ndarray)})
            empty[key] = {k: [v.dtype, list(v.shape)] for k, v in value.items() if isinstance(v, MetaTensor)}
        elif isinstance(key, str) and _is_scalar(value):
            entries[key] = value
        else:
            raise UserError(f"{name} is not a checkpoint of the reference: unexpected entry {str(key)[:50]!r}")
    metadata: dict[str, Any] = {"format": 1, "kind": infer_kind(tensors)}
    metadata |= {counter: entries.pop(counter) for counter in _COUNTERS if counter in entries}
    metadata["networks"] = describe_networks(tensors)
    aliases = {group: _shared_parts(tensors, group) for group in empty}
    metadata["reference"] = {"keys": list(data), "entries": entries, "aliases": aliases, "empty": empty}
    return tensors, metadata


def to_reference(tensors: Mapping[str, np.ndarray], metadata: Mapping[str, Any]) -> dict[str, Any]:
    """What `write_pt` needs for a `.pt` file that the reference loads.

    Raises:
        UserError: there are no `model.*` tensors.
    """
    origin = metadata.get("reference", {})
    groups: dict[str, State] = {}
    for group in _GROUPS:
        start = f"{group}."
        state = _with_network({k.removeprefix(start): v for k, v in tensors.items() if k.startswith(start)})
        state = {k: v for k, v in state.items() if not k.startswith(_STACKED)}
        aliases = origin["aliases"][group] if group in origin.get("aliases", {}) else _usual_aliases(state, tensors)
        empty = origin["empty"][group] if group in origin.get("empty", {}) else _usual_shell(state)
        groups[group] = _with_shared_storage(state, aliases)
        groups[group] |= {name: MetaTensor(dtype, tuple(shape)) for name, (dtype, shape) in empty.items()}
    groups["model"] = groups["model"] or groups["ema"]  # a shipped policy has the average alone
    if not groups["model"]:
        raise UserError("only checkpoints with model.* tensors can become a .pt file of the reference; these have none")
    counters = {counter: metadata[counter] for counter in _COUNTERS if counter in metadata}
    present = counters | origin.get("entries", {}) | {group: state for group, state in groups.items() if state}
    return {key: present[key] for key in origin.get("keys", present) if key in present}


# ---------- one tensor under two names ----------


def _shared_parts(tensors: Mapping[str, np.ndarray], group: str) -> dict[str, str]:
    """Parts all of whose tensors are the very arrays of an earlier part."""
    parts, shared = parts_of(tensors, group), {}
    for i, (part, weights) in enumerate(parts.items()):
        for earlier, others in list(parts.items())[:i]:
            if weights.keys() == others.keys() and all(weights[name] is others[name] for name in weights):
                shared[part] = earlier
                break
    return shared


def _usual_aliases(state: Mapping[str, np.ndarray], tensors: Mapping[str, np.ndarray]) -> dict[str, str]:
    """What the reference shares in a model of this kind: PPO of Gaussians and mixtures trains `network` itself and
    keeps `actor` as it was; everywhere else `actor` is `network`."""
    trained_itself = infer_kind(tensors) in ("gaussian_ppo", "gmm_ppo")
    return {"actor_ft" if trained_itself else "actor": "network"}


def _with_shared_storage(state: Mapping[str, np.ndarray], aliases: Mapping[str, str]) -> State:
    """Tensors of an alias become the very arrays of the part it stands for, where they are equal."""
    shared: State = collections.OrderedDict(state)
    for alias, part in aliases.items():
        for name, value in state.items():
            original = state.get(f"{part}.{name.removeprefix(alias + '.')}") if name.startswith(f"{alias}.") else None
            if original is not None and _same_bits(value, original):
                shared[name] = original
    return shared


# ---------- what the reference wants beside the weights ----------


def _with_network(state: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
    """Add `network.*`, which the reference wants, to a fine-tuned model that has only `actor.*`."""
    if any(name.startswith("network.") for name in state) or not any(name.startswith("actor_ft.") for name in state):
        return state
    network = {f"network.{name[6:]}": value for name, value in state.items() if name.startswith("actor.")}
    return {**network, **state}


def _usual_shell(state: Mapping[str, np.ndarray]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """`base_model.*` of a model with an ensemble of critics."""
    first = {name.removeprefix(_ENSEMBLE): value for name, value in state.items() if name.startswith(_ENSEMBLE)}
    return {_SHELL + name: (value.dtype.name, value.shape) for name, value in first.items()}


def _require_state_dict(group: str, state: Any, name: str) -> None:
    if not isinstance(state, dict):
        raise UserError(f'{name} is not a checkpoint of the reference: its "{group}" is no state_dict')
    for key, value in state.items():
        if not isinstance(key, str) or not isinstance(value, np.ndarray | MetaTensor):
            raise UserError(f'{name}: the entry {str(key)[:50]!r} of its "{group}" is not a tensor')


def _is_scalar(value: Any) -> bool:
    if isinstance(value, int):
        return -(2**63) <= value < 2**63
    return value is None or isinstance(value, (str, float))


def _same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
