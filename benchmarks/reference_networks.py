"""The PyTorch side of the rows of networks.py: the authors' classes, called as their agents call them."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import networks as n
import numpy as np
import torch
from worker import Workload


def build(description: Any) -> Any:
    """The object that a description of classes and arguments stands for; without a class, its values as attributes."""
    if not isinstance(description, Mapping):
        return description
    arguments = {key: build(value) for key, value in description.items() if key != "_target_"}
    if "_target_" not in description:
        return SimpleNamespace(**arguments)
    module, _, name = description["_target_"].rpartition(".")
    return getattr(importlib.import_module(module), name)(**arguments)


@functools.cache
def policy(name: str) -> Any:
    return build(n.CASES[name].policy | {"device": "cpu"})


def condition(given: n.Inputs) -> dict[str, torch.Tensor]:
    """As the agents hand it over: everything as floats."""
    arrays = {"state": given.state} | ({} if given.rgb is None else {"rgb": given.rgb})
    return {key: torch.from_numpy(array).float() for key, array in arrays.items()}


def network_call(name: str) -> Workload:
    case = n.CASES[name]
    given, network = n.inputs(case, case.rows), policy(name).actor_ft
    cond = condition(given)
    if case.denoises:
        x, t = torch.from_numpy(given.x), torch.from_numpy(given.t)
        return lambda: (network(x, t, cond=cond),)
    return lambda: network(cond)


def forward(name: str) -> Workload:
    network = network_call(name)

    def call() -> list[np.ndarray]:
        with torch.no_grad():
            return [output.numpy() for output in network()]

    return call


def gradient(name: str) -> Workload:
    network, module = network_call(name), policy(name).actor_ft

    def call() -> None:
        module.zero_grad()
        sum(output.square().mean() for output in network()).backward()

    return call


def sampling(name: str) -> Workload:
    model, given = policy(name), n.inputs(n.CASES[name], n.ENVS)

    def call() -> None:
        with torch.no_grad():
            sample = model(cond=condition(given), deterministic=False)
        for array in sample if isinstance(sample, tuple) else (sample,):
            array.numpy()

    return call


def log_probs(name: str) -> Workload:
    case = n.CASES[name]
    model, given = policy(name), n.inputs(case, case.rows)
    cond, chains = condition(given), torch.from_numpy(given.chains)

    def call() -> None:
        with torch.no_grad():
            model.get_logprobs(cond, chains).numpy()

    return call


MAKERS = {"forward": forward, "gradient": gradient, "sampling": sampling, "log-probs": log_probs}


def makers() -> dict[str, Any]:
    """By the names of the rows."""
    return {row: functools.partial(MAKERS[row.rpartition(" ")[2]], row.rpartition(" ")[0]) for row in n.rows()}
