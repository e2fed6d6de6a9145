"""Optimizers in the form of torch.optim, as pure updates over `tf.Variable`s.

Keras' AdamW places epsilon and the decay elsewhere and cannot be configured to match, so the update is written out.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from diffusion_rl.core import replicas
from diffusion_rl.core.errors import UserError
from diffusion_rl.core.lr_schedules import CosineWarmupRestarts


class AdamW:
    """Adam with decoupled weight decay (Loshchilov & Hutter 2019), in the order of torch.optim.AdamW:

        p <- p (1 - lr * weight_decay)
        m <- b1 m + (1 - b1) g,    v <- b2 v + (1 - b2) g^2
        p <- p - lr / (1 - b1^t) * m / (sqrt(v) / sqrt(1 - b2^t) + eps)

    Args:
        variables: what is trained; the order is that of the gradients given to `apply`.
        lr: initial learning rate; `learning_rate` is a variable, assign to it for a schedule.
        weight_decay: decoupled decay. torch's default is 0.01; the reference always passes its own. With
            `decoupled=False` the decay is added to the gradient instead, which is torch.optim.Adam.
        fused: one kernel for each variable, which goes through memory once; only the rounding differs.
    """

    def __init__(
        self,
        variables: Sequence[tf.Variable],
        lr: float,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        decoupled: bool = True,
        fused: bool = False,
    ):
        self.variables, self.fused = list(variables), fused
        self.weight_decay, self.betas, self.eps, self.decoupled = float(weight_decay), betas, eps, decoupled
        # float64 scalars: bias corrections lose digits in float32, and the cost of two scalars is nothing.
        self.learning_rate = tf.Variable(lr, dtype=tf.float64, trainable=False)
        self.step = tf.Variable(0, dtype=tf.int64, trainable=False)
        self.exp_avg = [tf.Variable(tf.zeros_like(v), trainable=False) for v in self.variables]
        self.exp_avg_sq = [tf.Variable(tf.zeros_like(v), trainable=False) for v in self.variables]

    def apply(self, grads: Sequence[tf.Tensor | None]) -> None:
        """Takes a step along gradients [...]; one of None leaves its variable alone, without decay, as torch does."""
        if len(grads) != len(self.variables):
            raise ValueError(f"{len(grads)} gradients for {len(self.variables)} variables")
        step = self.step.assign_add(1)
        t = tf.cast(step, tf.float64)
        b1, b2 = self.betas
        lr = self.learning_rate.read_value()
        step_size = lr / (1.0 - tf.constant(b1, tf.float64) ** t)
        root_correction = tf.sqrt(1.0 - tf.constant(b2, tf.float64) ** t)
        decay = 1.0 - lr * self.weight_decay
        for var, m, v, grad in zip(self.variables, self.exp_avg, self.exp_avg_sq, grads, strict=True):
            if grad is None:
                continue
            dtype = var.dtype
            value = var.read_value()
            if self.weight_decay and self.decoupled:
                value = value * tf.cast(decay, dtype)
            elif self.weight_decay:
                grad = grad + tf.constant(self.weight_decay, dtype) * value
            if self.fused:
                if self.weight_decay and self.decoupled:
                    var.assign(value)
                self._fused(
                    var, m, v, grad, tf.cast(step_size * root_correction, dtype), tf.cast(root_correction, dtype)
                )
                continue
            m_new = m.assign(tf.constant(b1, dtype) * m + tf.constant(1.0 - b1, dtype) * grad)
            v_new = v.assign(tf.constant(b2, dtype) * v + tf.constant(1.0 - b2, dtype) * tf.square(grad))
            denominator = tf.sqrt(v_new) / tf.cast(root_correction, dtype) + tf.constant(self.eps, dtype)
            var.assign(value - tf.cast(step_size, dtype) * m_new / denominator)

    def _fused(self, var: tf.Variable, m: tf.Variable, v: tf.Variable, grad: Any, rate: Any, correction: Any) -> None:
        """Runs TensorFlow's kernel, its corrections off: p <- p - rate m / (sqrt(v) + eps correction), m and v as
        above."""
        b1, b2 = (tf.constant(b, var.dtype) for b in self.betas)
        none = tf.zeros([], var.dtype)
        tf.raw_ops.ResourceApplyAdam(
            var=var.handle,
            m=m.handle,
            v=v.handle,
            beta1_power=none,
            beta2_power=none,
            lr=rate,
            beta1=b1,
            beta2=b2,
            epsilon=tf.constant(self.eps, var.dtype) * correction,
            grad=grad,
        )

    def state(self) -> dict[str, np.ndarray]:
        """Returns the state, keyed `step`, `learning_rate`, `exp_avg.<i>` and `exp_avg_sq.<i>`, i counting the
        variables."""
        state = {"step": self.step.numpy(), "learning_rate": self.learning_rate.numpy()}
        for i, (m, v) in enumerate(zip(self.exp_avg, self.exp_avg_sq, strict=True)):
            state[f"exp_avg.{i}"], state[f"exp_avg_sq.{i}"] = m.numpy(), v.numpy()
        return {k: np.asarray(v) for k, v in state.items()}

    def restore(self, state: dict[str, np.ndarray]) -> None:
        """Restores what `state` returned."""
        self.step.assign(int(state["step"]))
        self.learning_rate.assign(float(state["learning_rate"]))
        for i, (m, v) in enumerate(zip(self.exp_avg, self.exp_avg_sq, strict=True)):
            m.assign(state[f"exp_avg.{i}"])
            v.assign(state[f"exp_avg_sq.{i}"])


def clip_by_global_norm(grads: Sequence[tf.Tensor | None], max_norm: float) -> tuple[list[Any], tf.Tensor]:
    """Scales gradients [...] to a joint norm of at most `max_norm`, in torch's form: g * min(1, max / (norm + 1e-6)).

    Returns the clipped gradients (None stays None) and the norm before clipping.
    """
    present = [g for g in grads if g is not None]
    norm = tf.sqrt(tf.add_n([tf.reduce_sum(tf.square(g)) for g in present]))
    scale = tf.minimum(tf.constant(max_norm, norm.dtype) / (norm + 1e-6), 1.0)
    return [None if g is None else g * scale for g in grads], norm


class GradientSteps:
    """One optimizer step of a named part of a model on a loss. Graph-safe.

    Args:
        optimizers: by the part's name.
    """

    def __init__(self, optimizers: Mapping[str, AdamW]):
        self.optimizers = optimizers

    def __call__(
        self,
        part: str,
        loss: Callable[..., tf.Tensor],
        max_norm: float | None = None,
        apply: bool = True,
        rows: Sequence[Any] = (),
    ) -> tf.Tensor:
        """Takes a step on a loss, differentiated by the part's variables alone; returns the loss, a scalar.

        Args:
            loss: of `rows`; where there are such, a mean over them.
            max_norm: clip the gradient's norm to it (None: no clipping).
            apply: False only evaluates the loss.
            rows: tensors [B,...], or structures of them, which replicas may share.

        Raises:
            UserError: there are replicas, and nothing that they can share.
        """
        if not apply:
            return loss(*rows)
        optimizer = self.optimizers[part]
        if replicas.count() > 1 and not rows:
            raise UserError("train.devices, train.replicas: the updates of this algorithm are not shared")

        def differentiated(*rows: Any) -> tuple[tf.Tensor, list[tf.Tensor | None]]:
            with tf.GradientTape(watch_accessed_variables=False) as tape:
                tape.watch(optimizer.variables)
                value = loss(*rows)
            return value, tape.gradient(value, optimizer.variables)

        value, grads = replicas.averaged(differentiated, *rows)
        if max_norm is not None:
            grads, _ = clip_by_global_norm(grads, max_norm)
        optimizer.apply(grads)
        return value


class OptimizerGroup(GradientSteps):
    """AdamW for each part of a model; calling the group takes a step of one part.

    Args:
        optimizers: by the part's name.
        schedules: by the part's name; a part without one keeps its learning rate.
    """

    def __init__(self, optimizers: Mapping[str, AdamW], schedules: Mapping[str, CosineWarmupRestarts]):
        super().__init__(optimizers)
        self.schedules = schedules

    @property
    def learning_rates(self) -> dict[str, float]:
        """Returns the present rates by the part's name."""
        return {name: float(optimizer.learning_rate.numpy()) for name, optimizer in self.optimizers.items()}

    def apply(self, name: str, grads: Sequence[tf.Tensor | None]) -> None:
        """Takes a step of one part with gradients [...] that are known already. Graph-safe."""
        self.optimizers[name].apply(grads)

    def advance(self, names: Collection[str] | None = None) -> None:
        """Goes on to the next iteration's learning rates, of these parts only (None: of all)."""
        for name, schedule in self.schedules.items():
            if names is None or name in names:
                self.optimizers[name].learning_rate.assign(schedule.step())

    def tensors(self) -> dict[str, np.ndarray]:
        """Returns the moments as `optimizer.<part>.<name>`, for a checkpoint."""
        return {
            f"optimizer.{part}.{name}": np.asarray(value)
            for part, optimizer in self.optimizers.items()
            for name, value in optimizer.state().items()
        }

    def state(self) -> dict[str, Any]:
        """Returns where the schedules stand, as JSON values."""
        return {"schedules": {name: schedule.state() for name, schedule in self.schedules.items()}}

    def restore(self, tensors: Mapping[str, np.ndarray], state: Mapping[str, Any]) -> None:
        """Takes back what `tensors` and `state` returned; schedules that were changed since take effect at once."""
        for name, optimizer in self.optimizers.items():
            prefix = f"optimizer.{name}."
            optimizer.restore({k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)})
        for name, schedule in self.schedules.items():
            schedule.restore(state["schedules"][name])
            self.optimizers[name].learning_rate.assign(schedule.lr)
