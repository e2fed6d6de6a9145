"""What DPOER does with a rollout beyond DPPO: estimates of the entropy, and the temperature."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import tensorflow as tf

from diffusion_rl.core.errors import UserError
from diffusion_rl.core.keras import floatx
from diffusion_rl.core.optimizers import AdamW
from diffusion_rl.methods.on_policy.dppo_trainer import DPPOTrainer
from diffusion_rl.networks.layers import Array


class DPOERTrainer(DPPOTrainer):
    """Samples, values and updates of a `DPOER` policy; arguments as of `PPOTrainer`."""

    def __init__(self, algorithm: Any, train: Mapping[str, Any], reward_horizon: int):
        if train.get("use_bc_loss", False):
            raise UserError("train.use_bc_loss=true: DPOER has no behaviour-cloning loss")
        self.published, self.n_minibatches = algorithm.mode == "published", 0
        self.entropy = tf.Variable(tf.zeros([], algorithm.dtype))
        self.std_floor = tf.Variable(tf.zeros([], algorithm.dtype))
        self.temperature_optimizer = AdamW([algorithm._temperature], algorithm.temperature_lr)
        super().__init__(algorithm, train, reward_horizon)

    def compile(self) -> None:
        super().compile()
        self._refresh = tf.function(self._published_entropy)
        self._tune = tf.function(self._temperature_step)

    def draw(self, noise: Any, rows: int) -> Any:
        """Published: noise of the chunks [B',H,A] when an estimate is due. Corrected: that of whole chains."""
        a = self.algorithm
        if not self.published:
            return noise.normal(self.actor.noise_shape(min(rows, a.entropy_states) * a.entropy_samples), floatx())
        if self.n_minibatches % a.entropy_refresh_interval:
            return None
        return noise.normal((min(rows, a.entropy_rows or rows), a.horizon_steps, a.action_dim), floatx())

    def minibatch(self, rows: np.ndarray, train_actor: bool, number: int, draws: Any = None) -> dict[str, float]:
        a = self.algorithm
        if self.published and draws is not None:
            fitted = tf.constant(rows[: len(draws)], tf.int32)
            self.entropy.assign(self._refresh(fitted, self.data, tf.constant(draws, a.dtype)))
            draws = None
        self.std_floor.assign(a.min_sampling_denoising_std)
        self.n_minibatches += 1
        losses = super().minibatch(rows, train_actor, number, draws)
        self._tune()
        return losses

    def _published_entropy(self, rows: Array, data: dict[str, Array], noise: Array) -> Array:
        f = self.algorithm.ft_denoising_steps
        sample, step = rows // f, rows % f
        previous = tf.gather_nd(data["chains"], tf.stack([sample, step], -1))
        return self.algorithm.published_entropy({"state": tf.gather(data["state"], sample)}, previous, step, noise)

    def _temperature_step(self) -> None:
        self.temperature_optimizer.apply([self.algorithm.temperature_gradient(self.entropy)])

    def gradients(self, rows: Array, data: dict[str, Array], draws: Any) -> tuple[Any, dict[str, list[Array]]]:
        losses, grads = super().gradients(rows, data, None)
        if self.published:
            return losses, grads
        a, actor = self.algorithm, self.trained["actor"]
        states = tf.gather(data["state"], rows[: a.entropy_states] // a.ft_denoising_steps)
        with tf.GradientTape() as tape:
            entropy = a.action_entropy({"state": states}, draws, self.std_floor)
            loss = -a.temperature / a.entropy_scale * entropy
        self.entropy.assign(entropy)
        more = tape.gradient(loss, actor, unconnected_gradients=tf.UnconnectedGradients.ZERO)
        grads["actor"] = [g + m for g, m in zip(grads["actor"], more, strict=True)]
        return losses, grads

    # ---------- between iterations ----------

    def watched(self) -> dict[str, float]:
        found = {"entropy": self.entropy, "temperature": self.algorithm.temperature}
        return super().watched() | {name: float(value.numpy()) for name, value in found.items()}

    def tensors(self) -> dict[str, np.ndarray]:
        own = {f"optimizer.temperature.{k}": v for k, v in self.temperature_optimizer.state().items()}
        own["train.temperature"] = self.algorithm._temperature.numpy()
        return super().tensors() | own | {"train.entropy": self.entropy.numpy()}

    def state(self) -> dict[str, Any]:
        return super().state() | {"n_minibatches": self.n_minibatches}

    def restore(self, tensors: Mapping[str, np.ndarray], state: Mapping[str, Any]) -> None:
        super().restore(tensors, state)
        prefix = "optimizer.temperature."
        self.temperature_optimizer.restore({k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)})
        self.algorithm._temperature.assign(tensors["train.temperature"])
        self.entropy.assign(tensors["train.entropy"])
        self.n_minibatches = int(state["n_minibatches"])
