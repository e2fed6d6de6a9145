"""Replay of DiffuserLite's losses, samples, updates and data sets; whole pipelines are in `diffuser_lite_pipelines`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf

from diffusion_rl.core.keras import precision
from diffusion_rl.data.normalizers import GaussianNormalizer
from diffusion_rl.data.plan_windows import PlanDataset
from diffusion_rl.diffusion.rectified_flow import time_grid
from diffusion_rl.interop.torch_names import named_parameters, state_dict
from diffusion_rl.methods.diffuser_lite.iql import IQL, IQLTrainer
from diffusion_rl.methods.diffuser_lite.levels import PlanLevel
from diffusion_rl.methods.diffuser_lite.trainer import InverseTrainer, LevelTrainer, cosine_rate
from diffusion_rl.networks.dit import ConditionalDiT
from parity_tests.replay import build as builder
from parity_tests.replay import diffuser_lite  # noqa: F401  (adds its classes to those that `build` knows)
from parity_tests.replay.calls import caster
from parity_tests.replay.compare import Comparison, Mismatch, own_rounding
from parity_tests.replay.diffuser import PRECISIONS, build
from parity_tests.replay.files import Cast, Golden, Outputs

RATE = 2e-4  # of the reference's AdamW
FLOW = "DiffuserLite's rectified flow"


def level_of(golden: Golden, spec: dict[str, Any], weights: dict[str, np.ndarray]) -> PlanLevel:
    """A level of ours with the recorded masks and weights, those of the average included."""
    kwargs = spec["kwargs"]
    network = dict(kwargs["nn_diffusion"]["kwargs"])
    assert network.pop("timestep_emb_type") == "fourier"
    states = golden.arrays["in/x0"].shape[1]
    level = PlanLevel(ConditionalDiT(**network), states, network["in_dim"], True)
    tables = {name: kwargs[name] and np.array(kwargs[name]["__tensor__"]) for name in ("fix_mask", "loss_weight")}
    level.mask, level.weights = tables["fix_mask"], tables["loss_weight"]
    load_level(golden.name, level, weights)
    return level


def load_level(name: str, level: PlanLevel, weights: dict[str, np.ndarray]) -> None:
    for prefix, network in (("model.", level.network), ("model_ema.", level.ema)):
        builder.load(name, network, {k[len(prefix) :]: v for k, v in weights.items() if k.startswith(prefix)})


def both(level: PlanLevel) -> Outputs:
    """Weights and averages under the reference's names."""
    return {
        f"{prefix}.{k}": v
        for prefix, network in (("model", level.network), ("model_ema", level.ema))
        for k, v in state_dict(network).items()
    }


def rectified_flows(golden: Golden) -> None:
    """Losses with gradients, samples and updates; each starts from the recorded weights."""
    params = golden.meta["params"]
    for dtype, suffix in PRECISIONS:
        with precision(dtype):
            ours: Outputs = {}
            for variant in params["variants"]:
                level = level_of(golden, variant.get("spec", params["spec"]), golden.weights)
                start, end = golden.meta["text"]["draw_range"][variant["name"]]
                draws = [caster(dtype)(draw) for _, draw in golden.draws[start:end]]
                call = {"loss": flow_loss, "sample": flow_sample, "updates": flow_updates}[variant["call"]]
                found = call(golden, variant, level, draws, caster(dtype))
                ours |= {f"{variant['name']}.{k}": v for k, v in found.items()}
        recorded = golden.group("out" + suffix)
        for name, value in recorded.items():
            if name not in ours:
                raise Mismatch(f"{golden.name} [{dtype}]: ours gives no output {name!r}")
            variant = next(v["name"] for v in params["variants"] if name.startswith(v["name"] + "."))
            what = name.removeprefix(variant + ".")
            rung = 4 if what.startswith("grad.") else 6 if variant.startswith("updates") else 3
            options: dict[str, Any] = {"quantity": FLOW, "rounding": own_rounding(golden, "out/" + name)}
            if rung == 4:
                own = [k for k in recorded if k.startswith(variant + ".grad.")]
                options["scale"] = max(float(np.abs(recorded[k]).max()) for k in own)
                options["rounding"] = max(own_rounding(golden, "out/" + k) for k in own)
            check(
                Comparison(golden.name, rung, dtype),
                name,
                ours[name],
                value,
                RATE * params_steps(params, variant),
                **options,
            )


def params_steps(params: dict[str, Any], name: str) -> int:
    """Updates of a variant."""
    return next(v.get("n", 0) for v in params["variants"] if v["name"] == name)


def check(comparison: Comparison, name: str, ours: Any, value: np.ndarray, moved: float, **options: Any) -> None:
    """Compare; but of attention's offsets the keys' have no gradient (the softmax does not feel them), and what Adam
    makes of its rounding, which is steps of the learning rate, no two programs share: these are near each other."""
    if name.endswith("attn.in_proj_bias") and moved:
        third = len(value) // 3
        keys = slice(third, 2 * third)
        if np.abs(np.asarray(ours)[keys] - value[keys]).max() > 2 * moved:
            raise Mismatch(f"{comparison.case}: the keys' offsets in {name} moved farther than their rounding")
        ours, value = (np.delete(np.asarray(x), np.arange(third, 2 * third)) for x in (ours, value))
    comparison.check("out/" + name, ours, value, **options)


def flow_loss(golden: Golden, variant: dict[str, Any], level: PlanLevel, draws: list[Any], cast: Cast) -> Outputs:
    given = {k: cast(golden.arrays["in/" + variant[k]]) for k in ("x0", "x1", "cond") if variant.get(k)}
    x1 = given["x1"] if "x1" in given else draws.pop(0)
    t, condition = draws.pop(0), given.get("cond")
    keep = level.network.condition.keep(draws.pop(0)) if draws else None
    with tf.GradientTape() as tape:
        loss = level.loss(given["x0"], x1, t, condition, keep)
    parameters = [p for p in named_parameters(level.network) if p.variable.trainable]
    taken = tape.gradient(loss, [p.variable for p in parameters])
    found = {f"grad.{p.name}": p.to_torch(g.numpy()) for p, g in zip(parameters, taken, strict=True) if g is not None}
    return {"loss": loss} | found


def flow_sample(golden: Golden, variant: dict[str, Any], level: PlanLevel, draws: list[Any], cast: Cast) -> Outputs:
    kwargs = cast(golden.resolve(variant["kwargs"]))
    known, extent = cast(golden.arrays["in/" + variant["prior"]]), 1.0
    noise = kwargs["x1"] if "x1" in kwargs else draws.pop(0) * float(kwargs.get("temperature", 1.0))
    if "warm_start_reference" in kwargs:
        extent = float(kwargs["warm_start_forward_level"])
        noise = noise * extent + kwargs["warm_start_reference"] * (1 - extent)
    exponent = 1.5 if "sample_step_schedule" in kwargs else 1.0
    keep = level.network.condition.keep(draws.pop(0)) if draws else kwargs.get("mask_cfg")
    x = level.sample(
        noise,
        known,
        time_grid(int(kwargs["sample_steps"]), exponent, end=extent),
        kwargs.get("condition_cfg"),
        float(kwargs.get("w_cfg", 0.0)),
        keep,
        bool(kwargs.get("use_ema", True)),
        int(kwargs.get("diffusion_x_sampling_steps", 0)),
    )
    if "spec" in variant and variant["name"] == "sample_clip":
        x = tf.clip_by_value(x, -1, 1)
    return {"x": x}


def flow_updates(golden: Golden, variant: dict[str, Any], level: PlanLevel, draws: list[Any], cast: Cast) -> Outputs:
    kwargs = variant.get("spec", golden.meta["params"]["spec"])["kwargs"]
    trainer = LevelTrainer(level, RATE, kwargs["ema_rate"], kwargs.get("grad_clip_norm"))
    given = {k: cast(golden.arrays["in/" + variant[k]]) for k in ("x0", "x1", "cond") if variant.get(k)}
    rows: dict[str, list[Any]] = {"losses": [], "lr": [], "grad_norm": []}
    for i in range(variant["n"]):
        condition = None if i in variant.get("uncond_at", []) else given["cond"][i]
        x1 = given["x1"][i] if "x1" in given else draws.pop(0)
        t = draws.pop(0)
        keep = None if condition is None else level.network.condition.keep(draws.pop(0))
        rate = cosine_rate(RATE, i, variant["t_max"]) if variant.get("t_max") else RATE
        loss, norm = trainer.update(given["x0"][i], x1, t, condition, keep, tf.constant(rate, tf.float64))
        for name, value in (("losses", loss), ("lr", rate), ("grad_norm", norm)):
            rows[name].append(np.asarray(value))
    return {k: np.array(v) for k, v in rows.items()} | both(level)


def inverse_dynamics(golden: Golden) -> None:
    given, params = golden.group("in"), golden.meta["params"]
    kwargs = params["spec"]["kwargs"]
    for dtype, suffix in PRECISIONS:
        with precision(dtype):
            cast = caster(dtype)
            inverse = build(params["spec"])
            builder.load(golden.name, inverse, golden.weights)
            trainer = InverseTrainer(inverse, kwargs.get("optim_params", {"lr": 1e-3})["lr"])
            o, a, o2 = (cast(given[k]) for k in ("o", "a", "o2"))
            keep = [cast(draw) for _, draw in golden.draws]
            ours: Outputs = {"predict": inverse(o[0], o2[0]), "predict_train_mode": inverse(o[0], o2[0], keep[0])}
            losses = [trainer.update(o[i], a[i], o2[i], keep[1 + i]) for i in range(params["n"])]
            ours |= {"losses": np.array(losses), "lr": trainer.optimizer.learning_rate.numpy()} | state_dict(inverse)
        compare(golden, dtype, suffix, ours, "inverse dynamics", 6)


def q_learning(golden: Golden) -> None:
    for dtype, suffix in PRECISIONS:
        with precision(dtype):
            compare(golden, dtype, suffix, q_learning_run(golden, caster(dtype)), "implicit Q-learning", 6)


def q_learning_run(golden: Golden, cast: Cast) -> Outputs:
    """The updates, before them the gradients of the first ones: Q's comes after V's step."""
    params = golden.meta["params"]
    iql = IQL(**params["spec"]["kwargs"], target_updates=2 if params["extra_target_update"] else 1)
    columns = [cast(golden.arrays["in/" + k]) for k in ("obs", "act", "rew", "obs2", "done")]
    batches = list(zip(*columns, strict=True))
    builder.load(golden.name, iql, golden.weights)
    ours: Outputs = {"q_targ_minus_v": iql.Q_targ(*batches[0][:2]) - iql.V(batches[0][0])}
    ours |= iql_gradients(iql, "V", lambda: iql.value_loss(*batches[0][:2]))
    IQLTrainer(iql).step("V", lambda: iql.value_loss(*batches[0][:2]))
    ours |= iql_gradients(iql, "Q", lambda: iql.action_value_loss(*batches[0]))
    builder.load(golden.name, iql, golden.weights)
    trainer = IQLTrainer(iql)
    losses = [trainer.update(*batch) for batch in batches[: params["n"]]]
    ours |= {"loss_v": np.array([v for v, _ in losses]), "loss_q": np.array([q for _, q in losses])}
    return ours | {f"final.{k}": v for k, v in state_dict(iql).items()}


def iql_gradients(iql: IQL, part: str, loss: Callable[[], Any]) -> Outputs:
    parameters = [p for p in named_parameters(iql) if p.name.startswith(part + ".")]
    with tf.GradientTape() as tape:
        value = loss()
    taken = tape.gradient(value, [p.variable for p in parameters])
    return {f"grad0.{p.name}": p.to_torch(g.numpy()) for p, g in zip(parameters, taken, strict=True)}


def compare(golden: Golden, dtype: str, suffix: str, ours: Outputs, what: str, rung: int) -> None:
    for name, value in golden.group("out" + suffix).items():
        if name not in ours:
            raise Mismatch(f"{golden.name} [{dtype}]: ours gives no output {name!r}")
        options = {"quantity": f"DiffuserLite's {what}", "rounding": own_rounding(golden, "out/" + name)}
        Comparison(golden.name, rung, dtype).check("out/" + name, ours[name], value, **options)


def normalizer(golden: Golden) -> None:
    given = golden.group("in")
    fitted = GaussianNormalizer.fit(given["X"])
    ours = {"mean": fitted.arrays["means"], "std": fitted.arrays["stds"]}
    ours |= {"normalize": fitted.normalize(given["x"]), "unnormalize": fitted.unnormalize(given["x"])}
    compare(golden, "float32", "", ours, "normalizer", 1)


def dataset_of(golden: Golden, kwargs: dict[str, Any], kind: str) -> PlanDataset:
    kwargs = dict(kwargs)
    penalty = kwargs.pop("terminal_penalty", kwargs.pop("noreaching_penalty", None))
    spans, longest = kwargs.pop("horizons"), kwargs.pop("max_path_length", None)
    return PlanDataset(golden.subgroup("dataset"), kind, spans, penalty=penalty, longest=longest, **kwargs)


def dataset(golden: Golden) -> None:
    """Windows and items of a data set of several horizons."""
    params = golden.meta["params"]
    data = dataset_of(golden, params["kwargs"], params["kind"])
    ours: Outputs = {
        "length": len(data),
        "len_each_horizon": np.array([len(each) for each in data.windows]),
        "mean": data.normalizer.arrays["means"],
        "std": data.normalizer.arrays["stds"],
    }
    for i, (windows, span) in enumerate(zip(data.windows, data.spans, strict=True)):
        ours[f"indices{i}"] = np.concatenate([windows, windows[:, 1:] + span], axis=1)
    returns = [data.returns(i) for i in range(len(data.spans))]
    values = None
    if "va" in golden.group("in"):
        values = data.states @ golden.arrays["in/va"] + golden.arrays["in/vb"]
    for k in params["items"]:
        for i, window in enumerate(data.at(np.array([k]))[:, 0]):
            rows = data.rows(i)[window]
            item = {"obs": data.states[rows], "act": data.actions[rows], "rew": data.rewards[rows, None]}
            item["val"] = returns[i][window : window + 1] if window >= 0 else returns[i][window][None]
            if values is not None:
                item["pred_val"] = values[rows, None]
            ours |= {f"item{k}.{i}.{name}": value for name, value in item.items()}
    recorded = golden.group("out")
    # A return is a single number, of terms that may cancel: compared as one array, as a batch has them.
    names = [name for name in recorded if name.endswith(".val")]
    stacked = (np.concatenate([found[name] for name in names]) for found in (ours, recorded))
    Comparison(golden.name, 1, "float32").check("out/item*.val", *stacked, quantity="DiffuserLite's data sets")
    ours |= {name: recorded[name] for name in names}
    compare(golden, "float32", "", ours, "data sets", 1)


RUNNERS: dict[str, Callable[[Golden], None]] = {
    "rf_multi": rectified_flows,
    "invdyn": inverse_dynamics,
    "iql": q_learning,
    "nets": normalizer,
    "lite_dataset": dataset,
}
