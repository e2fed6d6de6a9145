"""Replay of `kind = custom` and `schedules`: schedulers, optimizers, averages, rewards, advantages, data sets."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import tensorflow as tf

from diffusion_rl.core.ema import ema_update
from diffusion_rl.core.keras import precision
from diffusion_rl.core.lr_schedules import CosineWarmupRestarts
from diffusion_rl.core.optimizers import AdamW, clip_by_global_norm
from diffusion_rl.core.returns import gae
from diffusion_rl.core.reward_scaling import RunningRewardScaler
from diffusion_rl.interop import torch_names
from diffusion_rl.methods.off_policy.dipo import DIPO
from diffusion_rl.networks.layers import variables_of
from parity_tests.replay.build import build_case, locate
from parity_tests.replay.calls import caster
from parity_tests.replay.case import NotCovered, torch_gradients
from parity_tests.replay.compare import Comparison, Mismatch
from parity_tests.replay.files import Golden

PRECISIONS = (("float32", ""), ("float64", "64"))


def replay(golden: Golden) -> None:
    """Find the piece by what the file holds, and compare it."""
    meta = golden.meta
    for recognises, piece in _PIECES:
        if recognises(meta):
            piece(golden)
            return
    raise NotCovered(f"{golden.name}: nothing in parity_tests/replay/custom.py recognises this file")


def schedules(golden: Golden) -> None:
    """Every table of every recorded schedule, computed by us."""
    from diffusion_rl.diffusion.schedules import ddim_schedule, ddpm_schedule

    comparison = Comparison(golden.name, 1, "float32")
    for key in golden.meta["keys"]:
        ddpm_steps, _, ddim_steps = key[1:].partition("_ddim")
        ddpm = ddpm_schedule(int(ddpm_steps))
        ddim = ddim_schedule(ddpm, int(ddim_steps)) if ddim_steps else None
        for name, value in golden.group(f"out/{key}").items():
            ours = getattr(ddim if name.startswith("ddim_") else ddpm, name)
            comparison.check(f"{key}/{name}", ours, value, quantity="schedule tables")


def learning_rates(golden: Golden) -> None:
    explicit = golden.name.endswith("_epoch_arg") or "epoch=" in golden.meta["note"]
    schedule = CosineWarmupRestarts(**golden.meta["scheduler_kwargs"])
    rates, steps = [schedule.lr], [schedule.step_in_cycle]
    for i in range(1, len(golden.arrays["out/lr"])):
        rates.append(schedule.step(i) if explicit else schedule.step())
        steps.append(schedule.step_in_cycle)
    comparison = Comparison(golden.name, 1, "float64")
    comparison.check("out/lr", rates, golden.arrays["out/lr"], quantity="learning-rate schedule")
    comparison.check("out/step_in_cycle", steps, golden.arrays["out/step_in_cycle"], quantity="learning-rate schedule")


def given_gradients(golden: Golden) -> None:
    """AdamW (and clipping) on recorded gradients."""
    meta, given = golden.meta, golden.group("in")
    count = sum(name.startswith("p") for name in given)
    for dtype, suffix in PRECISIONS:
        recorded = golden.group("out" + suffix)
        if not recorded:
            continue
        variables = [tf.Variable(given[f"p{i}"].astype(dtype)) for i in range(count)]
        optimizer = AdamW(variables, meta["lr"], meta["weight_decay"], tuple(meta["betas"]), meta["eps"])
        ours: dict[str, Any] = {}
        norms = []
        for step in range(len(given["g0"])):
            grads = [tf.constant(given[f"g{i}"][step].astype(dtype)) for i in range(count)]
            if meta["max_grad_norm"] is not None:
                grads, norm = clip_by_global_norm(grads, meta["max_grad_norm"])
                norms.append(norm.numpy())
            optimizer.apply(grads)
            ours |= {f"step{step + 1}.p{i}": v.numpy() for i, v in enumerate(variables)}
        ours["total_norm"] = np.array(norms)
        Comparison(golden.name, 5, dtype).check_all(ours, recorded, "out/", quantity="AdamW weights")


def optimizer_trajectory(golden: Golden) -> None:
    """Training steps of the pre-training loss with AdamW and the learning-rate schedule."""
    meta, given = golden.meta, golden.group("in")
    for dtype, suffix in PRECISIONS:
        recorded = golden.group("out" + suffix)
        if not recorded:
            continue
        with precision(dtype):
            ours = _trajectory(golden, meta, given, caster(dtype))
        comparison = Comparison(golden.name, 6, dtype)
        scale = {
            step: max(float(np.abs(v).max()) for k, v in recorded.items() if k.startswith(step + "."))
            for step in {k.split(".")[0] for k in recorded if k.startswith("grad_")}
        }
        for name, value in recorded.items():
            step = name.split(".")[0]
            kind = "gradients" if step in scale else "weights and losses of a training run"
            comparison.check("out/" + name, ours[name], value, quantity=kind, scale=scale.get(step))


def _trajectory(golden: Golden, meta: dict[str, Any], given: dict[str, np.ndarray], cast: Any) -> dict[str, Any]:
    model = build_case(golden)
    optimizer = AdamW(variables_of(model), **meta["optimizer"])
    schedule = CosineWarmupRestarts(**meta["scheduler"])
    draws = [draw for _, draw in golden.draws]
    ours: dict[str, Any] = {}
    losses, rates = [], []
    for k in range(len(given["x"])):
        optimizer.learning_rate.assign(schedule.lr)
        rates.append(schedule.lr)
        with tf.GradientTape(persistent=True) as tape:
            loss = model.loss(
                cast(given["x"][k]), {"state": cast(given["state"][k])}, cast(draws[2 * k]), cast(draws[2 * k + 1])
            )
        losses.append(loss.numpy())
        ours |= {f"grad_step{k + 1}.{n}": g for n, g in torch_gradients(model, tape, loss).items()}
        optimizer.apply(tape.gradient(loss, optimizer.variables))
        schedule.step()
        ours |= {f"step{k + 1}.{n}": w for n, w in torch_names.state_dict(model).items()}
    return ours | {"losses": np.array(losses), "lr": np.array(rates)}


def moving_average(golden: Golden) -> None:
    for dtype, suffix in PRECISIONS:
        recorded = golden.group("out" + suffix)
        if not recorded:
            continue
        average = tf.constant(golden.arrays["in/initial"].astype(dtype))
        ours = []
        for value in golden.arrays["in/current"].astype(dtype):
            average = ema_update(average, tf.constant(value), golden.meta["decay"])
            ours.append(average.numpy())
        Comparison(golden.name, 5, dtype).check_all({"ema": np.stack(ours)}, recorded, "out/", quantity="EMA")


def reward_scaler(golden: Golden) -> None:
    meta = golden.meta
    scaler = RunningRewardScaler(meta["num_envs"], **meta["kwargs"])
    ours: dict[str, list[Any]] = {k: [] for k in ("scaled", "var", "mean", "count", "ret")}
    for reward, first in zip(golden.arrays["in/reward"], golden.arrays["in/first"], strict=True):
        ours["scaled"].append(scaler(reward, first))
        state = scaler.state()
        ours["ret"].append(state["discounted"])
        for name in ("var", "mean", "count"):
            ours[name].append(state[name])
    stacked = {k: np.array(v) for k, v in ours.items()}
    Comparison(golden.name, 1, "float64").check_all(stacked, golden.group("out"), "out/", quantity="reward scaling")


def advantages(golden: Golden) -> None:
    meta = golden.meta
    result = gae(
        golden.arrays["in/rewards"],
        golden.arrays["in/values"],
        golden.arrays["in/next_values"],
        golden.arrays["in/terminated"],
        meta["gamma"],
        meta["gae_lambda"],
        meta["reward_scale_const"],
    )
    ours = dict(zip(("advantages", "returns"), result, strict=True))
    Comparison(golden.name, 3, "float64").check_all(ours, golden.group("out"), "out/", quantity="GAE")


def td_targets(golden: Golden) -> None:
    given = golden.group("in")
    arguments = (given["rewards"], given["terminateds"], given["state_values"])
    ours = {"td": locate(golden.meta["class_path"])(*arguments, **golden.meta["kwargs"])}
    Comparison(golden.name, 3, "float32").check_all(ours, golden.group("out"), "out/", quantity="TD(lambda)")


def improved_actions(golden: Golden) -> None:
    """DIPO's ascent of the critic."""
    meta = golden.meta
    for dtype, suffix in PRECISIONS:
        recorded = golden.group("out" + suffix)
        if not recorded:
            continue
        with precision(dtype):
            cast, critic = caster(dtype), build_case(golden)
            policy = SimpleNamespace(critic=critic)
            given = cast(golden.group("in"))
            steps = (meta["action_lr"], meta["action_gradient_steps"], meta["action_grad_norm"])
            ours = {"guided_action": DIPO.improve(policy, {"state": given["state"]}, given["actions"], *steps)}
        Comparison(golden.name, 3, dtype).check_all(ours, recorded, "out/", quantity="DIPO improved actions")


def sequence_dataset(golden: Golden) -> None:
    """Every item, its place in the data, and their number."""
    recorded = golden.group("out")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "train.npz"
        np.savez(path, **golden.subgroup("dataset"))
        dataset = locate(golden.meta["class_path"])(str(path), **golden.meta["kwargs"])
        items = dataset.gather(np.arange(len(dataset)))._asdict()
    ours = {"length": len(dataset), "indices": dataset.indices}
    ours |= {f"items.conditions.{k}": v for k, v in items.pop("conditions").items()}
    ours |= {f"items.{k}": v for k, v in items.items() if v is not None}
    if getattr(dataset, "get_mc_return", False):
        ours["reward_to_go"] = dataset.reward_to_go
    comparison = Comparison(golden.name, 1, "float32")
    for name, value in recorded.items():
        if name not in ours:
            raise Mismatch(f"{golden.name}: ours gives no {name}")
        comparison.check("out/" + name, ours[name], value, quantity="sequence data set", gate=0.0)


def dataset_split(golden: Golden) -> None:
    """The training part of a split (the reference's validation part is a bug: it is everything, quirk 58)."""
    from diffusion_rl.core.noise import NoiseTape
    from diffusion_rl.data.sequences import SequenceDataset

    recorded, order = golden.group("out"), golden.arrays["in/sample_order"]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "train.npz"
        np.savez(path, **golden.subgroup("dataset"))
        dataset = SequenceDataset(str(path), horizon_steps=4)
        train, validation = dataset.split(0.7, NoiseTape([order]))
    comparison = Comparison(golden.name, 1, "float32")
    ours = dataset.indices[train]
    comparison.check("out/train_indices", ours, recorded["train_indices"], gate=0.0, quantity="sequence data set")
    if sorted([*train, *validation]) != list(range(len(dataset))) or set(train) & set(validation):
        raise Mismatch(f"{golden.name}: training and validation must divide the items between them (quirk 58)")


def _names(prefix: str) -> Callable[[dict[str, Any]], bool]:
    return lambda meta: str(meta.get("class_path", "")).startswith(prefix)


_PIECES: list[tuple[Callable[[dict[str, Any]], bool], Callable[[Golden], None]]] = [
    (lambda meta: "scheduler_kwargs" in meta, learning_rates),
    (lambda meta: "betas" in meta and "eps" in meta, given_gradients),
    (lambda meta: "optimizer" in meta and "scheduler" in meta, optimizer_trajectory),
    (_names("agent.pretrain.train_agent.EMA"), moving_average),
    (_names("agent.finetune.train_awr_diffusion_agent.td_values"), td_targets),
    (lambda meta: "action_gradient_steps" in meta, improved_actions),
    (lambda meta: "num_envs" in meta, reward_scaler),
    (lambda meta: "gae_lambda" in meta, advantages),
    (_names("agent.dataset.sequence."), sequence_dataset),
    (lambda meta: "random.sample" in meta.get("note", ""), dataset_split),
]
