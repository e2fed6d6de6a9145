"""Replay of `kind = case`: one call of one method, its outputs, its gradients and the state it leaves."""

from __future__ import annotations

from typing import Any

import numpy as np
import tensorflow as tf

from diffusion_rl.core.keras import precision
from diffusion_rl.interop import torch_names
from parity_tests import tolerances
from parity_tests.replay import decisions
from parity_tests.replay.build import build_case
from parity_tests.replay.calls import CALLS, caster
from parity_tests.replay.compare import Comparison, Mismatch, gradients_rounding, own_rounding
from parity_tests.replay.files import Golden
from parity_tests.replay.roots import Roots, settled


class NotCovered(Exception):
    """Nothing in the replayer knows this call."""


def replay(golden: Golden) -> None:
    """Both precisions, where both are recorded."""
    for dtype, suffix in (("float32", ""), ("float64", "64")):
        if golden.group("out" + suffix):
            with precision(dtype):
                _replay(golden, dtype, suffix)


def _replay(golden: Golden, dtype: str, suffix: str) -> None:
    meta = golden.meta
    key = (meta["class"], meta["method"])
    if key not in CALLS:
        raise NotCovered(f"{golden.name}: no adapter for {key[0]}.{key[1]} in parity_tests/replay/calls.py")
    adapter, rung = CALLS[key]
    cast, roots = caster(dtype), Roots()
    # our own tables where they are what is compared
    model = build_case(golden, recorded_tables=meta["method"] != "__attrs__", roots=roots)
    recorded = golden.group("out" + suffix)
    if roots.open and dtype == "float64":
        returned = {name: recorded[name] for name in meta["returns"]}
        outputs = adapter(model, golden, cast)
        roots = settled(roots, outputs, lambda r: adapter(build_case(golden, roots=r), golden, cast), returned)
        model = build_case(golden, roots=roots)
    comparison = Comparison(golden.name, rung, dtype)
    with tf.GradientTape() as tape:
        outputs = adapter(model, golden, cast)
        total = total_loss(outputs, meta, recorded)
    if total is not None:
        outputs["_total_loss"] = total
    if meta.get("state_after"):
        outputs |= {"state." + k: v for k, v in torch_names.state_dict(model).items()}
    for name, value in recorded.items():
        if decisions.check_output(golden, name, outputs):
            continue
        if name not in outputs or outputs[name] is None:
            raise Mismatch(f"{golden.name} [{dtype}]: ours gives no output {name!r}")
        rounding = own_rounding(golden, "out/" + name)
        comparison.check("out/" + name, outputs[name], value, quantity=quantity(meta, name), rounding=rounding)
    if meta.get("loss"):
        check_gradients(golden, dtype, suffix, model, tape, total, comparison)


def total_loss(outputs: dict[str, Any], meta: dict[str, Any], recorded: dict[str, np.ndarray]) -> Any:
    """The scalar that the reference differentiated: given weights, or the sum of the outputs' mean squares."""
    weights = meta.get("loss")
    if not weights:
        return None
    terms = []
    if weights == "mean_square":
        for name in meta["returns"]:
            terms.append(tf.reduce_mean(tf.square(outputs[name])))
    else:
        for name, weight in weights.items():
            if tf.is_tensor(outputs[name]):
                terms.append(weight * outputs[name])
    return tf.add_n(terms)


def check_gradients(
    golden: Golden,
    dtype: str,
    suffix: str,
    model: Any,
    tape: tf.GradientTape,
    total: Any,
    comparison: Comparison,
    ours: dict[str, np.ndarray] | None = None,
) -> None:
    """Every parameter's gradient, relative to the model's largest; those without one upstream have none in ours.

    Args:
        ours: our gradients under the reference's names, where they have been taken already.
    """
    ours = torch_gradients(model, tape, total) if ours is None else ours
    recorded = golden.group("grad" + suffix)
    frozen = [] if decisions.derivative_exists(golden) else golden.meta.get("non_trainable", [])
    for name in golden.meta["grad_none"] + frozen:
        if name in ours and np.any(ours[name]):
            raise Mismatch(f"{golden.name} [{dtype}]: {name} has no gradient in the reference, in ours it has")
    if recorded:
        scale = max(max(float(np.abs(g).max(initial=0.0)) for g in recorded.values()), 1e-30)
        rounding = gradients_rounding(golden, scale)
        comparison.check_all(ours, recorded, "grad/", quantity="gradients", rung=4, scale=scale, rounding=rounding)
    sums = golden.meta.get("grad64_sumnorm") if dtype == "float64" else None
    if sums:
        # The reference's float64 gradients are not in the file, but what they had in common with ours is: the sum and
        # the norm of every tensor, and how far its float32 ones, which are there, were from them. So far, and not
        # farther, these may be from ours.
        narrow = golden.group("grad")
        scale = max(float(np.abs(g).max(initial=0.0)) for g in narrow.values())
        gate = (1 + 1e-6) * golden.meta["dev_f32_f64"]["grad_global"] + tolerances.gate(4, dtype)
        options = {"quantity": "the reference's own rounding", "rung": 4, "scale": scale, "gate": gate}
        comparison.check_all(ours, narrow, "float32 grad/", **options)
        scale = max(norm for _, norm in sums.values())
        for name, recorded_sums in sums.items():
            grad = ours[name]
            comparison.check(
                f"grad/{name} [sum, norm]",
                [grad.sum(), np.sqrt((grad * grad).sum())],
                np.array(recorded_sums),
                quantity="gradients",
                rung=4,
                scale=scale,
            )


def torch_gradients(model: Any, tape: tf.GradientTape, total: Any) -> dict[str, np.ndarray]:
    """Gradients under the reference's names and layouts; zeros where there is none."""
    named = list(torch_names.named_parameters(model))
    grads = tape.gradient(total, [p.variable for p in named])
    return {
        p.name: p.to_torch(np.zeros(p.variable.shape) if grad is None else tf.convert_to_tensor(grad).numpy())
        for p, grad in zip(named, grads, strict=True)
    }


def quantity(meta: dict[str, Any], name: str) -> str:
    """What the report calls an output."""
    method = {"__call__": "", "__attrs__": "schedule table", "__target__": ""}.get(meta["method"], meta["method"])
    owner = (meta.get("class") or meta.get("target")).rsplit(".", 1)[-1]
    return f"{owner}.{method} {name}".replace(". ", " ") if method else f"{owner} {name}"
