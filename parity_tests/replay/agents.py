"""Replay of `kind = agent`: whole iterations of our loops on recorded experiences and draws, to the final weights."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from diffusion_rl.core.keras import floatx, precision
from diffusion_rl.interop import torch_names
from diffusion_rl.policies.gmm import GMMPolicy
from parity_tests.replay.build import build_case, locate
from parity_tests.replay.compare import Comparison, Mismatch, own_rounding
from parity_tests.replay.files import Golden
from parity_tests.replay.roots import Roots, settled
from parity_tests.replay.scripted import ScriptedEnv, Tape

# Local variables of the reference that are its inputs, or lists without a fixed meaning, are compared like the rest.
_GROUPS = {
    "final": "final weights",
    "final_ens": "final weights",
    "ema": "final weights",
    "after_itr": "learning rates",
    "calls": "losses of the minibatches",
    "env_actions": "actions",
}
Form = Callable[[Golden, Roots], dict[str, np.ndarray]]
SAME = 1e-10  # closer than this our actions cannot be with other square roots than the recorder's


def replay(golden: Golden) -> None:
    """Both precisions, and both forms of the update: the restructured, compiled one, and the plain one as it reads.

    The plain one is here for its mathematics, which float64 shows; `replay_compiled_plain` has it in both.
    """
    for dtype, suffix in (("float32", ""), ("float64", "64")):
        roots = Roots()
        only = _pre_training(golden) or (dtype == "float32" and golden.group("out64"))
        for form in (_compiled,) if only else (_plain, _compiled):
            if golden.group("out" + suffix):
                with precision(dtype):
                    if dtype == "float32":
                        ours = form(golden, roots)
                    else:
                        ours, roots = _with_recorders_roots(golden, form, roots)
                compare(golden, dtype, suffix, ours, " plain" if form is _plain else "")


def replay_compiled_plain(golden: Golden) -> None:
    """Replay the plain form as a graph, in both precisions."""
    for dtype, suffix in (("float32", ""), ("float64", "64")):
        if golden.group("out" + suffix):
            with precision(dtype):
                roots = _with_recorders_roots(golden, _plain, Roots())[1] if suffix else Roots()
                ours = run(golden, False, roots)
            compare(golden, dtype, suffix, ours, " plain")


def _compiled(golden: Golden, roots: Roots) -> dict[str, np.ndarray]:
    """Run the fast form of the update as a graph."""
    return run(golden, True, roots)


def _plain(golden: Golden, roots: Roots) -> dict[str, np.ndarray]:
    """Run the plain form of the update operation by operation: nothing is compiled."""
    tf.config.run_functions_eagerly(True)
    try:
        return run(golden, False, roots)
    finally:
        tf.config.run_functions_eagerly(False)


def _early(outputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What tells the recorder's square roots: the first actions, and ratios of exact likelihoods before any update."""
    names = ("env_actions", "calls.loss.ratio", "calls.loss.approx_kl")
    return {name: np.asarray(outputs[name])[:1] for name in names if name in outputs and np.size(outputs[name])}


def _with_recorders_roots(golden: Golden, form: Form, roots: Roots) -> tuple[dict[str, np.ndarray], Roots]:
    """Our run in float64, and the square roots that it takes to act as recorded."""
    ours, recorded = form(golden, roots), _early(golden.group("out64"))
    if not roots.open or all(np.allclose(_early(ours)[k], v, rtol=0, atol=SAME) for k, v in recorded.items()):
        return ours, roots
    chosen = settled(roots, _early(ours), lambda other: _early(form(golden, other)), recorded)
    return form(golden, chosen), chosen


def run(golden: Golden, fast: bool, roots: Roots) -> dict[str, np.ndarray]:
    """Run our loop on the script, in a folder for this run; returns everything under the names of the recording."""
    with tempfile.TemporaryDirectory() as folder:
        return _run(golden, Path(folder), fast, roots)


def _run(golden: Golden, folder: Path, fast: bool, roots: Roots) -> dict[str, np.ndarray]:
    cfg = copy.deepcopy(golden.meta["cfg"])
    cfg["logdir"] = str(folder)
    cfg["train"]["fast"] = fast
    model, tape = build_case(golden, roots=roots), Tape(_used_draws(golden))
    records: list[dict[str, Any]] = []
    ours: dict[str, np.ndarray] = {}
    loop_class = locate(golden.meta["agent_class"])
    data = {"dataset": _dataset(golden, folder)} if golden.meta["dataset"] is not None else {}
    if not _pre_training(golden):
        env = ScriptedEnv(golden.subgroup("env"), cfg["act_steps"])
        loop = loop_class(cfg, venv=env, rng=tape, model=model, observer=records.append, **data)
        if isinstance(model, GMMPolicy):
            take_recorded_modes(loop.trainer.actor)
        loop.run()
        ours["env_actions"] = np.stack(env.actions) if env.actions else np.zeros(0)
    else:
        loop = loop_class(cfg, rng=tape, model=model, observer=records.append, **data)
        loop.run()
        ours |= {"ema." + k: v for k, v in torch_names.state_dict(loop.ema_model).items()}
    if tape.left_over:
        raise Mismatch(f"{golden.name}: the reference drew more than ours: left on the tape: {tape.left_over}")
    ours |= {"final." + k: v for k, v in torch_names.state_dict(loop.model).items()}
    ours |= {k.replace("final.ensemble_params.", "final_ens."): v for k, v in ours.items()}
    return ours | _flatten(records)


def take_recorded_modes(actor: Any) -> None:
    """torch draws the mode of a mixture by itself and that was recorded; ours takes a uniform number that picks it."""

    def draw(noise: Any, n_envs: int) -> dict[str, np.ndarray]:
        network = actor.policy.network
        shape = (n_envs, network.num_modes, network.horizon_steps * network.action_dim)
        modes = noise.choose(np.ones((n_envs, network.num_modes)))
        return {"modes": modes, "noise": noise.normal(shape, floatx())}

    actor.draw = draw


def _pre_training(golden: Golden) -> bool:
    return golden.meta["agent_class"].startswith("agent.pretrain.")


def _used_draws(golden: Golden) -> list[tuple[str, np.ndarray]]:
    """torch's shuffling DataLoader draws a second permutation at the end of every epoch and takes nothing from it."""
    if not _pre_training(golden):
        return golden.draws
    permutations = [i for i, (fn, _) in enumerate(golden.draws) if fn == "torch.randperm"]
    unused = set(permutations[1::2])
    return [draw for i, draw in enumerate(golden.draws) if i not in unused]


def _dataset(golden: Golden, folder: Path) -> Any:
    from diffusion_rl.data.sequences import QLearningDataset, SequenceDataset

    path = folder / "offline.npz"
    np.savez(path, **golden.subgroup("dataset"))
    kind = QLearningDataset if golden.meta["dataset"]["q"] else SequenceDataset
    return kind(str(path), **golden.meta["dataset"]["kwargs"])


def _flatten(records: list[dict[str, Any]]) -> dict[str, np.ndarray]:
    """The observer's records under the recording's names."""
    ours: dict[str, np.ndarray] = {}
    losses: dict[str, list[np.ndarray]] = {}
    rates: dict[str, list[float]] = {}
    for i, record in enumerate(records):
        for name, value in record.items():
            if name == "losses":
                for key, values in value.items():
                    losses.setdefault(key, []).append(np.atleast_1d(values))
            elif name == "lr":
                for key, rate in value.items():
                    key = key.removeprefix("policy_")  # RWR's only optimizer
                    rates.setdefault(key, []).append(rate)
            else:
                ours[f"itr{i}.{name}"] = np.asarray(value)
        ours.setdefault(f"itr{i}.eval_mode", np.asarray(False))
    for k, v in losses.items():
        method = k.split(".")[0]  # the off-policy losses are called after the reference's methods
        ours |= {f"calls.loss.{k}": np.concatenate(v), f"calls.{method}.loss": np.concatenate(v)}
    ours |= {f"calls.{k}.loss": np.concatenate(v) for k, v in _repeated(losses).items()}
    if "loss_actor" in losses:
        ours["calls.loss.loss"] = ours["calls.loss_actor.loss"]  # where it is supervised
    return ours | {f"after_itr.{k}": np.array(v) for k, v in rates.items()}


def _repeated(losses: dict[str, list[np.ndarray]]) -> dict[str, np.ndarray]:
    """A loss that an update evaluates several times, `loss_actor.0`, `loss_actor.1`, …: in the order of evaluation."""
    names = {name.partition(".")[0] for name in losses if "." in name}
    return {
        n: [np.stack([np.concatenate(v) for k, v in losses.items() if k.startswith(n + ".")], axis=1).reshape(-1)]
        for n in names
    }


def compare(golden: Golden, dtype: str, suffix: str, ours: dict[str, np.ndarray], form: str) -> None:
    """Rollout first, then what was made of it, the losses, and the weights at the end."""
    recorded = golden.group("out" + suffix)
    comparison = Comparison(golden.name + form, 7, dtype)
    order = [
        *(k for k in recorded if k == "env_actions" or ".chains" in k or ".obs" in k),
        *(k for k in recorded if k.startswith("itr")),
        *recorded,
    ]
    unchanged = golden.weights
    for name in dict.fromkeys(order):
        if name not in ours:
            raise Mismatch(f"{golden.name} [{dtype}]: ours gives no {name}")
        head = name.split(".")[0]
        group = _GROUPS.get(head, name.split(".")[-1])
        rounding = own_rounding(golden, "out/" + name)
        comparison.check("out/" + name, ours[name], recorded[name], quantity=group, rounding=rounding)
    for name, before in unchanged.items():  # only what the reference changed may have changed
        ensemble = name.replace("ensemble_params.", "final_ens.")
        if {"final." + name, ensemble} & recorded.keys() or name in golden.meta["aliases"]:
            continue
        if not np.array_equal(np.asarray(ours["final." + name]).astype(before.dtype), before):
            raise Mismatch(f"{golden.name} [{dtype}]: {name} was trained, the reference leaves it alone")
