"""Training steps of VAE + Diffusion RL: optimizers, compiled updates, averages of the weights.

Shapes as in `methods.vae_latent.model`; n steps in one compiled call.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import tensorflow as tf

from diffusion_rl.core.ema import average_into
from diffusion_rl.core.optimizers import AdamW, clip_by_global_norm
from diffusion_rl.methods.on_policy.ppo import chunk_log_prob
from diffusion_rl.methods.vae_latent.model import Batch, Draws, LatentDiffusionRL
from diffusion_rl.networks.layers import Array, variables_of

KEEP, COPY = 1.0, 0.0  # decays that leave the averaged weights alone, or make a copy of the weights


class LatentTrainer:
    """Updates of a `LatentDiffusionRL`, in place; settings are those of the algorithm."""

    def __init__(self, algorithm: LatentDiffusionRL):
        self.algorithm, s = algorithm, algorithm.settings
        parts = {
            "vae": (algorithm.vae, s["vae_learning_rate"]),
            "network": (algorithm.policy.actor_ft, s["learning_rate"]),
            "online": (algorithm.policy.actor_ft, s["rl_learning_rate"]),
            "critic": (algorithm.policy.critic, s["value_learning_rate"]),
        }
        if s["offline_rl"]:
            parts["q"] = (algorithm.q, s["q_lr"])
        self.optimizers = {name: AdamW(variables_of(module), rate) for name, (module, rate) in parts.items()}
        self.max_norm = float(s["clip_grad_norm"])
        self.data: dict[str, Array] = {}
        self.compile()

    def compile(self) -> None:
        """(Re)builds the compiled functions; needed again when stage 3 begins, which trains less."""
        critic = self.algorithm.policy.critic

        def compiled(function: Any) -> Any:  # nothing here needs autograph, which takes its time
            return tf.function(function, autograph=False, reduce_retracing=True)

        self._vae = compiled(lambda *inputs: self._many(self._vae_step, *inputs))
        self._offline = compiled(lambda *inputs: self._many(self._offline_step, *inputs))
        self._online = compiled(self._online_step)
        self._values = compiled(lambda state: tf.reshape(critic({"state": state}), [-1]))
        act_steps = self.algorithm.settings["act_steps"]
        self._reduce = compiled(lambda log_probs: chunk_log_prob(log_probs, act_steps))  # [M,F,H,N*Z] -> [M,F]
        self._names: dict[str, list[str]] = {}  # of what a step returns, known once it has been traced

    # ---------- stages 0 to 2 ----------

    def pretrain_vae(self, batches: Batch, draws: Draws) -> dict[str, np.ndarray]:
        """Makes n steps of the VAE alone; every array has a leading axis n. Returns losses by name, [n] each."""
        return self._named("vae", self._vae(self._tensors(batches), self._tensors(draws)))

    def offline(self, batches: Batch, draws: Draws, decays: np.ndarray) -> dict[str, np.ndarray]:
        """Makes n steps on L_off (and of Q); `decays` [n] of the averaged weights. Returns losses by name, [n] each."""
        inputs = self._tensors(batches), self._tensors(draws), tf.constant(decays, self.algorithm.dtype)
        return self._named("offline", self._offline(*inputs))

    def _many(self, step: Any, *inputs: Any) -> Array:
        def one(i: Array, results: tf.TensorArray) -> tuple[Array, tf.TensorArray]:
            return i + 1, results.write(i, step(*(_at(value, i) for value in inputs)))

        n = tf.shape(inputs[0].state)[0]
        results = tf.TensorArray(self.algorithm.dtype, size=n)
        return tf.while_loop(lambda i, _: i < n, one, (0, results), parallel_iterations=1)[1].stack()

    def _vae_step(self, batch: Batch, draws: Draws) -> Array:
        a = self.algorithm
        with tf.GradientTape() as tape:
            recon, kl = a.vae_losses(batch, draws.vae_noise)
            loss = recon + a.settings["vae_kl_weight"] * kl
        self._apply({"vae": tape.gradient(loss, self.optimizers["vae"].variables)})
        return self._stacked("vae", {"vae_loss": loss, "vae_recon_loss": recon, "vae_kl_loss": kl})

    def _offline_step(self, batch: Batch, draws: Draws, decay: Array) -> Array:
        a = self.algorithm
        names = ["network"] if a.settings["freeze_vae"] or a.online else ["network", "vae"]
        with tf.GradientTape() as tape:
            loss, parts = a.offline_loss(batch, draws)
        grads = tape.gradient(loss, [self.optimizers[name].variables for name in names])
        self._apply(dict(zip(names, grads, strict=True)))
        if a.settings["offline_rl"]:
            parts["q_loss"] = self._q_step(batch, draws)
        self._average(decay)
        return self._stacked("offline", {"loss": loss, **parts})

    def _q_step(self, batch: Batch, draws: Draws) -> Array:
        a, q = self.algorithm, self.optimizers["q"]
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(q.variables)
            loss = a.q_loss(batch, draws)
        q.apply(tape.gradient(loss, q.variables))
        average_into(variables_of(a.q_target), q.variables, 1 - a.settings["target_update_tau"])
        return loss

    def _apply(self, grads: dict[str, list[Array]]) -> None:
        """Clip the norm of all gradients together, then a step of each optimizer."""
        clipped, _ = clip_by_global_norm(sum(grads.values(), []), self.max_norm)
        for name in grads:
            count = len(grads[name])
            self.optimizers[name].apply(clipped[:count])
            clipped = clipped[count:]

    def _average(self, decay: Array) -> None:
        average_into(variables_of(self.algorithm.ema), variables_of(self.algorithm.policy.actor_ft), decay)

    # ---------- stage 3 ----------

    def load(self, rollout: Mapping[str, np.ndarray]) -> None:
        """Takes a rollout of M samples: state, chains, log_probs [M,F,H,N*Z], returns, values, advantages [M]."""
        self.data = {name: tf.constant(array, self.algorithm.dtype) for name, array in rollout.items()}
        self.data["old_log_prob"] = self._reduce(self.data.pop("log_probs"))

    def online(self, items: np.ndarray, batch: Batch | None, draws: Draws | None, decay: float) -> dict[str, float]:
        """Steps on L of the samples `items` [b]; batch and draws are of L_off, None where its weight is zero."""
        inputs = [None if arrays is None else self._tensors(arrays) for arrays in (batch, draws)]
        losses = self._online(
            tf.constant(items, tf.int32), self.data, *inputs, tf.constant(decay, self.algorithm.dtype)
        )
        return dict(zip(self._names["online"], losses.numpy().tolist(), strict=True))

    def _online_step(self, items: Array, data: dict[str, Array], batch: Any, draws: Any, decay: Array) -> Array:
        a, s = self.algorithm, self.algorithm.settings
        network, critic = self.optimizers["online"], self.optimizers["critic"]
        with tf.GradientTape() as tape:
            actor_loss, critic_loss, watched = a.online_loss(items, data)
            loss = s["online_rl_weight"] * (actor_loss + critic_loss)
            if batch is not None:
                offline, parts = a.offline_loss(batch, draws)
                loss += s["offline_rl_weight"] * offline
                watched = {**parts, **watched}
        grads = tape.gradient(loss, [network.variables, critic.variables])
        self._apply({"online": grads[0]})
        self._apply({"critic": grads[1]})
        self._average(decay)
        return self._stacked("online", {"loss": loss, **watched})

    def values(self, state: np.ndarray) -> np.ndarray:
        """Returns the values [M] of states [M,To,...]."""
        return self._values(tf.constant(state, self.algorithm.dtype)).numpy()

    # ---------- between ----------

    def _tensors(self, arrays: Any) -> Any:
        dtype = self.algorithm.dtype
        kinds = {name: tf.int32 if name == "t" else dtype for name in arrays._fields}
        items = arrays._asdict().items()
        return type(arrays)(**{k: None if v is None else tf.constant(v, kinds[k]) for k, v in items})

    def _stacked(self, what: str, parts: dict[str, Array]) -> Array:
        self._names[what] = list(parts)
        return tf.stack(list(parts.values()))

    def _named(self, what: str, losses: Array) -> dict[str, np.ndarray]:
        return dict(zip(self._names[what], losses.numpy().T, strict=True))


def _at(value: Any, i: Array) -> Any:
    """Returns entry i of an array, or of each array of a named tuple."""
    if isinstance(value, tuple):
        kind: Any = type(value)
        return kind(*(None if array is None else array[i] for array in value))
    return value[i]
