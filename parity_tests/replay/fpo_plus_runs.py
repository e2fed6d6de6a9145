"""Replay of FPO++ as its authors' class was recorded: losses of pairs, gradients, an update, actions from zeros."""

from __future__ import annotations

from typing import Any

import numpy as np
import tensorflow as tf

from diffusion_rl.core.keras import precision
from diffusion_rl.core.optimizers import AdamW
from diffusion_rl.methods.on_policy.fpo import FPO
from diffusion_rl.networks.layers import Network, flatten_state
from parity_tests.replay.compare import Comparison
from parity_tests.replay.files import Golden
from parity_tests.replay.packed import below, unpacked

FAR = 1e6  # they do not clip actions
REGIONS = {"ppo": "clip", "aspo": "asymmetric"}


class Layers(Network):
    """Linear layers with ELU between them."""

    def __init__(self, weights: dict[str, np.ndarray]):
        super().__init__(dtype="float64")
        self.by_name = {name: tf.Variable(value) for name, value in weights.items()}
        self.numbers = sorted({int(name.split(".")[0]) for name in weights})

    def mapped(self, x: Any) -> Any:
        """Maps x [B,D] to [B,out]."""
        for i in self.numbers:
            x = tf.matmul(x, self.by_name[f"{i}.weight"], transpose_b=True) + self.by_name[f"{i}.bias"]
            x = x if i == self.numbers[-1] else tf.nn.elu(x)
        return x


class Velocity(Layers):
    """Their flow from actions at time 0 to noise at 1, as one from noise to actions."""

    def __init__(self, weights: dict[str, np.ndarray], time_dim: int):
        super().__init__(weights)
        self.frequencies = 2.0 ** np.arange(time_dim // 2)

    def call(self, x: Any, time: Any, cond: dict[str, Any]) -> Any:
        angles = (1 - time)[:, None] * self.frequencies
        inputs = tf.concat([flatten_state(cond), tf.cos(angles), tf.sin(angles), x[:, 0]], axis=1)
        return -self.mapped(inputs)[:, None]


class Values(Layers):
    """Their critic."""

    def call(self, cond: dict[str, Any]) -> Any:
        return self.mapped(flatten_state(cond))


def replay(golden: Golden) -> None:
    """Everything of one trust region."""
    with precision("float64"):
        config, weights, recorded = golden.meta["config"], unpacked(golden, "w"), unpacked(golden, "out64")
        given = {name: tf.constant(value) for name, value in golden.group("in").items()}
        modules = {"actor": Velocity(below(weights, "actor."), config["time_dim"])}
        modules["critic"] = Values(below(weights, "critic."))
        sizes = {"horizon_steps": 1, "obs_dim": given["obs"].shape[-1], "action_dim": given["actions"].shape[-1]}
        policy = FPO(
            **modules,
            n_pairs=given["times"].shape[-1],
            clip_ploss_coef=config["clip_param"],
            ratio_per_pair=True,
            trust_region=REGIONS[config["trust_region"]],
            zero_noise=True,
            norm_adv=False,
            inference_steps=config["sampling_steps"],
            time_grid="left",
            act_min=-FAR,
            act_max=FAR,
            **sizes,
        )
        _updates(golden, policy, modules, given, recorded)


def _updates(golden: Golden, policy: FPO, modules: dict[str, Any], given: Any, recorded: Any) -> None:
    config, names = golden.meta["config"], [(part, name) for part in modules for name in modules[part].by_name]
    variables = [modules[part].by_name[name] for part, name in names]
    optimizer = AdamW(variables, config["learning_rate"], config["weight_decay"])
    values = Comparison(golden.name, 3, "float64")
    acted = policy.decide({"state": given["obs"][-1][:, None]}, tf.ones_like(given["actions"][0])[:, None], True)[0]
    values.check("out64/acted", acted[:, 0], recorded["acted"], quantity="FPO++'s actions")
    losses: dict[str, list[Any]] = {"surrogate_loss": [], "value_loss": []}
    for i in range(len(given["obs"])):
        obs, actions = {"state": given["obs"][i][:, None]}, given["actions"][i][:, None]
        pairs = (1 - given["times"][i], given["noise"][i][:, :, None])
        if i == 0:
            ours = policy.pair_losses(obs, actions, *pairs)
            values.check("out64/pair_losses", ours, recorded["pair_losses"], quantity="FPO++'s losses of pairs")
        rows = (given[name][i] for name in ("returns", "values", "advantages", "old_losses"))
        with tf.GradientTape() as tape:
            parts = policy.loss(obs, actions, *rows, *pairs)
            value_loss = 2 * parts["v_loss"]  # ours is half the squared error
            loss = parts["pg_loss"] + config["value_loss_coef"] * value_loss
        gradients = tape.gradient(loss, variables)
        if i == 0:
            theirs = unpacked(golden, "grad64")
            options: dict[str, Any] = {"scale": max(float(np.max(np.abs(value))) for value in theirs.values())}
            for (part, name), gradient in zip(names, gradients, strict=True):
                where = f"{part}.{name}"
                Comparison(golden.name, 4, "float64").check(
                    f"grad64/{where}", gradient, theirs[where], quantity="FPO++'s gradients", **options
                )
        optimizer.apply(gradients)
        losses["surrogate_loss"].append(parts["pg_loss"].numpy())
        losses["value_loss"].append(value_loss.numpy())
    comparison = Comparison(golden.name, 6, "float64")
    for name, each in losses.items():
        comparison.check(f"out64/{name}", np.mean(each), recorded[name], quantity="FPO++'s updates")
    for (part, name), variable in zip(names, variables, strict=True):
        where = f"final.{part}.{name}"
        comparison.check(f"out64/{where}", variable, recorded[where], quantity="FPO++'s weights")


RUNNERS = {"fpo_plus": replay}
