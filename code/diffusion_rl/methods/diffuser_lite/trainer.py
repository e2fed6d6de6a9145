"""Training of DiffuserLite: an optimizer for each level, one for the inverse dynamics, averages of the levels' weights.

Shapes: n steps, B plans of a step, others as in `methods.diffuser_lite.planner`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from diffusion_rl.core import replicas
from diffusion_rl.core.ema import average_into
from diffusion_rl.core.optimizers import AdamW, clip_by_global_norm
from diffusion_rl.methods.diffuser_lite.levels import PlanLevel
from diffusion_rl.networks.inverse_dynamics import InverseDynamics
from diffusion_rl.networks.layers import Array, variables_of

WEIGHT_DECAY = 1e-5


def cosine_rate(rate: float, step: int, steps: int) -> float:
    """Returns the learning rate of update number `step`, counted from 0: `rate` at first, 0 after `steps`."""
    return rate * (1 + math.cos(math.pi * step / steps)) / 2


class LevelTrainer:
    """Updates of one level.

    Transformer and return embedding have optimizers of their own: an update without returns leaves the second one as
    it is, its count of steps included.

    Args:
        ema_rate: of the averaged weights, from the first update on.
        max_norm: clip the gradient's norm to it (None: no clipping).
    """

    def __init__(self, level: PlanLevel, rate: float, ema_rate: float, max_norm: float | None = None):
        self.level, self.ema_rate, self.max_norm = level, ema_rate, max_norm
        trained = [v for v in variables_of(level.network.diffusion) if v.trainable]
        self.optimizers = {
            "diffusion": AdamW(trained, rate, WEIGHT_DECAY, fused=True),
            "condition": AdamW(variables_of(level.network.condition), rate, WEIGHT_DECAY, fused=True),
        }
        self.variables = [v for optimizer in self.optimizers.values() for v in optimizer.variables]

    def update(
        self, x0: Array, x1: Array, t: Array, condition: Array | None, keep: Array | None, rate: Array
    ) -> tuple[Array, Array]:
        """Makes one step at a learning rate (float64). Graph-safe. Returns the loss and, with `max_norm`, the
        gradient's norm before clipping."""
        loss, grads = replicas.averaged(self._gradients, x0, x1, t, condition, keep)
        norm = tf.zeros_like(loss)
        if self.max_norm is not None:
            grads, norm = clip_by_global_norm(grads, self.max_norm)
        split = len(self.optimizers["diffusion"].variables)
        for optimizer, own in zip(self.optimizers.values(), (grads[:split], grads[split:]), strict=True):
            optimizer.learning_rate.assign(rate)
            if condition is not None or optimizer is self.optimizers["diffusion"]:
                optimizer.apply(own)
        average_into(variables_of(self.level.ema), variables_of(self.level.network), self.ema_rate)
        return loss, norm

    def _gradients(
        self, x0: Array, x1: Array, t: Array, condition: Array | None, keep: Array | None
    ) -> tuple[Array, list[Array]]:
        with tf.GradientTape() as tape:
            loss = self.level.loss(x0, x1, t, condition, keep)
        return loss, tape.gradient(loss, self.variables)


class InverseTrainer:
    """Updates of the inverse dynamics: mean squared error of the action, Adam.

    The reference's configuration says 3e-4, but what its code passes is Adam's default rate.
    """

    def __init__(self, inverse: InverseDynamics, rate: float = 1e-3):
        self.inverse = inverse
        self.optimizer = AdamW(variables_of(inverse), rate, fused=True)

    def update(
        self, state: Array, action: Array, following: Array, keep: Array | None, valid: Array | None = None
    ) -> Array:
        """Makes one step on pairs [...,O], actions [...,A], dropout's mask [...,W]; `valid` [...] of 0 and 1 leaves
        some pairs out. Returns the loss. Graph-safe."""
        weights = None if valid is None else valid / tf.reduce_mean(valid)  # of all rows, whoever has them
        loss, grads = replicas.averaged(self._gradients, state, action, following, keep, valid, weights)
        self.optimizer.apply(grads)
        return loss

    def _gradients(
        self,
        state: Array,
        action: Array,
        following: Array,
        keep: Array | None,
        valid: Array | None,
        weights: Array | None,
    ) -> tuple[Array, list[Array]]:
        """Returns the mean loss of the pairs that are valid, and its gradients; of some of the rows it is a part of
        that."""
        with tf.GradientTape() as tape:
            errors = tf.reduce_mean(tf.square(self.inverse(state, following, keep) - action), axis=-1)
            if valid is None or weights is None:
                loss = tf.reduce_mean(errors)
            elif replicas.count() == 1:
                loss = tf.reduce_sum(errors * valid) / tf.reduce_sum(valid)
            else:
                loss = tf.reduce_mean(errors * weights)
        return loss, tape.gradient(loss, self.optimizer.variables)


class LevelDraws(NamedTuple):
    """What an update of a level draws: noise [B,H,O], t [B] and, for the dropout of conditions, uniform [B]."""

    noise: np.ndarray
    t: np.ndarray
    uniform: np.ndarray | None


class PlanSource:
    """Rows of the training data that make up each level's plans, as constants of the compiled programs.

    Args:
        observations, actions: all rows, [N,O] and [N,A].
        rows: of each level's windows, [M,H] (computed from windows: see `data.plan_windows`).
        conditions: of each level's windows, [M].
        valid: of the last level, whether a row is no padding, [N].
    """

    def __init__(
        self,
        observations: np.ndarray,
        actions: np.ndarray,
        rows: Sequence[np.ndarray],
        conditions: Sequence[np.ndarray],
        dtype: tf.DType,
        padding: np.ndarray | None = None,
    ):
        self.observations, self.actions = tf.constant(observations, dtype), tf.constant(actions, dtype)
        self.rows = [tf.constant(windows, tf.int32) for windows in rows]
        self.conditions = [tf.constant(returns, dtype) for returns in conditions]
        self.padding = None if padding is None else tf.constant(1 - padding, dtype)

    def plans(self, level: int, windows: Array) -> tuple[Array, Array]:
        """Returns states [B,H,O] and returns [B,1] of windows [B] of a level."""
        states = tf.gather(self.observations, tf.gather(self.rows[level], windows))
        return states, tf.gather(self.conditions[level], windows)[:, None]

    def pairs(self, windows: Array) -> tuple[Array, Array | None]:
        """Returns actions [B,H-1,A] of the last level's windows, and which of them are no padding [B,H-1]."""
        rows = tf.gather(self.rows[-1], windows)[:, :-1]
        return tf.gather(self.actions, rows), None if self.padding is None else tf.gather(self.padding, rows)


class LiteTrainer:
    """Steps of training on a data set held in memory; every step updates every level, and then inverse dynamics.

    Args:
        levels: from coarse to fine.
        inverse: None: only the levels are trained.
        source: the data.
    """

    def __init__(self, levels: Sequence[LevelTrainer], inverse: InverseTrainer | None, source: PlanSource):
        self.levels, self.inverse, self.source = list(levels), inverse, source
        drawn = []
        for trainer in self.levels:
            shapes = [None, None, *trainer.level.shape], [None, None], [None, None]
            drawn.append(tuple(tf.TensorSpec(shape, self.dtype) for shape in shapes))
        windows = tf.TensorSpec([None, len(self.levels), None], tf.int32)
        specs = [windows, drawn, tf.TensorSpec([None], tf.float64)]  # any number of steps, any size of batch
        self._levels = tf.function(self._run_levels, specs, autograph=False)
        self._inverse = tf.function(self._run_inverse, autograph=False, reduce_retracing=True)

    @property
    def dtype(self) -> tf.DType:
        return self.levels[0].level.dtype

    def steps(
        self,
        windows: np.ndarray,
        draws: Sequence[LevelDraws],
        kept: np.ndarray | None,
        rates: Sequence[float],
    ) -> np.ndarray:
        """Makes n updates in compiled calls, one for the levels and one for the inverse dynamics.

        Args:
            windows: of each level, [n,L,B].
            draws: of each level, with a leading axis n.
            kept: dropout's mask of the inverse dynamics [n,B,H-1,W]; None: these are not trained.
            rates: learning rates of the levels [n].

        Returns:
            the losses of the levels, and of the inverse dynamics where they are trained, [n,L] or [n,L+1].
        """
        tensors = [tuple(tf.constant(part, self.dtype) for part in level) for level in draws]
        losses = self._levels(tf.constant(windows, tf.int32), tensors, tf.constant(rates, tf.float64))
        if kept is None:
            return losses.numpy()
        other = self._inverse(tf.constant(windows[:, -1], tf.int32), tf.constant(kept, tf.bool))
        return np.concatenate([losses.numpy(), other.numpy()[:, None]], axis=1)

    def _run_levels(self, windows: Array, draws: Any, rates: Array) -> Array:
        def update(i: Array) -> Array:
            losses = []
            for number, (trainer, drawn) in enumerate(zip(self.levels, draws, strict=True)):
                noise, t, uniform = (part[i] for part in drawn)
                states, returns = self.source.plans(number, windows[i, number])
                keep = trainer.level.network.condition.keep(uniform)
                losses.append(trainer.update(states, noise, t, returns, keep, rates[i])[0])
            return tf.stack(losses)

        return self._repeat(update, tf.shape(windows)[0])

    def _run_inverse(self, windows: Array, kept: Array) -> Array:
        inverse = self.inverse
        assert inverse is not None

        def update(i: Array) -> Array:
            states, _ = self.source.plans(-1, windows[i])
            actions, valid = self.source.pairs(windows[i])
            return inverse.update(states[:, :-1], actions, states[:, 1:], kept[i], valid)

        return self._repeat(update, tf.shape(windows)[0])

    def _repeat(self, update: Callable[[Array], Array], n: Array) -> Array:
        """Stacks update(0), update(1), …."""

        def body(i: Array, results: tf.TensorArray) -> tuple[Array, tf.TensorArray]:
            return i + 1, results.write(i, update(i))

        start = tf.constant(0), tf.TensorArray(self.dtype, size=n)
        return tf.while_loop(lambda i, _: i < n, body, start, parallel_iterations=1)[1].stack()


class ReflowTrainer:
    """Updates of the levels on pairs of generated plans and the noise they came from."""

    def __init__(self, levels: Sequence[LevelTrainer]):
        self.levels = list(levels)
        self._update = tf.function(self._one, autograph=False, reduce_retracing=True)

    def step(
        self, pairs: Sequence[tuple[np.ndarray, np.ndarray | None]], draws: Sequence[LevelDraws], rate: float
    ) -> list[float]:
        """Updates every level once, in one compiled call.

        Args:
            pairs: of each level: plan and noise [B,2,H,O], and returns [B,1] or None (unconditional).
            draws: of each level; `noise` is not used.

        Returns:
            the losses.
        """
        dtype, arguments = self.levels[0].level.dtype, []
        for (plans, returns), drawn in zip(pairs, draws, strict=True):
            conditions = [] if returns is None else [returns, drawn.uniform]
            arguments.append([tf.constant(x, dtype) for x in (plans[:, 0], plans[:, 1], drawn.t, *conditions)])
        return self._update(arguments, tf.constant(rate, tf.float64)).numpy().tolist()

    def _one(self, arguments: Sequence[Sequence[Array]], rate: Array) -> Array:
        losses = []
        for trainer, (x0, x1, t, *conditions) in zip(self.levels, arguments, strict=True):
            condition, keep = None, None
            if conditions:
                condition, keep = conditions[0], trainer.level.network.condition.keep(conditions[1])
            losses.append(trainer.update(x0, x1, t, condition, keep, rate)[0])
        return tf.stack(losses)
