"""Data-parallel training: the rows of a minibatch are dealt to replicas, whose gradients are averaged.

A replica is a device of this process, or a process of its own with the same weights and the same data (see
`cluster.replicas`). What is averaged must be means over rows: then R replicas give what one gives, up to rounding.
Shapes: B rows; whatever is given row by row has them first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import tensorflow as tf

from diffusion_rl.core.batching import summed
from diffusion_rl.core.errors import UserError

T = TypeVar("T")


@dataclass(frozen=True)
class Replicas:
    """Among which replicas this process deals rows.

    Attributes:
        devices: of this process, a replica each.
        strategy: of the processes that train together; None: this one trains alone.
    """

    devices: Sequence[str] = ()
    strategy: tf.distribute.Strategy | None = None

    @property
    def count(self) -> int:
        """Returns how many replicas there are."""
        return self.strategy.num_replicas_in_sync if self.strategy is not None else max(1, len(self.devices))


_present = Replicas()


@contextmanager
def used(replicas: Replicas) -> Iterator[Replicas]:
    """Deals rows to these replicas meanwhile; functions must be compiled within."""
    global _present
    before, _present = _present, replicas
    try:
        yield replicas
    finally:
        _present = before


def count() -> int:
    """Returns how many replicas share the rows of a minibatch."""
    return _present.count


def devices(n: int) -> list[str]:
    """Returns the names of n devices of this process: GPUs, or processors where there is no GPU. Raises UserError where
    there are fewer."""
    present = tf.config.list_logical_devices("GPU") or tf.config.list_logical_devices("CPU")
    if n > len(present):
        raise UserError(f"train.devices={n}: this process has {len(present)}; lower it")
    return [device.name for device in present[:n]]


def averaged(function: Callable[..., T], *arrays: Any) -> T:
    """Computes a function of arrays [B,...] on all replicas, each of its part of the rows, and averages.

    Args:
        function: gives tensors that are means over its rows, in dictionaries, lists or tuples; None stays None.
        arrays: or structures of them; a replica gets its rows of each; None stays None. The first axis is B, or a
            multiple of it. Where there are fewer rows than replicas, some get none and count for nothing.
    """
    if count() == 1:
        return function(*arrays)
    rows = _rows(next(array for array in tf.nest.flatten(list(arrays)) if array is not None))
    if _present.strategy is not None:
        return _in_processes(_present.strategy, function, arrays, rows)
    return _on_devices(_present.devices, function, arrays, rows)


def _on_devices(devices: Sequence[str], function: Callable[..., T], arrays: Sequence[Any], rows: Any) -> T:
    results = []
    for number, device in enumerate(devices):
        with tf.device(device):
            results.append(_weighted(function, arrays, rows, number))
    flat = zip(*(values for _, values in results), strict=True)
    return _like(results[0][0], [summed(parts) for parts in flat])


def _in_processes(strategy: tf.distribute.Strategy, function: Callable[..., T], arrays: Sequence[Any], rows: Any) -> T:
    number = strategy.cluster_resolver.task_id
    structure: list[T] = []  # known once the function has been traced

    def mine() -> list[tf.Tensor]:
        result, values = _weighted(function, arrays, rows, number)
        structure.append(result)
        return tf.distribute.get_replica_context().all_reduce(tf.distribute.ReduceOp.SUM, values)

    sums = strategy.run(mine)
    return _like(structure[0], [strategy.experimental_local_results(total)[0] for total in sums])


def _weighted(function: Callable[..., T], arrays: Sequence[Any], rows: Any, number: int) -> tuple[T, list[tf.Tensor]]:
    """Returns what the function gives of the rows of a replica, and those tensors times its share of the rows."""
    first, after = (rows * n // count() for n in (number, number + 1))

    def part(array: tf.Tensor | None) -> tf.Tensor | None:
        return None if array is None else array[first * (_rows(array) // rows) : after * (_rows(array) // rows)]

    result = function(*(tf.nest.map_structure(part, array) for array in arrays))
    present = [value for value in tf.nest.flatten(result) if value is not None]
    share = tf.cast(after - first, tf.float64) / tf.cast(rows, tf.float64)
    shares = [value * tf.cast(share, value.dtype) for value in present]
    return result, [tf.where(share > 0, value, tf.zeros_like(value)) for value in shares]  # of no rows: NaN


def _rows(array: tf.Tensor) -> Any:
    """Returns the first axis of an array [B,...], known or not."""
    return tf.shape(array)[0] if array.shape[0] is None else array.shape[0]


def _like(structure: Any, values: Sequence[tf.Tensor]) -> Any:
    """Puts values into the places of `structure` that are not None."""
    rest = iter(values)
    return tf.nest.map_structure(lambda place: None if place is None else next(rest), structure)
