"""Half precision where it is safe: wide products in bfloat16, all else as it was.

DPPO clips the ratio of two probabilities to a range of 1e-3 to 1e-2, which rounding of a forward pass in bfloat16
(three digits) would fill. So forward passes keep their precision, and with them losses, ratios and KL divergences, bit
for bit; of the gradients, which are summed in float32, each product carries a rounding of about 2e-3, far below the
noise of a minibatch. Weights, moments and everything between the products stay as they are.

Off-policy losses divide no probabilities. There the diffusion network is evaluated in bfloat16 altogether (`forward`):
its samples, which carry exploration noise of 0.1, and its denoising loss's prediction; so are critics of which nothing
but the slope by the action is used (`only_slopes`). Other passes through critics, targets and losses stay as they are.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import tensorflow as tf

from diffusion_rl.core.batching import deals_products, side_by_side
from diffusion_rl.core.threads import has_gpu
from diffusion_rl.core.typing import Array

log = logging.getLogger(__name__)

HALF = "bfloat16"
WIDE = 128  # rows and columns of a kernel from which on a product saves more than turning its factors into halves costs
ROWS_OF_A_PART = 64  # of a product that is dealt to the cores, at the least
_CPU = Path("/proc/cpuinfo")
_halved: ContextVar[bool] = ContextVar("half precision", default=False)
_sloping: ContextVar[bool] = ContextVar("half precision of what only serves slopes", default=False)
_evaluated: ContextVar[bool] = ContextVar("half precision of forward passes", default=False)


def has_half_products() -> bool:
    """Returns whether this machine multiplies in bfloat16 faster than in float32: AVX512-BF16, AMX, or a GPU."""
    if has_gpu():
        return True
    flags = _CPU.read_text().split() if _CPU.is_file() else []
    return "avx512_bf16" in flags or "amx_bf16" in flags


@contextmanager
def backward_in(precision: str | None, forward: bool = False) -> Iterator[None]:
    """Lets gradients of each `product` made within be multiplied in that precision (None: as they come).

    It acts while a function is traced. On a processor without such products, where they would be slower, nothing
    changes, and a line says so.

    Args:
        forward: lets networks that ask `evaluates_in_halves` compute their hidden layers so, too.
    """
    halved = precision == HALF
    if halved and not has_half_products():
        _say_without()
        halved = False
    before, before_forward = _halved.set(halved), _evaluated.set(halved and forward)
    try:
        yield
    finally:
        _halved.reset(before)
        _evaluated.reset(before_forward)


@contextmanager
def only_slopes() -> Iterator[None]:
    """Says that of the passes within only gradients by their inputs are used: their products are as those may be."""
    before = _sloping.set(_evaluated.get())
    try:
        yield
    finally:
        _sloping.reset(before)


def evaluates_in_halves(kernel: Array) -> bool:
    """Returns whether a network whose widest kernel [I,J] is this one computes its hidden layers in bfloat16."""
    return _evaluated.get() and kernel.dtype == tf.float32 and min(kernel.shape) >= WIDE


@functools.cache
def _say_without() -> None:
    log.warning(
        "train.precision=bfloat16: this processor has no bfloat16 products (AVX512-BF16 or AMX); computing in float32"
    )


def product(x: Array, kernel: Array) -> Array:
    """Multiplies x [R,I] by kernel [I,J]: [R,J]; where the kernel is wide, forward as `batching.dealing_products` says
    and its gradients as `backward_in` says."""
    wide = min(kernel.shape) >= WIDE
    halved = wide and _halved.get() and x.dtype == tf.float32
    dealt = wide and deals_products() and x.shape[0] is not None
    return _product(x, kernel, halved, dealt) if halved or dealt else tf.matmul(x, kernel)


def _product(x: Array, kernel: Array, halved: bool, dealt: bool) -> Array:
    slopes = halved and _sloping.get()

    @tf.custom_gradient
    def multiply(x: Array, kernel: Array) -> tuple[Array, Callable[[Array], tuple[Any, Any]]]:
        rows, weights = (tf.cast(value, tf.bfloat16) if halved else value for value in (x, kernel))

        def gradient(upstream: Array) -> tuple[Array, Array]:
            upstream = tf.cast(upstream, rows.dtype)
            by_x = tf.matmul(upstream, weights, transpose_b=True)
            by_kernel = tf.matmul(rows, upstream, transpose_a=True)
            return tf.cast(by_x, x.dtype), tf.cast(by_kernel, kernel.dtype)

        if slopes:
            return tf.cast(tf.matmul(rows, weights), x.dtype), gradient
        if dealt:
            return side_by_side(lambda rows: tf.matmul(rows, kernel), ROWS_OF_A_PART, x), gradient
        return tf.matmul(x, kernel), gradient

    return multiply(x, kernel)
