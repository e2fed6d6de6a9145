"""Work on many rows: in chunks that stay in cache, side by side on all cores.

`core.threads` gives every operation one thread; the cores are used by working on several chunks at a time. Shapes: B
rows; whatever is given row by row has them first.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

import tensorflow as tf

from diffusion_rl.core.threads import cores, has_gpu

_dealt: ContextVar[bool] = ContextVar("products dealt", default=False)


def parts(rows: int, least: int) -> list[slice]:
    """Returns as many equal parts of the rows as there are cores, of at least that many; fewer where they do not
    divide, one on a GPU."""
    most = 1 if has_gpu() else cores()
    count = max(k for k in range(1, most + 1) if k == 1 or (rows % k == 0 and rows // k >= least))
    return _cut(rows, rows // count)


def summed(parts: Sequence[tf.Tensor]) -> tf.Tensor:
    """Sums tensors of one shape [...] in their order; `tf.add_n` begins with whichever is there first."""
    return tf.reduce_sum(tf.stack(parts), axis=0)


def copies(x: tf.Tensor, n: int) -> list[tf.Tensor]:
    """Returns a tensor [...] n times, for parts that are worked on side by side; its gradient is the sum of theirs, in
    their order."""

    @tf.custom_gradient
    def copied(x: tf.Tensor) -> tuple[list[tf.Tensor], Callable[..., tf.Tensor]]:
        return [tf.identity(x) for _ in range(n)], lambda *grads: functools.reduce(tf.add, grads)

    return copied(x) if n > 1 else [x]


def side_by_side(function: Callable[..., tf.Tensor], least: int, *arrays: tf.Tensor) -> tf.Tensor:
    """Computes a function of arrays [B,...] in `parts`, its gradients too; arrays [1,...] belong to all rows."""
    rows = arrays[0].shape[0]
    cuts = parts(rows, least) if rows else [slice(None)]
    return tf.concat([function(*(a if a.shape[0] == 1 else a[cut] for a in arrays)) for cut in cuts], axis=0)


@contextmanager
def dealing_products(deals: bool = True) -> Iterator[None]:
    """Lets each wide `precision.product` made within deal its rows to the cores, while a function is traced.

    Only forward: backward the product for the rows and that for the kernel run side by side, both whole, so that
    gradients need not be summed over parts.
    """
    before = _dealt.set(deals and cores() > 1 and not has_gpu())
    try:
        yield
    finally:
        _dealt.reset(before)


def deals_products() -> bool:
    """Returns whether `dealing_products` holds."""
    return _dealt.get()


def in_chunks(function: Callable[..., Sequence[tf.Tensor]], about: int) -> Callable[..., list[tf.Tensor]]:
    """Makes a compiled function of arrays [B,...] that works chunk by chunk and joins its outputs on their first axis.

    Args:
        function: from arrays of b rows to outputs by row, whose first axis is b or a multiple of it; or to sums over
            the rows with a first axis of 1, so that the chunks' sums come out one below the other.
        about: rows of a chunk, a little more or less so that all chunks are alike.
    """
    attributes = {"_noinline": True}  # one copy, however many chunks
    one_chunk = tf.function(function, autograph=False, experimental_attributes=attributes)

    @tf.function(autograph=False)
    def compute(*arrays: tf.Tensor) -> list[tf.Tensor]:
        rows = arrays[0].shape[0]
        results: list[Sequence[tf.Tensor]] = []
        for cut in _cut(rows, _even(rows, about)):
            with tf.control_dependencies([results[-cores()][0]] if len(results) >= cores() else []):
                results.append(one_chunk(*(tf.identity(a[cut]) for a in arrays)))  # as many at a time as cores
        return [tf.concat(outputs, axis=0) for outputs in zip(*results, strict=True)]

    return compute


def _even(rows: int, about: int) -> int:
    """Returns rows of a chunk: the largest divisor of `rows` that is not above `about` (if one is above half of it)."""
    sizes = (s for s in range(min(about, rows), about // 2, -1) if rows % s == 0)
    return next(sizes, about)


def _cut(rows: int, size: int) -> list[slice]:
    return [slice(i, min(i + size, rows)) for i in range(0, rows, size)]
