"""Replay of DSRL as its authors' classes were recorded: calls of `train`, and the gradients of their first steps."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import tensorflow as tf

from diffusion_rl.core.keras import precision
from diffusion_rl.core.transitions import Transitions
from diffusion_rl.interop import torch_names
from diffusion_rl.methods.off_policy.algorithm import Phase, Progress
from diffusion_rl.methods.off_policy.dsrl import DSRL
from diffusion_rl.methods.off_policy.learner import Learner
from diffusion_rl.networks.critics import CriticObsAct
from diffusion_rl.networks.gaussian import GaussianMLP
from diffusion_rl.networks.layers import Network, flatten_state
from parity_tests.replay.compare import Comparison
from parity_tests.replay.files import Golden
from parity_tests.replay.flow_q_runs import Rows
from parity_tests.replay.packed import below, unpacked

LOG_STD_RANGE = (-20.0, 2.0)
#: Their modules by ours, and how their layers are called here.
PARTS = {"noise_actor": "actor", "critic": "critic", "target_critic": "critic_target", "noise_critic": "critic_noise"}
LAYERS = {"0": "0.linear_1", "1": "0.norm_1", "3": "1.linear_1", "4": "1.norm_1", "6": "2.linear_1"}
TRUNKS = {"latent_pi": "mlp_base", "qf0": "Q1", "qf1": "Q2"}
HEADS = {"mu": "mlp_mean", "log_std": "mlp_logvar"}


class ClampedGaussian(GaussianMLP):
    """Ours, with standard deviations clamped as theirs are; ours are squashed into their range."""

    def squashed_std(self, raw: Any) -> Any:
        return tf.exp(tf.clip_by_value(raw, *LOG_STD_RANGE))


class Frozen(Network):
    """The flow that was steered."""

    def __init__(self, weights: dict[str, np.ndarray]):
        super().__init__(dtype="float64")
        self.by_name = {name: tf.Variable(value) for name, value in weights.items()}

    def call(self, x: Any, time: Any, cond: dict[str, Any]) -> Any:
        w = self.by_name
        inputs = tf.concat([tf.reshape(x, [tf.shape(x)[0], -1]), time[:, None], flatten_state(cond)], axis=1)
        hidden = tf.tanh(tf.matmul(inputs, w["0.weight"], transpose_b=True) + w["0.bias"])
        return tf.reshape(tf.matmul(hidden, w["1.weight"], transpose_b=True) + w["1.bias"], tf.shape(x))


def our_name(theirs: str) -> str:
    """The name in our state_dict of one of a module's tensors."""
    module, *layer, kind = theirs.split(".")
    if module in HEADS:
        return f"{HEADS[module]}.moduleList.0.linear_1.{kind}"
    return f"{TRUNKS[module]}.moduleList.{LAYERS[layer[0]]}.{kind}"


def policy_of(golden: Golden) -> DSRL:
    """Our policy with their weights."""
    config, weights, width = golden.meta["config"], unpacked(golden, "w"), golden.arrays["in/observations"].shape[-1]
    sizes = {"horizon_steps": config["horizon_steps"], "action_dim": config["action_dim"]}
    layers: dict[str, Any] = {"mlp_dims": [config["width"]] * 2, "activation_type": "Tanh", "use_layernorm": True}
    spread = {"tanh_output": False, "std_min": 0.1, "std_max": 1.0}
    policy = DSRL(
        critic=CriticObsAct(width, action_dim=sizes["action_dim"], action_steps=sizes["horizon_steps"], **layers),
        network=Frozen(below(weights, "frozen.")),
        noise_actor=ClampedGaussian(**sizes, cond_dim=width, **layers, **spread),
        noise_aliased=config["noise_steps"] > 0,
        sampling={"inference_steps": config["flow_steps"], "time_grid": "left"},
        noise_bound=config["noise_bound"],
        obs_dim=width,
        **sizes,
    )
    for ours, theirs in PARTS.items():
        own = {our_name(name): value for name, value in below(weights, f"{theirs}.").items()}
        if own:
            assert set(torch_names.load_state_dict(getattr(policy, ours), own, strict=False)) == set(own)
    return policy


class Kept:
    """Stands in the place of the optimizers, and keeps the first gradient of each part."""

    def __init__(self, learner: Learner):
        self.learner = learner
        self.gradients: dict[str, list[Any]] = {}

    def __call__(self, part: str, loss: Any) -> Any:
        with tf.GradientTape() as tape:
            value = loss()
        self.gradients.setdefault(part, tape.gradient(value, self.learner.parts[part].variables))
        return self.learner.optimizers(part, loss)


def replay(golden: Golden) -> None:
    """Everything of one class."""
    with precision("float64"):
        policy, config, recorded = policy_of(golden), golden.meta["config"], unpacked(golden, "out64")
        given = {
            name: value.reshape(-1, value.shape[-1]) for name, value in golden.group("in").items() if "draw" not in name
        }
        actions = given["actions"].reshape(-1, config["horizon_steps"], config["action_dim"])
        obs, next_obs = (given[name][:, None] for name in ("observations", "next_observations"))
        rows = Transitions(obs, actions, next_obs, given["rewards"][:, 0], given["dones"][:, 0])
        data = SimpleNamespace(online=Rows(Transitions(*(None if x is None else tf.constant(x) for x in rows))))
        rate = config["learning_rate"]
        settings: dict[str, Any] = {"actor_lr": rate, "critic_lr": rate, "gamma": config["gamma"]}
        settings |= {"target_ema_rate": config["tau"], "init_temperature": config["init_temperature"]}
        settings |= {"target_entropy": config["target_entropy"], "n_explore_steps": 0}
        settings |= {"num_update": config["steps"], "noise_critic_num_update": config["noise_steps"]}
        learner = Learner(policy, settings, data)
        phases = policy.phases(settings, Progress(0, 0, 0, 0))
        calls = _draws(golden, policy, phases)
        _gradients(golden, policy_of(golden), settings, data, phases, calls[0])
        comparison = Comparison(golden.name, 6, "float64")
        for i, drawn in enumerate(calls):
            losses, alpha = {}, policy.alpha.numpy()
            for phase, draws in zip(phases, drawn, strict=True):
                losses |= learner._call(phase, draws)
            ours = {"critic_loss": losses["loss_critic"], "actor_loss": losses["loss_actor"]}
            ours["ent_coef_loss"] = losses["loss_temperature"]
            if policy.noise_aliased:
                ours["noise_critic_loss"] = losses["loss_noise_critic"]
            means = {f"call{i}.{name}": np.mean(values) for name, values in ours.items()}
            means[f"call{i}.log_ent_coef"] = policy.watched()["log_alpha"]
            comparison.check_all(
                means | {f"call{i}.ent_coef": alpha},
                {name: recorded[name] for name in means},
                "out64/",
                quantity="DSRL's updates",
            )
        for ours_, theirs in PARTS.items():
            final = below(recorded, f"final.{theirs}.")
            if final:
                now = torch_names.state_dict(getattr(policy, ours_))
                comparison.check_all(
                    {name: now[our_name(name)] for name in final},
                    final,
                    f"out64/final.{theirs}.",
                    quantity="DSRL's weights",
                )


def _draws(golden: Golden, policy: DSRL, phases: list[Phase]) -> list[list[list[dict[str, np.ndarray]]]]:
    """What ours draws, by call, phase and update; of theirs a step draws the noise of the actor's loss first."""
    tape, batches, calls = iter(draw for _, draw in golden.draws), 0, []
    batch = golden.arrays["in/observations"].shape[1]
    for _ in range(golden.meta["config"]["calls"]):
        drawn: list[list[dict[str, np.ndarray]]] = []
        for phase in phases:
            drawn.append([])
            for _ in range(phase.n):
                draws = {"rows": np.arange(batches * batch, (batches + 1) * batch)}
                if phase.draw == "draw":
                    noise, following = next(tape), next(tape)
                    draws["noise"] = np.stack([following, noise])
                else:
                    draws["aliases"] = next(tape).reshape(policy.noise_shape(batch))
                drawn[-1].append(draws)
                batches += 1
        calls.append(drawn)
    assert next(tape, None) is None
    return calls


def _gradients(golden: Golden, policy: DSRL, settings: Any, data: Any, phases: list[Phase], drawn: Any) -> None:
    """Those of the first step of each optimizer, one update at a time."""
    learner = Learner(policy, settings, data)
    kept = Kept(learner)
    for phase, draws in zip(phases, drawn, strict=True):
        for one in draws:
            tensors = {name: tf.constant(value) for name, value in one.items()}
            getattr(policy, phase.update)(data, tensors, kept, settings, True)
    recorded = unpacked(golden, "grad64")
    scale = max(float(np.max(np.abs(value))) for value in recorded.values())
    comparison = Comparison(golden.name, 4, "float64")
    options: dict[str, Any] = {"scale": scale, "quantity": "DSRL's gradients"}
    comparison.check("grad64/log_ent_coef", kept.gradients["log_alpha"][0], recorded["log_ent_coef"][0], **options)
    for part, ours in {"actor": "noise_actor", "critic": "critic", "noise_critic": "noise_critic"}.items():
        if part not in kept.gradients:
            continue
        by_variable = {id(v): g for v, g in zip(learner.parts[part].variables, kept.gradients[part], strict=True)}
        parameters = {p.name: p for p in torch_names.named_parameters(getattr(policy, ours))}
        for name, theirs in below(recorded, f"{PARTS[ours]}.").items():
            parameter = parameters[our_name(name)]
            gradient = by_variable[id(parameter.variable)].numpy()
            if theirs.ndim > 1:
                gradient = gradient.T
            comparison.check(f"grad64/{part}.{name}", gradient, theirs, **options)


RUNNERS = {"dsrl": replay}
