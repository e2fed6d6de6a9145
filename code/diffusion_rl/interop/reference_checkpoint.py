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
import logging
from collections.abc import Mapping
from typing import Any

import numpy as np

from diffusion_rl.core.errors import UserError, listed, one_line
from diffusion_rl.interop.description import describe_network, describe_networks, infer_kind, parts_of
from diffusion_rl.interop.torch_checkpoint import MetaTensor

log = logging.getLogger(__name__)

State = collections.OrderedDict[str, Any]

_GROUPS = ("model", "ema")
_ENTRIES = {"model": ("model", "state_dict", "model_state_dict"), "ema": ("ema", "ema_state_dict", "model_ema")}
_ACTING = ("MLP", "Unet1D", "Transformer")  # what classes of networks that act end in
_WRAPPERS = ("module", "_orig_mod")
_STACKED = "ensemble_params."  # ensembles as they are trained: in our checkpoints, not in the reference's (quirk 49)
_COUNTERS = ("epoch", "itr")
_ENSEMBLE, _SHELL = "critic_networks.0.", "base_model."


def from_reference(data: Any, name: str = "the checkpoint") -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Returns (tensors, metadata) of ours for what `read_pt` gave.

    Files of others' trainings are taken as well: weights under another name or bare, names in which DistributedData-
    Parallel and torch.compile have left theirs, and what else lies beside the weights. That is left aside, and one
    warning names it.

    The metadata say what the tensors tell: "kind" and "networks" (see `description`) and the counter ("epoch" or
    "itr"); and under "reference" what is needed to write the same file again: its "keys" in their order, its other
    "entries", "aliases" (part -> the part whose tensors it shares, by group), and "empty" (names of tensors without
    elements -> [type, shape], by group).

    Raises:
        UserError: `data` holds no weights of a model.
    """
    groups = _groups(data, name)
    states = {key: _state_dict(data if key is None else data[key], group, name) for group, key in groups.items()}
    aside = [f"{key}.{odd}" for key, (_, others) in states.items() if key is not None for odd in others]
    tensors: dict[str, np.ndarray] = {}
    empty: dict[str, Any] = {}
    for group, key in groups.items():
        state, _ = states[key]
        tensors |= {f"{group}.{k}": v for k, v in state.items() if isinstance(v, np.ndarray)}
        empty[group] = {k: [v.dtype, list(v.shape)] for k, v in state.items() if isinstance(v, MetaTensor)}
    entries = {key: value for key, value in data.items() if isinstance(key, str) and _is_scalar(value)}
    taken = {*groups.values(), *entries}
    aside += [str(key)[:50] for key in data if key not in taken and not _is_tensor(data[key])]
    if aside:
        log.warning("%s: its weights are taken, and left aside is what lies beside them: %s", name, listed(aside))
    metadata: dict[str, Any] = {"format": 1, "kind": infer_kind(tensors)}
    metadata |= {counter: entries.pop(counter) for counter in _COUNTERS if type(entries.get(counter)) is int}
    metadata["networks"] = describe_networks(tensors)
    aliases = {group: _shared_parts(tensors, group) for group in empty}
    named = {key: group for group, key in groups.items()}
    keys = [named.get(key, key) for key in data if key in named or key in entries or key in _COUNTERS]
    keys += [group for group in groups if group not in keys]
    metadata["reference"] = {"keys": keys, "entries": entries, "aliases": aliases, "empty": empty}
    return tensors, metadata


def plain_name(name: str) -> str:
    """Returns a tensor's name without what DistributedDataParallel and torch.compile put into it."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def _groups(data: Any, name: str) -> dict[str, str | None]:
    """Returns the entry of each group of weights; None for a bare state_dict."""
    if isinstance(data, dict):
        tensors = {key: isinstance(x, dict) and any(map(_is_tensor, x.values())) for key, x in data.items()}
        named = {group: [key for key in keys if tensors.get(key)] for group, keys in _ENTRIES.items()}
        if any(named.values()):
            return {group: keys[0] for group, keys in named.items() if keys}
        if any(map(_is_tensor, data.values())):
            return {"model": None}
    raise UserError(
        f'{name} is not a checkpoint of the reference: it has no "model" with a state_dict; give the state_<n>.pt '
        "that a training wrote"
    )


def _state_dict(entry: dict[Any, Any], group: str, name: str) -> tuple[dict[str, Any], list[str]]:
    """Returns the tensors of a state_dict under their plain names, and the names of what else is in it."""
    state, others = {}, []
    for key, value in entry.items():
        if isinstance(key, str) and _is_tensor(value):
            if (plain := plain_name(key)) in state:
                raise UserError(f"{name}: the weight {plain!r} of its {group!r} is there twice")
            state[plain] = value
        else:
            others.append(str(key)[:50])
    arrays = {key: value for key, value in state.items() if isinstance(value, np.ndarray)}
    if describe_network(arrays).get("class", "").endswith(_ACTING):  # of the network alone
        state = {f"network.{key}": value for key, value in state.items()}
    return state, others


def to_reference(tensors: Mapping[str, np.ndarray], metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what `write_pt` needs for a `.pt` file that the reference loads.

    Raises:
        UserError: there are no `model.*` tensors, or the metadata under "reference" are not those of `from_reference`.
    """
    try:
        return _to_reference(tensors, metadata, metadata.get("reference") or {})
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"the checkpoint's facts on its .pt file make no sense ({one_line(error)}): use another"
        ) from error


def _to_reference(
    tensors: Mapping[str, np.ndarray], metadata: Mapping[str, Any], origin: Mapping[str, Any]
) -> dict[str, Any]:
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
    """Returns parts all of whose tensors are the very arrays of an earlier part."""
    parts, shared = parts_of(tensors, group), {}
    for i, (part, weights) in enumerate(parts.items()):
        for earlier, others in list(parts.items())[:i]:
            if weights.keys() == others.keys() and all(weights[name] is others[name] for name in weights):
                shared[part] = earlier
                break
    return shared


def _usual_aliases(state: Mapping[str, np.ndarray], tensors: Mapping[str, np.ndarray]) -> dict[str, str]:
    """Returns what the reference shares in a model of this kind: PPO of Gaussians and mixtures trains `network` itself
    and keeps `actor` as it was; everywhere else `actor` is `network`."""
    trained_itself = infer_kind(tensors) in ("gaussian_ppo", "gmm_ppo")
    return {"actor_ft" if trained_itself else "actor": "network"}


def _with_shared_storage(state: Mapping[str, np.ndarray], aliases: Mapping[str, str]) -> State:
    """Lets tensors of an alias be the very arrays of the part it stands for, where they are equal."""
    shared: State = collections.OrderedDict(state)
    for alias, part in aliases.items():
        for name, value in state.items():
            original = state.get(f"{part}.{name.removeprefix(alias + '.')}") if name.startswith(f"{alias}.") else None
            if original is not None and _same_bits(value, original):
                shared[name] = original
    return shared


# ---------- what the reference wants beside the weights ----------


def _with_network(state: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
    """Adds `network.*`, which the reference wants, to a fine-tuned model that has only `actor.*`."""
    if any(name.startswith("network.") for name in state) or not any(name.startswith("actor_ft.") for name in state):
        return state
    network = {f"network.{name[6:]}": value for name, value in state.items() if name.startswith("actor.")}
    return {**network, **state}


def _usual_shell(state: Mapping[str, np.ndarray]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Returns `base_model.*` of a model with an ensemble of critics."""
    first = {name.removeprefix(_ENSEMBLE): value for name, value in state.items() if name.startswith(_ENSEMBLE)}
    return {_SHELL + name: (value.dtype.name, value.shape) for name, value in first.items()}


def _is_tensor(value: Any) -> bool:
    return isinstance(value, np.ndarray | MetaTensor)


def _is_scalar(value: Any) -> bool:
    if isinstance(value, int):
        return -(2**63) <= value < 2**63
    return value is None or isinstance(value, (str, float))


def _same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
