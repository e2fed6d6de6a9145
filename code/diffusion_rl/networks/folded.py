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

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeAlias

import numpy as np
import tensorflow as tf

from diffusion_rl.core.batching import copies, parts
from diffusion_rl.core.precision import evaluates_in_halves, product
from diffusion_rl.core.typing import Array
from diffusion_rl.networks.critics import CriticObs
from diffusion_rl.networks.layers import flatten_state
from diffusion_rl.networks.mlp import DiffusionMLP, ResidualBlock, ResidualMLP, behind

ROWS_OF_A_PART = 100  # at least: smaller products keep no core busy
Step: TypeAlias = Callable[[int, Array, Array, Array], Array]


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
    together, constant = behind(last, out)
    return [*tensors, last.l1.kernel, last.l1.bias, together], out.kernel, constant


def _blocks_output(
    blocks: Sequence[Array], activate: Callable[[Array], Array], h: Array, multiply: Callable[[Array, Array], Array]
) -> tuple[Array, Array]:
    """Returns (what enters the last block [R,W], its folded product [R,out])."""
    for i in range(0, len(blocks) - 3, 4):
        w1, b1, w2, b2 = blocks[i : i + 4]
        h = h + multiply(activate(tf.nn.bias_add(multiply(activate(h), w1), b1)), w2) + b2
    w1, b1, w23 = blocks[-3:]
    return h, multiply(activate(tf.nn.bias_add(multiply(activate(h), w1), b1)), w23)


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

    Where `core.precision` says so it computes in bfloat16, forward and backward; the weights and what comes out keep
    their precision.

    Args:
        network: one that `can_fold`.
        n_steps: denoising steps T.
        dealt: deal the rows to the cores, which work side by side in a plain graph.
    """

    def __init__(self, network: DiffusionMLP, n_steps: int, dealt: bool = False):
        self.network, self.n_steps, self.dealt = network, n_steps, dealt
        self.weights = fold_actor(network, np.arange(n_steps))
        self.halved = evaluates_in_halves(self.weights[-3])

    def __call__(self, x: Array, t: Array, cond: dict[str, Array]) -> Array:
        """Maps x [B,H,A], t [B], cond {"state": [B,To,O]} to [B,H,A]."""
        network = self.network
        flat = tf.reshape(x, [-1, network.horizon_steps * network.action_dim])
        rows = tf.concat([flat, flatten_state(cond), tf.one_hot(t, self.n_steps, dtype=flat.dtype)], axis=1)

        def output(weights: Sequence[Array], rows: Array) -> Array:
            low = self._lowered([*weights, rows])
            return tf.cast(actor_output(network, low[:-1], low[-1]), rows.dtype)

        return tf.reshape(self._in_parts(output, rows), [-1, network.horizon_steps, network.action_dim])

    @property
    def chains(self) -> bool:
        """Returns whether `chain` applies: to networks of one block."""
        return len(self.weights) == 6

    def chain(self, x: Array, state: Array, shifts: Array, timesteps: Iterable[int], step: Step) -> Array:
        """Applies the network step by step, x <- step(t, x, its output, shift), and returns the last x [B,X].

        Differentiable. A kernel's gradient is one product over the rows of all steps, not a sum of as many.

        Args:
            x: [B,X] the start;  state: [B,O];  shifts: [B,S,X], what the steps take beside.
            timesteps: t of each of the S steps.
            step: (t, x [R,X], output [R,X], shift [R,X]) -> x [R,X], every row by itself.
        """
        steps = [int(t) for t in timesteps]
        chained = functools.partial(self._chain, steps, step)
        return self._in_parts(chained, x, state, shifts)

    def _chain(
        self, steps: list[int], step: Step, weights: Sequence[Array], x: Array, state: Array, shifts: Array
    ) -> Array:
        activate, known = self.network.mlp_mean.layers[1].activate, x.shape[1] + state.shape[1]

        @tf.custom_gradient
        def denoised(start: Array, seen: Array, moved: Array, *weights: Array) -> tuple[Array, Callable[..., Any]]:
            w_in, shortcut, _, w1, b1, w23 = self._lowered(weights)
            given, entered, left = self._lowered([seen])[0], [], []
            with tf.GradientTape(watch_accessed_variables=False) as tape:
                tape.watch([start, seen, moved])
                y = start
                for i, t in enumerate(steps):
                    rows = tf.concat([*self._lowered([y]), given], axis=1)
                    z0 = _noted(tape, tf.nn.bias_add(tf.matmul(rows, w_in[:known]), w_in[known + t]))
                    h0 = activate(z0)
                    z1 = _noted(tape, tf.nn.bias_add(tf.matmul(h0, w1), b1))
                    h1 = activate(z1)
                    direct = tf.nn.bias_add(tf.matmul(rows, shortcut[:known]), shortcut[known + t])
                    output = _noted(tape, tf.matmul(h1, w23) + direct)
                    y = step(t, y, tf.cast(output, y.dtype), moved[:, i])
                    entered.append((rows, h0, h1))
                    left += [z0, z1, output]

            def gradient(upstream: Array) -> list[Array | None]:
                inputs = [start, seen, moved]
                grads = tape.gradient(y, [*inputs, *left], output_gradients=upstream)
                by_z0, by_z1, by_output = (tf.concat(grads[len(inputs) + k :: 3], axis=0) for k in range(3))
                rows, h0, h1 = (tf.concat(each, axis=0) for each in zip(*entered, strict=True))
                which = tf.one_hot(steps, self.n_steps, dtype=rows.dtype)
                rows = tf.concat([rows, tf.repeat(which, tf.shape(start)[0], axis=0)], axis=1)
                by_kernels = (
                    _by_kernel(rows, by_z0),
                    _by_kernel(rows, by_output),
                    _by_kernel(h0, by_z1),
                    tf.raw_ops.BiasAddGrad(out_backprop=by_z1),
                    _by_kernel(h1, by_output),
                )
                by_in, by_shortcut, *by_block = (tf.cast(grad, y.dtype) for grad in by_kernels)
                return [*grads[: len(inputs)], by_in, by_shortcut, None, *by_block]

            return y, gradient

        return denoised(x, state, shifts, *weights)

    def _lowered(self, tensors: Sequence[Array]) -> list[Array]:
        """Returns tensors [...] as they enter products."""
        return [tf.cast(tensor, tf.bfloat16) for tensor in tensors] if self.halved else list(tensors)

    def _in_parts(self, function: Callable[..., Array], *arrays: Array) -> Array:
        """Computes a function of the weights and of arrays [B,...], the rows in parts if they are dealt."""
        rows = arrays[0].shape[0]
        if not self.dealt or rows is None:
            return function(self.weights, *arrays)
        cuts = parts(rows, ROWS_OF_A_PART)
        weights = [copies(weight, len(cuts)) for weight in self.weights]
        mine = zip(cuts, zip(*weights, strict=True), strict=True)
        return tf.concat([function(own, *(array[cut] for array in arrays)) for cut, own in mine], axis=0)


def _noted(tape: tf.GradientTape, x: Array) -> Array:
    """Returns x [...], by which the tape then differentiates, too."""
    tape.watch(x)
    return x


def _by_kernel(entered: Array, by_output: Array) -> Array:
    """Returns a kernel's gradient [I,J] from the rows [R,I] that entered its product and the gradient [R,J] behind."""
    return tf.matmul(entered, by_output, transpose_a=True)


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
