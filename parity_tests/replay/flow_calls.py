"""How each recorded call of ReinFlow's classes is made on our side; see `replay.calls`."""

from __future__ import annotations

from typing import Any

import numpy as np
import tensorflow as tf

from diffusion_rl.policies.flow import Counting, FlowPolicy
from parity_tests.replay.files import Cast, Golden, Outputs

FLOW, SHORTCUT = "model.flow.mlp_flow.", "model.flow.mlp_shortcut."
PPO_FLOW, PPO_SHORTCUT = "model.flow.ft_ppo.ppoflow.PPOFlow", "model.flow.ft_ppo.pposhortcut.PPOShortCut"


def velocity(obj: Any, golden: Golden, cast: Cast) -> Outputs:
    """A velocity's network: action, time, [dt,] cond in the reference's order."""
    given = cast(golden.arguments)
    size = (given["dt"],) if "dt" in given else ()
    return {"out": obj(given["action"], given["time"], given["cond"], *size)}


def noisy(obj: Any, golden: Golden, cast: Cast) -> Outputs:
    """A velocity with noise; calls that come before, and attributes that are read after."""
    for name, arguments in golden.meta["pre_calls"] or []:
        assert name == "explore_noise_net.set_noise_range"
        obj.explore_noise_net.set_range(*arguments["logprob_denoising_std_range"])
    given = cast(golden.arguments)
    size = (given["dt"],) if "dt" in given else ()
    velocity, std = obj(given["action"], given["time"], given["cond"], given["step"], *size)
    outputs = {"vel": velocity, "noise_std": std if given["learn_exploration_noise"] else tf.stop_gradient(std)}
    for name in golden.meta["attrs"] or []:
        if name == "logprob_noise_levels":
            outputs[f"attr.{name}"] = obj.levels[None]
        else:
            outputs[f"attr.{name}"] = getattr(obj.explore_noise_net, name.rpartition(".")[2])
    return outputs


def sample_action(obj: Any, golden: Golden, cast: Cast) -> Outputs:
    """The reference leaves the first entry of the chain empty, and changes the given noise in place."""
    given = cast(golden.arguments)
    policy = FlowPolicy(obj, obj.horizon_steps, obj.cond_dim, obj.action_dim, *golden.arguments["act_range"])
    n, x = given["inference_steps"], given["z"]
    chain, after = [tf.zeros_like(x)], None
    for time in np.linspace(0, 1, n):
        moved = x + policy.velocity(x, tf.fill([x.shape[0]], tf.constant(time, x.dtype)), given["cond"], 1 / n) / n
        after = moved if after is None else after
        x = tf.clip_by_value(moved, policy.act_min, policy.act_max)
        chain.append(x)
    return {
        "x": policy.sample(given["cond"], given["z"], n).trajectories,
        "chain": tf.stack(chain, axis=1),
        "after.z": after,
    }


def flow_sample(obj: Any, golden: Golden, cast: Cast) -> Outputs:
    given = cast(golden.arguments)
    ((_, noise),) = golden.draws
    return {"trajectories": obj.sample(given["cond"], cast(noise), given["inference_steps"]).trajectories}


def target(obj: Any, golden: Golden, cast: Cast) -> Outputs:
    """Draws: what the times are made of, and the noise."""
    (_, times), (_, noise) = golden.draws
    x, aim = obj.between(cast(golden.arguments["x1"]), cast(times), cast(noise))
    return {"xt_t.0": x, "xt_t.1": cast(times), "v": aim}


def flow_loss(obj: Any, golden: Golden, cast: Cast) -> Outputs:
    given = cast(golden.arguments)
    return {"loss": obj.velocity_loss(given["xt"], given["t"], given["obs"], given["v"])}


def shortcut_loss(obj: Any, golden: Golden, cast: Cast) -> Outputs:
    """Draws: exponents, a whole number for each time, the noise; times and noise of the other rows."""
    (_, exponents), *numbers, (_, first), (_, uniform), (_, rest) = golden.draws
    sections = np.exp2(exponents)
    times = np.concatenate([np.concatenate([n for _, n in numbers]) / sections, uniform])
    steps = np.concatenate([1 / sections, np.zeros(len(uniform))])
    given = cast(golden.arguments)
    both = cast(np.stack([times, steps], axis=-1))
    return {"loss": obj.loss(given["x1"], given["cond"], both, cast(np.concatenate([first, rest])))}


def _counting(golden: Golden) -> Counting:
    names = ("account_for_initial_stochasticity", "normalize_denoising_horizon", "normalize_act_space_dimension")
    return Counting(*(bool(golden.arguments[name]) for name in names))


def as_recorded(obj: Any) -> Any:
    """The reference's own time grids."""
    obj.time_grid = "upstream" if type(obj).__name__ == "ReinFlow" else obj.time_grid
    return obj


def get_actions(obj: Any, golden: Golden, cast: Cast) -> Outputs:
    noise = cast(
        np.stack([draw.reshape(golden.draws[0][1].shape[0], obj.horizon_steps, -1) for _, draw in golden.draws])
    )
    sample = as_recorded(obj).sample(
        cast(golden.arguments["cond"]), noise, golden.arguments["eval_mode"], _counting(golden)
    )
    return {"actions": sample.trajectories, "chains": sample.chains, "logprob": sample.log_probs}


def get_logprobs(obj: Any, golden: Golden, cast: Cast) -> Outputs:
    given = cast(golden.arguments)
    results = as_recorded(obj).log_probs(given["cond"], given["x_chain"], _counting(golden))
    outputs = dict(zip(("logprob", "entropy", "std_mean"), results, strict=True))
    return outputs | {"std_mean": tf.reduce_mean(outputs["std_mean"])}


def ppo_loss(obj: Any, golden: Golden, cast: Cast) -> Outputs:
    """The reference's losses, and what it watches beside them."""
    given, counting = cast(golden.arguments), _counting(golden)
    names = ("obs", "chains", "returns", "oldvalues", "advantages", "oldlogprobs")
    obj = as_recorded(obj)
    losses = obj.loss(*(given[name] for name in names), use_bc_loss=given.get("use_bc_loss", False), counting=counting)
    low, high = obj.log_prob_range
    watched = {}
    for name, value in (
        ("old", given["oldlogprobs"]),
        ("new", obj.log_probs(given["obs"], given["chains"], counting)[0]),
    ):
        clipped = tf.clip_by_value(value, low, high)
        watched[f"{name}logprob_min"], watched[f"{name}logprob_max"] = tf.reduce_min(clipped), tf.reduce_max(clipped)
        n = tf.cast(tf.size(clipped), clipped.dtype)
        watched[f"{name}logprob_std"] = tf.math.reduce_std(clipped) * tf.sqrt(n / (n - 1))
    values = tf.reduce_mean(obj.critic(given["obs"]))
    return {**losses, **watched, "noise_std": losses["std"], "values_mean": values}


CALLS = {
    (f"{FLOW}FlowMLP", "forward"): (velocity, 2),
    (f"{FLOW}VisionFlowMLP", "forward"): (velocity, 2),
    (f"{SHORTCUT}ShortCutFlowMLP", "forward"): (velocity, 2),
    (f"{FLOW}NoisyFlowMLP", "forward"): (noisy, 2),
    (f"{SHORTCUT}NoisyShortCutFlowMLP", "forward"): (noisy, 2),
    (f"{FLOW}FlowMLP", "sample_action"): (sample_action, 3),
    ("model.flow.reflow.ReFlow", "sample"): (flow_sample, 3),
    ("model.flow.reflow.ReFlow", "generate_target"): (target, 3),
    ("model.flow.reflow.ReFlow", "loss"): (flow_loss, 3),
    ("model.flow.shortcutflow.ShortCutFlow", "sample"): (flow_sample, 3),
    ("model.flow.shortcutflow.ShortCutFlow", "loss"): (shortcut_loss, 3),
}
for _class in (PPO_FLOW, PPO_SHORTCUT):
    CALLS |= {
        (_class, "get_actions"): (get_actions, 3),
        (_class, "get_logprobs"): (get_logprobs, 3),
        (_class, "loss"): (ppo_loss, 3),
    }
