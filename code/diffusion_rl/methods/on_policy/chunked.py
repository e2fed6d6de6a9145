"""Gradients of a minibatch accumulated over chunks of rows, in independent loops, one per core.

The intermediate results of a chunk stay in cache (or at least in memory), and loops with matrix products of one thread
each waste less than shared ones.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import tensorflow as tf

from diffusion_rl.core.batching import summed
from diffusion_rl.core.threads import cores, has_gpu
from diffusion_rl.networks.layers import Array


def chunks(rows: int, largest: int) -> tuple[int, int, int]:
    """Returns number and size of chunks of about `largest` rows, and the rows of padding that the last one takes."""
    if has_gpu():
        return 1, rows, 0
    n_chunks = max(1, round(rows / largest))
    if n_chunks > 1:
        n_chunks = -(-n_chunks // cores()) * cores()  # the same number for every loop
    size = -(-rows // n_chunks)
    return n_chunks, size, n_chunks * size - rows


def padded(values: Array, padding: int) -> Array:
    """Appends rows of zeros to values [B,...]."""
    return tf.pad(values, [[0, padding]] + [[0, 0]] * (len(values.shape) - 1))


def accumulate(
    one_chunk: Callable[[Array], tuple[list[Array], Array]],
    n_chunks: int,
    size: int,
    like: Sequence[Array],
    n_statistics: int,
    dtype: tf.DType,
) -> tuple[list[Array], Array]:
    """Sums gradients and statistics over the chunks, in loops that TensorFlow runs side by side.

    Args:
        one_chunk: first row of the chunk -> (gradients shaped as `like`, statistics [n_statistics]).
    """

    def body(i: Array, sums: list[Array], statistics: Array) -> tuple[Array, list[Array], Array]:
        grads, more = one_chunk(i * size)
        return i + 1, [s + g for s, g in zip(sums, grads, strict=True)], statistics + more

    start = ([tf.zeros_like(w) for w in like], tf.zeros([n_statistics], dtype))
    results = _side_by_side(body, lambda n: start, n_chunks, lambda i, *sums: sums)
    grads, statistics = zip(*results, strict=True)
    return [summed(parts) for parts in zip(*grads, strict=True)], summed(statistics)


def mean_gradients(
    sums: Callable[..., tuple[Array, list[Array]]],
    per_row: Sequence[Array],
    rows: int,
    about: int,
    trained: Mapping[str, Sequence[Array]],
    n_statistics: int,
) -> tuple[list[Array], dict[str, list[Array]]]:
    """Returns means watched over a minibatch, and its gradients by name, made chunk by chunk.

    Args:
        sums: a chunk of each array of `per_row`, [b,...] -> (sum of the losses, n_statistics sums to watch).
        per_row: arrays [N,...]; of the rows of zeros that fill the last chunk, zeros must be summed.
        rows: B by which all is divided, N or more where rows are weighted.
        about: rows of a chunk.
        trained: the variables by name.
    """
    n_chunks, size, padding = chunks(per_row[0].shape[0], about)
    arrays = [padded(x, padding) for x in per_row]
    variables = [v for part in trained.values() for v in part]

    def one_chunk(start: Array) -> tuple[list[Array], Array]:
        cut = (tf.ensure_shape(x[start : start + size], [size, *x.shape[1:]]) for x in arrays)
        with tf.GradientTape() as tape:
            total, statistics = sums(*cut)
        grads = tape.gradient(total, variables, unconnected_gradients=tf.UnconnectedGradients.ZERO)
        return grads, tf.stack(statistics)

    totals, statistics = accumulate(one_chunk, n_chunks, size, variables, n_statistics, arrays[0].dtype)
    grads = iter(total / rows for total in totals)
    return tf.unstack(statistics / rows), {name: [next(grads) for _ in part] for name, part in trained.items()}


def mapped(one_chunk: Callable[[Array], Array], n_chunks: int, size: int, dtype: tf.DType) -> Array:
    """Returns the values of all chunks, [n_chunks * size].

    Args:
        one_chunk: first row of the chunk -> [size].
    """

    per_loop = n_chunks // _n_loops(n_chunks)

    def body(i: Array, values: tf.TensorArray) -> tuple[Array, tf.TensorArray]:
        return i + 1, values.write(i % per_loop, one_chunk(i * size))

    def start(n: int) -> tuple[tf.TensorArray]:
        return (tf.TensorArray(dtype, n, element_shape=[size]),)

    return tf.concat(_side_by_side(body, start, n_chunks, lambda i, values: values.concat()), axis=0)


def _n_loops(n_chunks: int) -> int:
    return cores() if n_chunks > 1 else 1


def _side_by_side(
    body: Callable[..., tuple], start: Callable[[int], tuple], n_chunks: int, end: Callable[..., Any]
) -> list[Any]:
    """Deals the chunks to loops and returns what each of them ends with, `end(chunk, *its values)`.

    `body` gets the number of a chunk and the loop's own values, which begin as `start(number of chunks of a loop)`.
    """
    n_loops = _n_loops(n_chunks)
    per_loop = n_chunks // n_loops

    @tf.function(autograph=False, experimental_attributes={"_noinline": True})  # one graph, however many loops
    def loop(first: Array) -> Any:
        last, begin = first + per_loop, (first, *start(per_loop))
        return end(*tf.while_loop(lambda i, *_: i < last, body, begin, parallel_iterations=1))

    return [loop(tf.constant(number * per_loop)) for number in range(n_loops)]
