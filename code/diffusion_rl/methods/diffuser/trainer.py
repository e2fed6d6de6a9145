"""Training of Diffuser's models: Adam on windows of the data, in micro-batches, and an average of the weights.

Many steps run in one compiled call. Shapes: n steps, B windows of a step, others as in `methods.diffuser.model`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from diffusion_rl.core import replicas
from diffusion_rl.core.ema import AVERAGE, COPY, KEEP, follow
from diffusion_rl.core.optimizers import AdamW
from diffusion_rl.data.trajectories import TrajectoryDataset
from diffusion_rl.methods.diffuser.model import Losses, NoisyTrajectories
from diffusion_rl.networks.layers import Array, clone, variables_of

MicroBatch = tuple[np.ndarray, np.ndarray, np.ndarray]  # windows [B], t [B], noise [B,H,D]


class DiffuserTrainer:
    """Steps of training on a data set held in memory.

    Args:
        model: trained in place; `ema_model` is its average.
        learning_rate, ema_decay: constants.
        step_start_ema: the average is a plain copy before this step.
        update_ema_every: steps from one change of the average to the next.
    """

    def __init__(
        self,
        model: NoisyTrajectories,
        dataset: TrajectoryDataset,
        learning_rate: float,
        ema_decay: float,
        step_start_ema: int = 2000,
        update_ema_every: int = 10,
    ):
        self.model, self.ema_decay = model, float(ema_decay)
        self.step_start_ema, self.update_ema_every = step_start_ema, update_ema_every
        self.ema_model = copy.copy(model)
        self.ema_model.model = clone(model.model)
        self.variables, self.averaged = variables_of(model.model), variables_of(self.ema_model.model)
        self.optimizer = AdamW(self.variables, learning_rate)
        self.condition_times, self.horizon = dataset.condition_times, dataset.horizon
        self._transitions = tf.constant(dataset.transitions, model.dtype)
        self._rows = tf.constant(np.stack([dataset.first_rows, dataset.end_rows], axis=1), tf.int32)
        self._images = None if dataset.images is None else tf.constant(dataset.images)
        self._values = None if dataset.values is None else tf.constant(dataset.values, model.dtype)
        self.names: list[str] = []  # of what a step reports besides its loss; known once it was compiled
        self._many: dict[int, Callable[..., Array]] = {}  # by size of the batches
        self._one: dict[int, Callable[..., Array]] = {}  # by number of micro-batches

    # ---------- one batch ----------

    def loss(self, items: Array, t: Array, noise: Array) -> Losses:
        """Returns the model's loss on windows `items` [B]."""
        x = tf.gather(self._transitions, self.rows(items))
        conditions: dict[int, Any] = {t: x[:, t, self.model.action_dim :] for t in self.condition_times}
        if self._images is not None:
            first = tf.gather(self._rows[:, 0], items)
            conditions[0] = {"state": conditions[0], "rgb": tf.gather(self._images, first)}
        x = x[..., : self.model.transition_dim]  # actions come first; some models have them alone
        if self._values is None:
            return self.model.loss(x, conditions, t, noise)
        return self.model.loss(x, conditions, t, noise, tf.gather(self._values, items))

    def rows(self, items: Array) -> Array:
        """Returns rows [B,H] of the data in windows `items` [B]; after an episode's end the last row, padding."""
        ends = tf.gather(self._rows, items)
        window = ends[:, :1] + tf.range(self.horizon)[None]
        return tf.where(window < ends[:, 1:], window, self._transitions.shape[0] - 1)

    def averaging(self, step: int) -> int:
        """Decides what happens to the average after step number `step`."""
        if step % self.update_ema_every:
            return KEEP
        return COPY if step < self.step_start_ema else AVERAGE

    # ---------- training ----------

    def steps(self, batches: Sequence[MicroBatch], first: int) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Makes one step on each of the batches, which are of equal size.

        Args:
            first: number of the first step.

        Returns:
            losses [n], and what else the model reports [n] by name.
        """
        items, t, noise = (np.stack(column) for column in zip(*batches, strict=True))
        average = tf.constant([self.averaging(first + i) for i in range(len(batches))], tf.int32)
        size = items.shape[1]
        if size not in self._many:
            signature = [*self._specs(None, size), tf.TensorSpec([None], tf.int32)]
            self._many[size] = tf.function(self._train_steps, input_signature=signature)
        return self._named(self._many[size](*self._tensors((items, t, noise)), average).numpy())

    def step(self, micro_batches: Sequence[MicroBatch], number: int) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Makes one step on micro-batches of any sizes, which count alike. Returns what `steps` does, of each."""
        count = len(micro_batches)
        if count not in self._one:
            signature = [[self._specs(None)] * count, tf.TensorSpec([], tf.int32)]  # a smaller one is no other program
            self._one[count] = tf.function(self._micro_batches, input_signature=signature, autograph=False)
        tensors = [self._tensors(batch) for batch in micro_batches]
        return self._named(self._one[count](tensors, tf.constant(self.averaging(number))).numpy())

    def _specs(self, *size: int | None) -> tuple[tf.TensorSpec, ...]:
        """Describes windows, t and noise."""
        noise = tf.TensorSpec([*size, self.horizon, self.model.transition_dim], self.model.dtype)
        return tf.TensorSpec(size, tf.int32), tf.TensorSpec(size, tf.int32), noise

    def _tensors(self, batch: MicroBatch) -> tuple[Array, Array, Array]:
        items, t, noise = batch
        return tf.constant(items, tf.int32), tf.constant(t, tf.int32), tf.constant(noise, self.model.dtype)

    def _named(self, results: np.ndarray) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        return results[:, 0], {name: results[:, i + 1] for i, name in enumerate(self.names)}

    def _train_steps(self, items: Array, t: Array, noise: Array, average: Array) -> Array:
        step = tf.autograph.experimental.do_not_convert(self._micro_batches)  # AutoGraph is for the loop alone
        n = tf.shape(items)[0]
        results = tf.TensorArray(self.model.dtype, size=n)
        for i in tf.range(n):
            results = results.write(i, step([(items[i], t[i], noise[i])], average[i])[0])
        return results.stack()

    def _gradients(self, items: Array, t: Array, noise: Array) -> tuple[Array, dict[str, Array], list[Array]]:
        """Returns the loss of windows [B], what else is reported of them, and the gradients."""
        with tf.GradientTape() as tape:
            loss, infos = self.loss(items, t, noise)
        return loss, infos, tape.gradient(loss, self.variables)

    def _micro_batches(self, batches: Sequence[tuple[Array, Array, Array]], average: Array) -> Array:
        gradients, results = [], []
        for batch in batches:
            loss, infos, grads = replicas.averaged(self._gradients, *batch)
            gradients.append(grads)
            self.names = list(infos)
            results.append(tf.stack([loss, *infos.values()]))
        if len(batches) > 1:
            gradients = [[sum(parts) / len(batches) for parts in zip(*gradients, strict=True)]]
        self.optimizer.apply(gradients[0])
        follow(self.averaged, self.variables, average, self.ema_decay)
        return tf.stack(results)
