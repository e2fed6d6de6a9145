"""How each recorded call of ReinFlow's classes is made on our side; see `replay.calls`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import numpy as np
import tensorflow as tf

from diffusion_rl.diffusion.gaussian import normal_log_prob
from diffusion_rl.methods.on_policy import reinflow
from diffusion_rl.policies import flow
from diffusion_rl.policies.flow import Counting, FlowPolicy, time_grid
from parity_tests.replay.files import Cast, Golden, Outputs

FLOW, SHORTCUT = "model.flow.mlp_flow.", "model.flow.mlp_shortcut."
PPO_FLOW, PPO_SHORTCUT = "model.flow.ft_ppo.ppoflow.PPOFlow", "model.flow.ft_ppo.pposhortcut.PPOShortCut"


def drawn(golden: Golden, *kinds: str) -> list[np.ndarray]:
    """The draws of these kinds, in order."""
    return [draw for fn, draw in golden.draws if fn in kinds]


def noise_draws(golden: Golden) -> list[np.ndarray]:
    """The normal draws that are noise of samples."""
    return drawn(golden, "torch.randn", "torch.randn_like", "Normal.sample.eps")


@contextmanager
def each_look_shifted(obj: Any, golden: Golden, cast: Cast) -> Iterator[None]:
    """Serves recorded shifts of images to every look of the networks at an observation, as the reference draws them;
    ours looks once and has them as an argument."""
    networks = [part for part in seeing(obj) if part.vision.augment]
    if not networks:
        yield
        return
    shifts = iter(draw[:, 0, 0] for draw in drawn(golden, "torch.randint") if draw.ndim == 4)

    def look(network: Any) -> Callable[[Any], Any]:
        def encode(cond: Any, *given: Any) -> Any:
            if "features" in cond:
                return cond
            cameras = [next(shifts) for _ in range(network.vision.num_img)]
            return type(network).encode(network, cond, cast(np.stack(cameras, axis=1)))

        return encode

    with ExitStack() as patches:
        for module in (flow, reinflow):
            patches.enter_context(mock.patch.object(module, "encoded", lambda network, cond: cond))
        for network in networks:
            patches.enter_context(mock.patch.object(network, "encode", look(network)))
        yield
    assert next(shifts, None) is None, "looks of the reference are left over"


def seeing(obj: Any) -> list[Any]:
    """The networks of an object that see images."""
    places = (obj, *(getattr(obj, name, None) for name in ("network", "policy", "actor_old")))
    return [part for i, part in enumerate(places) if hasattr(part, "vision") and part not in places[:i]]


def shifted(call: Callable[[Any, Golden, Cast], Outputs]) -> Callable[[Any, Golden, Cast], Outputs]:
    """An adapter inside `each_look_shifted`."""

    def adapter(obj: Any, golden: Golden, cast: Cast) -> Outputs:
        with each_look_shifted(obj, golden, cast):
            return call(obj, golden, cast)

    return adapter


def named(golden: Golden, *values: Any) -> Outputs:
    """Results under the names that the recording gives them."""
    return dict(zip(golden.meta["returns"], values, strict=False))


def _inputs(given: dict[str, Any]) -> tuple[Any, ...]:
    """Action, time [B] (the reference also takes one number), cond, and a shortcut model's step size."""
    time, action = given["time"], given["action"]
    if not tf.is_tensor(time):
        time = tf.fill([action.shape[0]], tf.constant(time, action.dtype))
    return action, time, given["cond"], *(given[name] for name in ("dt", "d") if name in given)


def velocity(obj: Any, golden: Golden, cast: Cast) -> Outputs:
    """A velocity's network: action, time, [dt,] cond in the reference's order."""
    given = cast(golden.arguments)
    action, time, cond, *size = _inputs(given)
    cond = obj.encode(cond) if hasattr(obj, "encode") else cond
    embeddings = obj.embed(time, cond, *size) if given.get("output_embedding") else ()
    return named(golden, obj(action, time, cond, *size), *embeddings)


def noisy(obj: Any, golden: Golden, cast: Cast) -> Outputs:
    """A velocity with noise; calls that come before, and attributes that are read after."""
    for name, arguments in golden.meta.get("pre_calls") or []:
        before(obj, name, arguments)
    given = cast(golden.arguments)
    action, time, cond, *size = _inputs(given)
    velocity, std = obj(action, time, cond, given.get("step", obj.denoising_steps - 1), *size)
    outputs = named(golden, velocity, std if given.get("learn_exploration_noise") else tf.stop_gradient(std))
    return outputs | {f"attr.{name}": attribute(obj, name) for name in golden.meta.get("attrs") or []}


def before(obj: Any, name: str, arguments: dict[str, Any]) -> None:
    """A call that changes the noise before the recorded one; `obj` is a velocity with noise or a policy."""
    noisy = getattr(obj, "actor_ft", obj)
    if name.endswith("set_noise_range"):
        getattr(noisy, "explore_noise_net", noisy).set_range(*arguments["logprob_denoising_std_range"])
    else:
        assert name.endswith("set_logprob_noise_levels"), name
        if arguments.get("force_level"):
            noisy.set_level(arguments["force_level"])


def attribute(obj: Any, name: str) -> Any:
    """An attribute by the reference's name."""
    noisy = getattr(obj, "actor_ft", obj)
    if name.endswith("logprob_noise_levels"):
        return np.repeat(noisy.levels[None, :, None], noisy.out_dim, axis=2)
    return getattr(noisy, name.rpartition(".")[2], None) or getattr(noisy.explore_noise_net, name.rpartition(".")[2])


def noise_network(obj: Any, golden: Golden, cast: Cast) -> Outputs:
    """The network of the noise; the bounds may have been moved before."""
    for name, arguments in golden.meta.get("pre_calls") or []:
        before(obj, name, arguments)
    (features,) = cast(golden.arguments).values()
    outputs = named(golden, obj(features) if golden.meta["method"] == "forward" else obj.within_bounds(features))
    return outputs | {f"attr.{name}": getattr(obj, name) for name in golden.meta.get("attrs") or []}


def sample_action(obj: Any, golden: Golden, cast: Cast) -> Outputs:
    """The reference leaves the first entry of the chain empty, and changes the given noise in place."""
    given = cast(golden.arguments)
    policy = FlowPolicy(obj, obj.horizon_steps, obj.cond_dim, obj.action_dim, *golden.arguments["act_range"])
    n, each = given["inference_steps"], given["clip_intermediate_actions"]
    start = given["z"] if given.get("z") is not None else cast(noise_draws(golden)[0])
    x, chain, after = start, [tf.zeros_like(start)], None
    for i, time in enumerate(np.linspace(0, 1, n)):
        moved = x + policy.velocity(x, tf.fill([x.shape[0]], tf.constant(time, x.dtype)), given["cond"], 1 / n) / n
        after = moved if after is None or not each else after
        x = tf.clip_by_value(moved, policy.act_min, policy.act_max) if each or i == n - 1 else moved
        chain.append(x)
    whole = policy.sample(given["cond"], start, n, each).trajectories
    return named(golden, whole, tf.stack(chain, axis=1)) | {"after.z": after}


def flow_sample(obj: Any, golden: Golden, cast: Cast) -> Outputs:
    """A sample; a list of its steps is not ours (the reference makes it of a batch of one only)."""
    given = cast(golden.arguments)
    start = given["z"] if given.get("z") is not None else cast(noise_draws(golden)[0])
    n, each = given["inference_steps"], given.get("clip_intermediate_actions", True)
    outputs = {"trajectories": obj.sample(given["cond"], start, n, each).trajectories}
    if not given.get("record_intermediate") and given.get("z") is None:
        return outputs
    x, after, steps = start, None, []
    for i, time in enumerate(time_grid(obj.time_grid, n)):
        now = tf.fill([x.shape[0]], tf.constant(time, x.dtype))
        moved = x + obj.velocity(x, now, given["cond"], 1 / n) / n
        after = moved if after is None or not each else after
        x = tf.clip_by_value(moved, obj.act_min, obj.act_max) if each or i == n - 1 else moved
        steps.append(x[0])
    return outputs | {"chains": tf.stack(steps), "after.z": after}


def times_of(golden: Golden) -> np.ndarray:
    """Times of training from what the reference makes them of."""
    ((fn, draw),) = [(fn, draw) for fn, draw in golden.draws if fn in TIMES]
    return TIMES[fn](draw.astype(np.float64))


def target(obj: Any, golden: Golden, cast: Cast) -> Outputs:
    """Draws: what the times are made of, and the noise."""
    times = cast(times_of(golden))
    x, aim = obj.between(cast(golden.arguments["x1"]), times, cast(noise_draws(golden)[0]))
    first, second = golden.meta["returns"]
    return {f"{first}.0": x, f"{first}.1": times, second: aim}


def sample_time(obj: Any, golden: Golden, cast: Cast) -> Outputs:
    return named(golden, times_of(golden))


def trajectory(obj: Any, golden: Golden, cast: Cast) -> Outputs:
    given = cast(golden.arguments)
    return named(golden, obj.between(given["x1"], given["t"], given["x0"])[0])


def flow_loss(obj: Any, golden: Golden, cast: Cast) -> Outputs:
    given = cast(golden.arguments)
    return {"loss": obj.velocity_loss(given["xt"], given["t"], given["obs"], given["v"])}


def shortcut_draws(draws: list[tuple[str, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """Times with step sizes [B,2] and noise [B,H,A]. Draws: exponents, a whole number for each time, the noise; times
    and noise of the other rows."""
    whole = [draw for fn, draw in draws if fn == "torch.randint" and draw.ndim == 1]
    exponents, *numbers = whole
    (uniform,) = (draw for fn, draw in draws if fn == "torch.rand")
    sections = np.exp2(exponents)
    consistent = np.concatenate(numbers) / sections if numbers else np.zeros(0)
    times, steps = np.concatenate([consistent, uniform]), np.concatenate([1 / sections, np.zeros(len(uniform))])
    noise = np.concatenate([draw for fn, draw in draws if fn == "torch.randn_like"])
    return np.stack([times, steps], axis=-1), noise


def shortcut_loss(obj: Any, golden: Golden, cast: Cast) -> Outputs:
    given = cast(golden.arguments)
    return {"loss": obj.loss(given["x1"], given["cond"], *map(cast, shortcut_draws(golden.draws)))}


def _counting(golden: Golden, initial: bool = True) -> Counting:
    """How log-probabilities are counted; `initial`: the reference's default for where a chain begins."""
    given = golden.arguments
    flags = (given.get(name, False) for name in ("normalize_denoising_horizon", "normalize_act_space_dimension"))
    return Counting(bool(given.get("account_for_initial_stochasticity", initial)), *map(bool, flags))


def as_recorded(obj: Any, golden: Golden) -> Any:
    """The reference's own time grids, what was called before, and the switch that is an argument there."""
    obj.time_grid = "upstream" if type(obj).__name__ == "ReinFlow" else obj.time_grid
    for name, arguments in golden.meta.get("pre_calls") or []:
        before(obj, name, arguments)
    if not golden.arguments.get("clip_intermediate_actions", True):
        obj.denoised_clip_value = float("inf")
    return obj


def get_actions(obj: Any, golden: Golden, cast: Cast) -> Outputs:
    given, obj = golden.arguments, as_recorded(obj, golden)
    start, *rest = drawn(golden, "Normal.sample.eps")
    noise = cast(np.stack([draw.reshape(len(start), obj.horizon_steps, -1) for draw in (start, *rest)]))
    sample = obj.sample(cast(given["cond"]), noise, bool(given["eval_mode"]), _counting(golden))
    results = [sample.trajectories]
    results += [sample.chains] if given.get("save_chains") else []
    return named(golden, *results, *([sample.log_probs] if given.get("ret_logprob", True) else []))


def get_logprobs(obj: Any, golden: Golden, cast: Cast) -> Outputs:
    given = cast(golden.arguments)
    log_prob, entropy, std = as_recorded(obj, golden).log_probs(
        given["cond"], given["x_chain"], _counting(golden, initial=False)
    )
    results = [log_prob] + ([entropy] if given.get("get_entropy") else [])
    return named(golden, *results, *([tf.reduce_mean(std)] if given.get("get_chains_stds", True) else []))


def first_point(obj: Any, golden: Golden, cast: Cast) -> Outputs:
    """Where chains begin."""
    x = cast(drawn(golden, "Normal.sample.eps")[0])
    log_prob = tf.reduce_sum(normal_log_prob(x, tf.zeros_like(x), tf.ones_like(x)), axis=1)
    return named(golden, tf.reshape(x, [-1, obj.horizon_steps, obj.action_dim]), log_prob)


def ppo_loss(obj: Any, golden: Golden, cast: Cast) -> Outputs:
    """The reference's losses, and what it watches beside them."""
    given, counting = cast(golden.arguments), _counting(golden)
    names = ("obs", "chains", "returns", "oldvalues", "advantages", "oldlogprobs")
    obj = as_recorded(obj, golden)
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


TIMES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "torch.rand": lambda uniform: uniform,
    "torch.normal.eps": lambda normal: 1 / (1 + np.exp(-normal)),
    "Beta.sample": lambda beta: 0.999 * (1 - beta),
}
VELOCITIES = (f"{FLOW}FlowMLP", f"{FLOW}VisionFlowMLP", f"{SHORTCUT}ShortCutFlowMLP", f"{SHORTCUT}ShortCutFlowViT")
NOISY = (f"{FLOW}NoisyFlowMLP", f"{SHORTCUT}NoisyShortCutFlowMLP")
NOISE = f"{FLOW}ExploreNoiseNet"
REFLOW, SHORTCUT_FLOW = "model.flow.reflow.ReFlow", "model.flow.shortcutflow.ShortCutFlow"
CALLS: dict[tuple[str | None, str], tuple[Callable[[Any, Golden, Cast], Outputs], int]] = {
    (NOISE, "forward"): (noise_network, 2),
    (NOISE, "process_noise"): (noise_network, 1),
    (f"{FLOW}FlowMLP", "sample_action"): (sample_action, 3),
    (REFLOW, "sample"): (shifted(flow_sample), 3),
    (REFLOW, "generate_target"): (target, 3),
    (REFLOW, "generate_trajectory"): (trajectory, 3),
    (REFLOW, "sample_time"): (sample_time, 1),
    (REFLOW, "loss"): (shifted(flow_loss), 3),
    (SHORTCUT_FLOW, "sample"): (shifted(flow_sample), 3),
    (SHORTCUT_FLOW, "loss"): (shifted(shortcut_loss), 3),
}
CALLS |= {(_class, "forward"): (shifted(velocity), 2) for _class in VELOCITIES}
CALLS |= {(_class, "forward"): (shifted(noisy), 2) for _class in NOISY}
for _class in (PPO_FLOW, PPO_SHORTCUT):
    CALLS |= {
        (_class, "get_actions"): (shifted(get_actions), 3),
        (_class, "get_logprobs"): (shifted(get_logprobs), 3),
        (_class, "sample_first_point"): (first_point, 3),
        (_class, "loss"): (shifted(ppo_loss), 3),
    }
