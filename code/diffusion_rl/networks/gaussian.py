"""Gaussian policy heads.

Shape letters: B batch, To observation history, O observation, H horizon, A action.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from diffusion_rl.core.keras import floatx
from diffusion_rl.core.noise import init_noise


class _Dense(tf.Module):
    """y = x W + b, initialised as torch.nn.Linear: uniform in +-1/sqrt(fan in)."""

    def __init__(self, n_in: int, n_out: int, name: str | None = None):
        super().__init__(name=name)
        bound = 1.0 / np.sqrt(n_in)
        self.kernel = tf.Variable(init_noise().uniform((n_in, n_out), -bound, bound, dtype=floatx()), name="kernel")
        self.bias = tf.Variable(init_noise().uniform((n_out,), -bound, bound, dtype=floatx()), name="bias")

    def __call__(self, x: tf.Tensor) -> tf.Tensor:
        return x @ self.kernel + self.bias


class _Perceptron(tf.Module):
    def __init__(self, dims: Sequence[int], activate_last: bool, name: str | None = None):
        super().__init__(name=name)
        self.dense = [_Dense(a, b) for a, b in zip(dims[:-1], dims[1:], strict=True)]
        self.activate_last = activate_last

    def __call__(self, x: tf.Tensor) -> tf.Tensor:
        for i, layer in enumerate(self.dense):
            x = layer(x)
            if i < len(self.dense) - 1 or self.activate_last:
                x = tf.nn.relu(x)
        return x


class GaussianHead(tf.Module):
    """State-dependent mean and standard deviation; tanh squashing of the sample is the algorithm's business."""

    def __init__(
        self, cond_dim: int, action_dim: int, horizon_steps: int, mlp_dims: Sequence[int], std_min: float, std_max: float
    ):
        super().__init__()
        out = action_dim * horizon_steps
        self.base = _Perceptron([cond_dim, *mlp_dims], activate_last=True)
        self.mean = _Perceptron([mlp_dims[-1], out], activate_last=False)
        self.logvar = _Perceptron([mlp_dims[-1], out], activate_last=False)
        self.logvar_min, self.logvar_max = float(np.log(std_min**2)), float(np.log(std_max**2))

    def __call__(self, cond: dict[str, tf.Tensor]) -> tuple[tf.Tensor, tf.Tensor]:
        """cond["state"] [B,To,O] -> mean, scale, both [B,H*A]."""
        state = cond["state"]
        h = self.base(tf.reshape(state, [-1, int(np.prod(state.shape[1:]))]))
        squashed = tf.tanh(self.logvar(h))
        logvar = self.logvar_min + 0.5 * (self.logvar_max - self.logvar_min) * (squashed + 1.0)
        return self.mean(h), tf.exp(0.5 * logvar)


class DoubleQ(tf.Module):
    """Two state-action values."""

    def __init__(self, cond_dim: int, action_dim: int, action_steps: int, mlp_dims: Sequence[int], **_: Any):
        super().__init__()
        dims = [cond_dim + action_dim * action_steps, *mlp_dims, 1]
        self.q1, self.q2 = _Perceptron(dims, activate_last=False), _Perceptron(dims, activate_last=False)

    def __call__(self, cond: dict[str, tf.Tensor], action: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """cond["state"] [B,To,O], action [B,Ta,A] -> q1, q2, both [B]."""
        state = cond["state"]
        x = tf.concat(
            [
                tf.reshape(state, [-1, int(np.prod(state.shape[1:]))]),
                tf.reshape(action, [-1, int(np.prod(action.shape[1:]))]),
            ],
            axis=-1,
        )
        return self.q1(x)[:, 0], self.q2(x)[:, 0]
