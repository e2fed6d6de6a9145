"""Guidance of a denoising step by the gradient of a value (Janner et al. 2022, algorithm 1; Dhariwal & Nichol 2021).

Like the authors' code and unlike the paper's formula, x_t itself is moved before the step, not the step's mean.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import tensorflow as tf

from diffusion_rl.core.typing import Array

Value = Callable[[Array, Array], Array]  # (x [B,H,D], t [B]) -> [B]


@dataclass(frozen=True)
class Guide:
    """How a value moves samples.

    Attributes:
        value: the return of noisy trajectories at a step.
        scale: length of a step along the gradient.
        n_guide_steps: steps along it before each denoising step.
        t_stopgrad: denoising steps below this one are not guided.
        scale_grad_by_std: multiply the gradient by the denoising step's variance (the name is the reference's).
    """

    value: Value
    scale: float = 0.001
    n_guide_steps: int = 1
    t_stopgrad: int = 0
    scale_grad_by_std: bool = True

    def ascend(self, x: Array, t: Array, variance: Array, put: Callable[[Array], Array]) -> tuple[Array, Array]:
        """Moves x along the value's gradient.

        Args:
            x: [B,H,D];  t: [B], or [1] for all rows;  variance: of the denoising step, [B,1,1] or [1,1,1].
            put: restores the known entries.

        Returns:
            the moved x, and its values [B] before the last move.
        """
        allowed = tf.cast(t >= self.t_stopgrad, x.dtype)[:, None, None]
        factor = self.scale * allowed * (variance if self.scale_grad_by_std else tf.ones_like(variance))

        def climb(i: Array, x: Array, values: Array) -> tuple[Array, ...]:
            values, gradient = value_and_gradient(self.value, x, t)
            return i + 1, tf.ensure_shape(put(x + factor * gradient), shape), values

        start, shape = (0, x, tf.zeros(tf.shape(x)[:1], x.dtype)), x.shape
        if self.n_guide_steps == 1:
            return climb(*start)[1:]
        return tf.while_loop(lambda i, *_: i < self.n_guide_steps, climb, start)[1:]  # a loop is compiled once

    def where_allowed(
        self, x: Array, t: Array, variance: Array, put: Callable[[Array], Array], values: Array
    ) -> tuple[Array, Array]:
        """Ascends at one step t [1] for all rows, without the work where `t_stopgrad` makes it nothing.

        There the given values are returned as they are.
        """
        if self.t_stopgrad <= 0:
            return self.ascend(x, t, variance, put)
        return tf.cond(t[0] >= self.t_stopgrad, lambda: self.ascend(x, t, variance, put), lambda: (x, values))


def value_and_gradient(value: Value, x: Array, t: Array) -> tuple[Array, Array]:
    """Returns values [B] and the gradient of each by its own trajectory, [B,H,D]."""
    with tf.GradientTape(watch_accessed_variables=False) as tape:
        tape.watch(x)
        values = value(x, t)
    return values, tape.gradient(values, x)


def best_first(values: Array, samples: Array, groups: int = 1) -> tuple[Array, Array]:
    """Returns values [B] in descending order, equal ones in the order given, and samples [B,...] arranged likewise.

    Args:
        groups: of B / groups neighbours; each is sorted by itself.
    """
    grouped = tf.reshape(values, [groups, -1])
    order = tf.argsort(grouped, axis=-1, direction="DESCENDING", stable=True)
    rows = tf.reshape(order + tf.range(groups)[:, None] * tf.shape(grouped)[1], [-1])
    return tf.gather(values, rows), tf.gather(samples, rows)
