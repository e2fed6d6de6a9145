"""Eta of DDIM (Song et al. 2021): the level of noise between deterministic (0) and DDPM-like (1) sampling.

Each module maps {"state": [B,To,O]} to [B,1] or [B,A]; training normally holds it at 1 and evaluation at 0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from diffusion_rl.core.errors import UserError
from diffusion_rl.core.keras import floatx
from diffusion_rl.core.noise import init_rng
from diffusion_rl.core.typing import Array
from diffusion_rl.networks.layers import Linear, Network, flatten_state, without_bias
from diffusion_rl.networks.mlp import MLP


def _logit(base_eta: float, min_eta: float, max_eta: float) -> float:
    normalized = 2 * (base_eta - min_eta) / (max_eta - min_eta) - 1
    if normalized >= 1:
        return math.inf  # base_eta == max_eta: tanh(inf) = 1, as in the reference
    return -math.inf if normalized <= -1 else math.atanh(normalized)


def _batch(cond: dict[str, Array]) -> Array:
    return tf.shape(cond["state"] if "state" in cond else cond["rgb"])[0]


class EtaAction(Network):
    """Returns one number per action dimension."""

    def __init__(
        self, action_dim: int, base_eta: float = 0.5, min_eta: float = 0.1, max_eta: float = 1.0, **unused: Any
    ):
        super().__init__(dtype=floatx())
        self.min, self.max = min_eta, max_eta
        self.eta_logit = tf.Variable(np.full(action_dim, _logit(base_eta, min_eta, max_eta), floatx()))

    def logit(self) -> Array:
        """Returns what tanh brings into the range, [A]."""
        return tf.convert_to_tensor(self.eta_logit)

    def call(self, cond: dict[str, Array]) -> Array:
        """Maps {"state": [B,To,O]} or {"rgb": [B,...]} to [B,A]."""
        eta = 0.5 * (tf.tanh(self.logit()) + 1) * (self.max - self.min) + self.min
        return tf.tile(eta[None], [_batch(cond), 1])


class EtaFixed(EtaAction):
    """Returns one number for all inputs, [B,1]. No gradient reaches it, even with `learn_eta` (as in the reference)."""

    def __init__(self, base_eta: float = 0.5, min_eta: float = 0.1, max_eta: float = 1.0, **unused: Any):
        super().__init__(1, base_eta, min_eta, max_eta)

    def logit(self) -> Array:
        """Returns what tanh brings into the range, [1]."""
        return tf.stop_gradient(self.eta_logit)


class EtaState(Network):
    """One number per observation: base + tanh(mlp(observation)), clamped to [min, max]."""

    per_action = False

    def __init__(
        self,
        input_dim: int,
        mlp_dims: Sequence[int],
        activation_type: str = "ReLU",
        out_activation_type: str = "Identity",
        base_eta: float = 0.5,
        min_eta: float = 0.1,
        max_eta: float = 1.0,
        gain: float = 1e-2,
        action_dim: int = 1,
        **unused: Any,
    ):
        super().__init__(dtype=floatx())
        self.base, self.min, self.max = base_eta, min_eta, max_eta
        dims = [input_dim, *mlp_dims, action_dim if self.per_action else 1]
        self.mlp_res = MLP(dims, activation_type=activation_type, out_activation_type=out_activation_type)
        for layer in self.mlp_res.layers:
            _xavier_normal(layer.linear, gain)

    def call(self, cond: dict[str, Array]) -> Array:
        """Maps {"state": [B,To,O]} to [B,1], or [B,A] of `EtaStateAction`. Raises UserError for images."""
        if "rgb" in cond or "features" in cond:
            raise UserError("eta that depends on the state does not take images: use EtaFixed or EtaAction")
        eta = tf.tanh(self.mlp_res(flatten_state(cond))) + self.base
        # (min - base) + base, not min: the reference's own rounding of the bounds
        return tf.clip_by_value(eta, self.min - self.base + self.base, self.max - self.base + self.base)


class EtaStateAction(EtaState):
    """One number per observation and action dimension; other arguments as in `EtaState`."""

    per_action = True

    def __init__(self, action_dim: int, base_eta: float = 1, min_eta: float = 1e-3, max_eta: float = 2, **kwargs: Any):
        super().__init__(action_dim=action_dim, base_eta=base_eta, min_eta=min_eta, max_eta=max_eta, **kwargs)


def _xavier_normal(linear: Linear, gain: float) -> None:
    """Draws weights by Glorot's normal initialisation, so small that the network starts at zero."""
    fan_in, fan_out = linear.kernel.shape
    std = gain * math.sqrt(2.0 / (fan_in + fan_out))
    linear.kernel.assign(init_rng().normal((fan_in, fan_out), dtype=floatx()) * std)
    without_bias(linear)
