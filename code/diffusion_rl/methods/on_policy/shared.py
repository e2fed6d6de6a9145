"""On-policy gradients on several replicas: each computes those of its rows of a minibatch (`core.replicas`)."""

from __future__ import annotations

import abc
from typing import Any, ClassVar

import tensorflow as tf

from diffusion_rl.core import replicas
from diffusion_rl.networks.layers import Array

Gradients = dict[str, Any]  # by the name of what is trained, a list of arrays or None
Losses = dict[str, Array]  # the parts of the loss and what is watched beside them, all scalars


class SharedGradients(abc.ABC):
    """Shares the rows of a minibatch among replicas; a trainer's `gradients` says what is computed of rows."""

    DRAWS_AXIS: ClassVar[int] = 0  # that of the rows, in what minibatches draw
    policy: Any

    @property
    @abc.abstractmethod
    def rows_per_sample(self) -> int:
        """Returns how many rows of minibatches one sample makes, which stand one after the other."""

    @abc.abstractmethod
    def gradients(self, rows: Array, data: dict[str, Array], draws: Any) -> tuple[Losses, Gradients]:
        """Returns the parts of the loss of rows [B] and the gradients by name, all of them means over rows."""

    def shared_gradients(self, rows: Array, data: dict[str, Array], draws: Any) -> tuple[Losses, Gradients]:
        """Returns what `gradients` does of rows [B], computed by all replicas where there are several.

        Advantages are normalised over the whole minibatch before it is shared.
        """
        if replicas.count() == 1:
            return self.gradients(rows, data, draws)
        among = tf.gather(data["advantages"], rows // self.rows_per_sample)
        data = {**data, "advantages": self.policy.normalised(data["advantages"], among)}

        def some(rows: Array, drawn: Array | None) -> tuple[Losses, Gradients]:
            return self.gradients(rows, data, self._swapped(drawn))

        with self.policy.normalised_before():
            return replicas.averaged(some, rows, self._swapped(draws))

    def _swapped(self, draws: Array | None) -> Array | None:
        """Returns draws [...] with the axis of the rows and the first one in each other's place."""
        if draws is None or self.DRAWS_AXIS == 0:
            return draws
        return tf.experimental.numpy.swapaxes(draws, 0, self.DRAWS_AXIS)
