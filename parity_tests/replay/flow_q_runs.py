"""Replay of flow Q-learning and Q-chunking as their authors' agents were recorded: losses, gradients, updates."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import tensorflow as tf

from diffusion_rl.core.keras import precision
from diffusion_rl.core.transitions import Transitions
from diffusion_rl.methods.off_policy.algorithm import Phase
from diffusion_rl.methods.off_policy.fql import FQL, BestOfFlow
from diffusion_rl.methods.off_policy.learner import Learner
from diffusion_rl.networks.layers import Network, flatten_state
from parity_tests.replay.compare import Comparison
from parity_tests.replay.files import Golden
from parity_tests.replay.packed import below, unpacked

LAYER_NORM_EPSILON = 1e-6


def gelu(x: Any) -> Any:
    """GELU by tanh, [...] -> [...]; TensorFlow's own has a constant in single precision."""
    return 0.5 * x * (1 + tf.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


class AuthorsMLP(Network):
    """Their MLP, whose time is a number: layers of GELU's approximation, in critics followed by LayerNorm, and two
    values at once.

    Args:
        weights: by their names, without that of the module.
    """

    def __init__(self, weights: dict[str, np.ndarray]):
        super().__init__(dtype="float64")
        self.by_name = {name: tf.Variable(value) for name, value in weights.items()}
        self.depth = sum(name.endswith("kernel") for name in weights)

    def mapped(self, *inputs: Any) -> Any:
        """Maps inputs [B,*] to [B,D], or [2,B,D] in critics."""
        w, x = self.by_name, tf.concat(inputs, axis=-1)
        for i in range(self.depth):
            bias = w[f"Dense_{i}.bias"]
            x = tf.matmul(x, w[f"Dense_{i}.kernel"]) + (bias[:, None] if len(bias.shape) > 1 else bias)
            if i == self.depth - 1:
                break
            x = gelu(x)
            if f"LayerNorm_{i}.scale" in w:
                mean, variance = tf.nn.moments(x, axes=[-1], keepdims=True)
                scale, shift = w[f"LayerNorm_{i}.scale"][:, None], w[f"LayerNorm_{i}.bias"][:, None]
                x = (x - mean) / tf.sqrt(variance + LAYER_NORM_EPSILON) * scale + shift
        return x


class AuthorsVelocity(AuthorsMLP):
    """Their flow's velocity."""

    def call(self, x: Any, time: Any, cond: dict[str, Any]) -> Any:
        out = self.mapped(flatten_state(cond), tf.reshape(x, [tf.shape(x)[0], -1]), time[:, None])
        return tf.reshape(out, tf.shape(x))


class AuthorsOneStep(AuthorsMLP):
    """Their one-step policy, as a velocity."""

    def call(self, x: Any, time: Any, cond: dict[str, Any]) -> Any:
        out = self.mapped(flatten_state(cond), tf.reshape(x, [tf.shape(x)[0], -1]))
        return tf.reshape(out, tf.shape(x)) - x


class AuthorsCritic(AuthorsMLP):
    """Both of their critics."""

    def call(self, cond: dict[str, Any], actions: Any) -> tuple[Any, Any]:
        first, second = tf.unstack(self.mapped(flatten_state(cond), tf.reshape(actions, [tf.shape(actions)[0], -1])))
        return first[:, 0], second[:, 0]


#: Their modules, our parts and what their names begin with.
MODULES = {
    "actor": "modules_actor_onestep_flow.mlp.",
    "flow": "modules_actor_bc_flow.mlp.",
    "critic": "modules_critic.value_net.",
    "critic_target": "modules_target_critic.value_net.",
}
CLASSES = {"actor": AuthorsOneStep, "flow": AuthorsVelocity, "critic": AuthorsCritic, "critic_target": AuthorsCritic}


class Rows:
    """Rows of experience, with `at` as buffers have it."""

    def __init__(self, fields: Transitions):
        self.fields = fields

    def at(self, rows: Any) -> Transitions:
        return Transitions(*(None if field is None else tf.gather(field, rows) for field in self.fields))


def policy_of(golden: Golden) -> FQL:
    """Our agent with their networks and weights."""
    config, weights, shape = golden.meta["config"], unpacked(golden, "w"), golden.arrays["in/actions"].shape
    horizon = config.get("horizon_length", 1)
    parts = {}
    for name, start in MODULES.items():
        parts[name] = CLASSES[name](below(weights, start))
    target = parts.pop("critic_target")
    options: dict[str, Any] = {name: config[name] for name in ("flow_steps", "alpha", "q_agg")}
    options |= {"normalize_q_loss": config.get("normalize_q_loss", False), "horizon_steps": horizon}
    options |= {"obs_dim": golden.arrays["in/observations"].shape[-1], "action_dim": shape[-1]}
    if config.get("actor_type") == "best-of-n":
        del parts["actor"]
        options["n_candidates"] = config["actor_num_samples"]
    policy = (FQL if "actor" in parts else BestOfFlow)(**parts, **options)
    policy.critic_target = target
    return policy


def replay(golden: Golden) -> None:
    """Everything of one agent."""
    with precision("float64"):
        policy, config, given = policy_of(golden), golden.meta["config"], golden.group("in")
        updates, batch = given["observations"].shape[:2]
        horizon = config.get("horizon_length", 1)
        gamma = config["discount"] ** horizon
        chunks = horizon > 1
        last = {k: given[k][:, :, -1] if chunks else given[k] for k in ("next_observations", "rewards", "masks")}
        rows = {
            "obs": given["observations"][..., None, :],
            "actions": given["actions"].reshape(updates, batch, horizon, -1),
            "next_obs": last["next_observations"][..., None, :],
            "rewards": last["rewards"],
            "terminated": 1 - last["masks"],
        }
        flat = {name: tf.constant(value.reshape(-1, *value.shape[2:])) for name, value in rows.items()}
        data = SimpleNamespace(offline=Rows(Transitions(**flat)))
        draws = _draws(golden, policy, batch)
        recorded = unpacked(golden, "out64")
        _first(golden, policy, data.offline.at(np.arange(batch)), draws[0], gamma, recorded)
        _updates(golden, policy, data, draws, gamma, recorded)


def _draws(golden: Golden, policy: FQL, batch: int) -> list[dict[str, np.ndarray]]:
    """What ours draws for each update, of theirs in the order of their calls: noise of the next actions, of the flow's
    loss, its times, and the noise of the one-step policy's loss; what follows is for their metrics alone."""
    tape, per_update = [draw for _, draw in golden.draws], golden.meta["config"]["draws_per_update"]
    shape, updates = policy.noise_shape(batch), []
    for i in range(golden.meta["config"]["updates"]):
        following, noise, time, *rest = tape[i * per_update : (i + 1) * per_update]
        updates.append(
            {
                "rows": np.arange(i * batch, (i + 1) * batch),
                "next_noise": following.reshape(policy.candidates_shape(batch)),
                "time": time[:, 0],
                "noise": np.stack([part.reshape(shape) for part in (noise, rest[0] if rest else noise)]),
            }
        )
    return updates


def _first(golden: Golden, policy: FQL, batch: Transitions, draws: Any, gamma: float, recorded: Any) -> None:
    """Samples, losses and gradients at the weights given."""
    cond, (noise, policy_noise) = {"state": batch.obs}, tf.constant(draws["noise"])
    following, time = tf.constant(draws["next_noise"]), tf.constant(draws["time"])
    samples = Comparison(golden.name, 3, "float64")
    n = len(batch.obs)
    carried = tf.reshape(policy.carried(cond, noise), [n, -1])
    samples.check("out64/flow_actions", carried, recorded["flow_actions"], quantity="FQL's samples")
    chosen = tf.reshape(policy.chosen(cond, following), [n, -1])
    samples.check("out64/actions", chosen, recorded["actions"], quantity="FQL's samples")
    next_value = policy.next_value(batch.next_obs, following)
    with tf.GradientTape(persistent=True) as tape:
        ours = {
            "critic.critic_loss": policy.loss_critic(batch, gamma, next_value),
            "actor.bc_flow_loss": policy.loss_flow(batch.obs, batch.actions, time, noise),
        }
        theirs = recorded["first.actor.actor_loss"]
        if policy.DISTILS:
            ours["actor.one_step"] = policy.loss_actor(batch.obs, policy_noise)
        total = tf.add_n(list(ours.values()))
    ours["actor.actor_loss"] = total - ours["critic.critic_loss"]
    one_step = ours.pop("actor.one_step", None)
    for name, value in ours.items():
        samples.check(f"out64/first.{name}", value, recorded[f"first.{name}"], quantity="FQL's losses")
    if one_step is not None:
        theirs = theirs - recorded["first.actor.bc_flow_loss"]
        samples.check("out64/first.one_step", one_step, theirs, quantity="FQL's losses")
    gradients, comparison = unpacked(golden, "grad64"), Comparison(golden.name, 4, "float64")
    scale = max(float(np.max(np.abs(value))) for value in gradients.values())
    of_parts = {"critic": ours["critic.critic_loss"], "flow": ours["actor.bc_flow_loss"], "actor": one_step}
    for part, loss in of_parts.items():
        for name, gradient in tape.gradient(loss, getattr(policy, part).by_name).items() if loss is not None else ():
            comparison.check(
                f"grad64/{part}.{name}",
                gradient,
                gradients[MODULES[part] + name],
                scale=scale,
                quantity="FQL's gradients",
            )


def _updates(golden: Golden, policy: FQL, data: Any, draws: list[Any], gamma: float, recorded: Any) -> None:
    """Their updates in one compiled call of ours."""
    config = golden.meta["config"]
    settings = {"actor_lr": config["lr"], "critic_lr": config["lr"], "target_ema_rate": config["tau"]}
    settings |= {"gamma": gamma, "batch_size": len(draws[0]["rows"]), "train_online": False}
    learner = Learner(policy, settings, data)
    losses = learner._call(Phase(len(draws)), draws)
    comparison = Comparison(golden.name, 6, "float64")
    names = {"loss_critic": "critic.critic_loss", "loss_flow": "actor.bc_flow_loss"}
    for name, theirs in names.items():
        expected = np.stack([recorded[f"update{i}.{theirs}"] for i in range(len(draws))])
        comparison.check(f"out64/{theirs}", losses[name], expected, quantity="FQL's updates")
    parts = {name: getattr(policy, name) for name in MODULES if name != "actor" or policy.DISTILS}
    for part, module in parts.items():
        for name, variable in module.by_name.items():
            theirs = recorded[f"final.{MODULES[part]}{name}"]
            comparison.check(f"out64/final.{part}.{name}", variable, theirs, quantity="FQL's weights")


RUNNERS = {"flow_q": replay}
