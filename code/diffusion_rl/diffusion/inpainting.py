"""Trajectories of which some entries are known: Diffuser's conditioning (Janner et al. 2022, section 3.3).

Shape letters: B batch, H horizon, A action, O observation, D = A + O width of a transition (actions first).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, TypeAlias

import numpy as np
import tensorflow as tf

from diffusion_rl.core.typing import Array

Conditions: TypeAlias = Mapping[int, Array]  # observations [B,O] by time index


class Known(NamedTuple):
    """The known entries of a batch of trajectories: `mask` [H,D] bool says where, `values` [B,H,D] what."""

    mask: np.ndarray
    values: Array

    @classmethod
    def of(cls, conditions: Conditions, horizon: int, action_dim: int, like: Array) -> Known:
        """Takes observations [B,O], or [1,O] for all, at the given times; `like` [B,H,D] gives batch, width and
        dtype."""
        batch, width = tf.shape(like)[0], like.shape[2]
        mask, rows = np.zeros((horizon, width), bool), [tf.zeros([batch, width], like.dtype)] * horizon
        for t, observation in conditions.items():
            mask[t, action_dim:] = True
            observation = tf.broadcast_to(tf.cast(observation, like.dtype), [batch, width - action_dim])
            rows[t] = tf.pad(observation, [[0, 0], [action_dim, 0]])
        return cls(mask, tf.stack(rows, axis=1))

    def put(self, x: Array) -> Array:
        """Returns x [B,H,D] with the known entries in place."""
        return tf.where(self.mask, self.values, x) if self.mask.any() else x


def apply_conditions(x: Array, conditions: Conditions, action_dim: int) -> Array:
    """Returns x [B,H,D] with the observation part at the given times overwritten."""
    return Known.of(conditions, x.shape[1], action_dim, x).put(x)
