"""Residual MLPs rewritten so that the same numbers cost about half as much.

Two exact identities:

* One-hot time. Rows of one denoising step share their time embedding, so its contribution to the first layer is a
  row of a table [steps, width]: feed [x | observation | one-hot(step)] and multiply once.
* Fold. Between the last block's second layer W2 and the output layer W3 there is no nonlinearity:
      (r W2 + b2 + h) W3 + b3 = r (W2 W3) + h W3 + (b2 W3 + b3)
  so the wide product r W2 leaves the batch, forward and backward; automatic differentiation through W2 W3 gives the
  exact gradients of both.

A folded network is a list of tensors computed from the variables (`fold_*`, differentiable) and a pure function of
them (`*_output`). Shapes: R rows, X flat action chunk, O flat observation history, T steps, W width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import tensorflow as tf

from diffusion_rl.core.precision import product
from diffusion_rl.core.typing import Array
from diffusion_rl.networks.critics import CriticObs
from diffusion_rl.networks.layers import flatten_state
from diffusion_rl.networks.mlp import DiffusionMLP, ResidualBlock, ResidualMLP


def can_fold(network: object) -> bool:
    """Returns whether this network is a residual MLP that the identities apply to."""
    if isinstance(network, DiffusionMLP):
        return not network.has_cond_mlp and _plain_residual(network.mlp_mean)
    return isinstance(network, CriticObs) and _plain_residual(network.Q1)


def _plain_residual(mlp: object) -> bool:
    return (
        isinstance(mlp, ResidualMLP)
        and len(mlp.layers) >= 3
        and all(isinstance(b, ResidualBlock) and not b.use_layernorm for b in mlp.layers[1:-1])
        and mlp.activate_out is tf.identity
    )


def _fold_blocks(mlp: ResidualMLP) -> tuple[list[Array], Array, Array]:
    """Returns kernels and biases of the blocks, the last one folded with the output layer; its kernel and constant."""
    out = mlp.layers[-1]
    *inner, last = mlp.layers[1:-1]
    tensors: list[Array] = []
    for block in inner:
        tensors += [block.l1.kernel, block.l1.bias, block.l2.kernel, block.l2.bias]
    tensors += [last.l1.kernel, last.l1.bias, tf.matmul(last.l2.kernel, out.kernel)]
    return tensors, out.kernel, tf.linalg.matvec(out.kernel, last.l2.bias, transpose_a=True) + out.bias


def _blocks_output(
    blocks: Sequence[Array], activate: Callable[[Array], Array], h: Array, multiply: Callable[[Array, Array], Array]
) -> tuple[Array, Array]:
    """Returns (what enters the last block [R,W], its folded product [R,out])."""
    for i in range(0, len(blocks) - 3, 4):
        w1, b1, w2, b2 = blocks[i : i + 4]
        h = h + multiply(activate(multiply(activate(h), w1) + b1), w2) + b2
    w1, b1, w23 = blocks[-3:]
    return h, multiply(activate(multiply(activate(h), w1) + b1), w23)


def fold_actor(network: DiffusionMLP, timesteps: np.ndarray) -> list[Array]:
    """Returns tensors of `actor_output` for the given denoising steps t [T]: first layer, shortcut, blocks."""
    first, x_dim, time_dim = network.mlp_mean.layers[0], network.horizon_steps * network.action_dim, network.time_dim
    embedded = network.time_embedding(tf.constant(np.ascontiguousarray(timesteps), tf.int32))
    kernel = tf.convert_to_tensor(first.kernel)
    table = tf.matmul(embedded, kernel[x_dim : x_dim + time_dim]) + first.bias
    w_in = tf.concat([kernel[:x_dim], kernel[x_dim + time_dim :], table], axis=0)  # [X+O+T, W]
    blocks, out_kernel, constant = _fold_blocks(network.mlp_mean)
    if len(blocks) > 3:
        return [w_in, out_kernel, constant, *blocks]
    # One block: its input is linear in the rows, so the shortcut needs no [R,W] product either.
    shortcut = tf.matmul(w_in, out_kernel)
    shortcut = tf.concat([shortcut[: -len(timesteps)], shortcut[-len(timesteps) :] + constant], axis=0)
    return [w_in, shortcut, tf.zeros_like(constant), *blocks]


def actor_output(network: DiffusionMLP, folded: Sequence[Array], rows: Array) -> Array:
    """Returns the network's output [R,X] for rows [R, X+O+T] = [x | observation | one-hot(step)]."""
    w_in, w_out, constant, *blocks = folded
    activate = network.mlp_mean.layers[1].activate
    h, last = _blocks_output(blocks, activate, product(rows, w_in), product)
    if len(blocks) > 3:
        return last + product(h, w_out) + constant
    return last + product(rows, w_out)


class FoldedActor:
    """A network, folded once for several evaluations with the network's own arguments.

    Args:
        network: one that `can_fold`.
        n_steps: denoising steps T.
    """

    def __init__(self, network: DiffusionMLP, n_steps: int):
        self.network, self.n_steps = network, n_steps
        self.weights = fold_actor(network, np.arange(n_steps))

    def __call__(self, x: Array, t: Array, cond: dict[str, Array]) -> Array:
        """Maps x [B,H,A], t [B], cond {"state": [B,To,O]} to [B,H,A]."""
        network = self.network
        flat = tf.reshape(x, [-1, network.horizon_steps * network.action_dim])
        rows = tf.concat([flat, flatten_state(cond), tf.one_hot(t, self.n_steps, dtype=flat.dtype)], axis=1)
        output = actor_output(network, self.weights, rows)
        return tf.reshape(output, [-1, network.horizon_steps, network.action_dim])


def fold_critic(critic: CriticObs) -> list[Array]:
    """Returns the tensors that `critic_output` takes: kernels [in,out], biases [out], the blocks' own behind them."""
    blocks, out_kernel, constant = _fold_blocks(critic.Q1)
    first = critic.Q1.layers[0]
    return [tf.convert_to_tensor(first.kernel), tf.convert_to_tensor(first.bias), out_kernel, constant, *blocks]


def critic_output(critic: CriticObs, folded: Sequence[Array], states: Array) -> Array:
    """Returns values [R] of observations [R,O]."""
    kernel, bias, out_kernel, constant, *blocks = folded
    activate = critic.Q1.layers[1].activate
    h, last = _blocks_output(blocks, activate, tf.matmul(states, kernel) + bias, tf.matmul)
    return (last + tf.matmul(h, out_kernel) + constant)[:, 0]
