"""Our side of the rows of networks.py."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import networks as n
import tensorflow as tf
from worker import Workload

from diffusion_rl.config.instantiate import instantiate
from diffusion_rl.config.targets import REFERENCE_TARGETS
from diffusion_rl.core.batching import in_chunks
from diffusion_rl.core.noise import NoiseSource
from diffusion_rl.networks.layers import variables_of
from diffusion_rl.policies.acting import DiffusionActor, actor_for


def translated(description: Any) -> Any:
    """The same description with this repository's classes."""
    if not isinstance(description, Mapping):
        return description
    return {k: REFERENCE_TARGETS[v] if k == "_target_" else translated(v) for k, v in description.items()}


@functools.cache
def policy(name: str) -> Any:
    return instantiate(translated(n.CASES[name].policy))


def network_call(name: str) -> tuple[Any, list[tf.Tensor]]:
    """The network as a function of tensors with one row per sample, and these tensors."""
    case, network = n.CASES[name], policy(name).actor_ft
    given = n.inputs(case, case.rows)
    arrays = [a for a in (given.state, given.rgb) if a is not None]
    arrays += [given.x, given.t] if case.denoises else []

    def call(state: tf.Tensor, *rest: tf.Tensor) -> tuple[tf.Tensor, ...]:
        cond = {"state": state} | ({"rgb": rest[0]} if case.sees else {})
        return (network(*rest[-2:], cond),) if case.denoises else network(cond)

    return call, [tf.constant(a) for a in arrays]


def forward(name: str) -> Workload:
    call, arrays = network_call(name)
    compiled = in_chunks(call, n.CASES[name].chunk)
    return lambda: [output.numpy() for output in compiled(*arrays)]


def gradient(name: str) -> Workload:
    call, arrays = network_call(name)
    trained = [v for v in variables_of(policy(name).actor_ft) if v.trainable]

    def of_chunk(*chunk: tf.Tensor) -> list[tf.Tensor]:
        """Gradients of every weight, each with an axis in front for the chunks."""
        with tf.GradientTape() as tape:
            total = tf.add_n([tf.reduce_sum(tf.square(o)) / (arrays[0].shape[0] * o.shape[1]) for o in call(*chunk)])
        grads = tape.gradient(total, trained, unconnected_gradients=tf.UnconnectedGradients.ZERO)
        return [grad[None] for grad in grads]

    by_chunk = in_chunks(of_chunk, n.CASES[name].chunk)
    compiled = tf.function(lambda: [tf.reduce_sum(grads, axis=0) for grads in by_chunk(*arrays)])
    return lambda: compiled()[0].numpy()


def sampling(name: str) -> Workload:
    case, model, noise = n.CASES[name], policy(name), NoiseSource(0)
    given = n.inputs(case, n.ENVS)
    if case.denoises:
        actor = DiffusionActor(model)
        shape = actor.noise_shape(n.ENVS)
        return lambda: actor.act(given.state, noise.normal(shape), deterministic=False, rgb=given.rgb)
    single = actor_for(model)
    return lambda: single.act(given.state, single.draw(noise, n.ENVS), deterministic=False)


def log_probs(name: str) -> Workload:
    case, actor = n.CASES[name], DiffusionActor(policy(name))
    given = n.inputs(case, case.rows)
    return lambda: actor.log_probs(given.state, given.chains, given.rgb)


MAKERS = {"forward": forward, "gradient": gradient, "sampling": sampling, "log-probs": log_probs}


def makers() -> dict[str, Any]:
    """By the names of the rows."""
    return {row: functools.partial(MAKERS[row.rpartition(" ")[2]], row.rpartition(" ")[0]) for row in n.rows()}
