"""What DPPO does with a rollout: optimizers, compiled minibatch updates, learning-rate schedules.

`minibatch` is the plain update: gather, `DPPO.minibatch_loss`, gradients, AdamW. Where the networks allow it
(`algorithms.dppo_fast`), the same update runs in a restructured form; a test holds the two together.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import tensorflow as tf

from diffusion_rl.algorithms import dppo_fast
from diffusion_rl.algorithms.dppo import DPPO, Minibatch, chunk_log_prob
from diffusion_rl.core.lr_schedules import CosineWarmupRestarts
from diffusion_rl.core.optimizers import AdamW, clip_by_global_norm
from diffusion_rl.networks.layers import Array, variables_of
from diffusion_rl.policies.acting import Decision, DiffusionActor

LOSS_NAMES = ("pg_loss", "entropy_loss", "v_loss", "clipfrac", "approx_kl", "ratio", "bc_loss", "eta")


class DPPOTrainer:
    """Samples, values and updates of a `DPPO` policy for the on-policy loop.

    Args:
        algorithm: the policy; its weights are trained in place.
        train: the `train` node of the configuration.
        reward_horizon: actions of a chunk that count in the loss.
    """

    def __init__(self, algorithm: DPPO, train: Mapping[str, Any], reward_horizon: int):
        self.algorithm, self.train, self.reward_horizon = algorithm, train, reward_horizon
        self.trained = {"actor": variables_of(algorithm.actor_ft), "critic": variables_of(algorithm.critic)}
        if algorithm.learn_eta:
            self.trained["eta"] = variables_of(algorithm.eta)
        self.schedules = {name: _schedule(train, name) for name in self.trained}
        self.optimizers = {
            name: AdamW(variables, self.schedules[name].lr, train[f"{name}_weight_decay"])
            for name, variables in self.trained.items()
        }
        self.use_bc_loss = bool(train.get("use_bc_loss", False))
        self.coefficients = {
            "entropy_loss": float(train.get("ent_coef", 0)),
            "v_loss": float(train.get("vf_coef", 0)),
            "bc_loss": float(train.get("bc_loss_coeff", 0)),
        }
        self.eta_update_interval = int(train.get("eta_update_interval", 1))
        self.max_grad_norm = train.get("max_grad_norm", None)
        self.data: dict[str, tf.Tensor] = {}
        self._compile()

    def _compile(self) -> None:
        """(Re)build the compiled functions; needed again when annealing changed the number of fine-tuned steps."""
        a, fast = self.algorithm, bool(self.train.get("fast", True))
        self.actor = DiffusionActor(a, fast)
        self.fast = fast and not self.use_bc_loss and dppo_fast.applicable(a)
        if self.fast:
            self._fast_gradients = dppo_fast.gradients(a, self.reward_horizon, self.coefficients)
        self._values = tf.function(lambda state: tf.reshape(a.critic({"state": state}), [-1]), reduce_retracing=True)
        self._log_probs = tf.function(lambda state, chains: a.log_probs({"state": state}, chains)[0])
        self._chunk_log_prob = tf.function(self._reduce_log_probs)
        self._step = tf.function(self._minibatch_step)

    def _reduce_log_probs(self, log_probs: Array) -> Array:
        """[N,F,H,A] -> [N,F]."""
        flat = tf.reshape(log_probs, tf.concat([[-1], tf.shape(log_probs)[2:]], axis=0))
        return tf.reshape(chunk_log_prob(flat, self.reward_horizon), tf.shape(log_probs)[:2])

    # ---------- collecting ----------

    def act(self, state: np.ndarray, noise: np.ndarray, deterministic: bool) -> Decision:
        """Decide for all environments; see `DiffusionActor.act`."""
        return self.actor.act(state, noise, deterministic)

    def values(self, state: np.ndarray) -> np.ndarray:
        """State values [N] of observations [N,To,O]."""
        return self._values(tf.constant(state, self.algorithm.dtype)).numpy()

    def log_probs(self, state: np.ndarray, chains: np.ndarray, batch_size: int) -> np.ndarray:
        """Log-probabilities [N,F,H,A] per element of chains [N,F+1,H,A], a second pass over the rollout."""
        dtype, shape = self.algorithm.dtype, (-1, *(chains.shape[1] - 1, *chains.shape[2:]))
        parts = [
            self._log_probs(
                tf.constant(state[i : i + batch_size], dtype), tf.constant(chains[i : i + batch_size], dtype)
            ).numpy()
            for i in range(0, len(state), batch_size)
        ]
        return np.concatenate(parts).reshape(shape)

    # ---------- updating ----------

    def load(
        self,
        state: np.ndarray,
        chains: np.ndarray,
        returns: np.ndarray,
        values: np.ndarray,
        advantages: np.ndarray,
        log_probs: np.ndarray,
    ) -> int:
        """Take a rollout of N samples; returns the number of rows N*F that minibatches index.

        Args:
            state: [N,To,O];  chains: [N,F+1,H,A];  returns, values, advantages: [N];
            log_probs: [N,F,H,A] per element, of the policy that collected the rollout.
        """
        arrays = {
            "state": state,
            "chains": chains,
            "returns": returns,
            "values": values,
            "advantages": advantages,
            "old_log_prob": self._chunk_log_prob(tf.constant(log_probs, self.algorithm.dtype)),
        }
        self.data = {name: tf.constant(array, self.algorithm.dtype) for name, array in arrays.items()}
        return len(state) * self.algorithm.ft_denoising_steps

    def minibatch(
        self, rows: np.ndarray, train_actor: bool, number: int, bc_noise: np.ndarray | None = None
    ) -> dict[str, float]:
        """One update.

        Args:
            rows: [B] indices into (sample, denoising step), the step running fastest.
            train_actor: False while only the critic warms up.
            number: of this minibatch within its epoch; eta is trained every `eta_update_interval`-th.
            bc_noise: [steps + 1, B, H, A], where the behaviour-cloning loss is used.

        Returns:
            the parts of the loss by name, as floats.
        """
        a = self.algorithm
        step_eta = a.learn_eta and train_actor and number % self.eta_update_interval == 0
        self.actor.weights_changed()
        noise = None if bc_noise is None else tf.constant(bc_noise, a.dtype)
        losses = self._step(tf.constant(rows, tf.int32), self.data, noise, train_actor, step_eta)
        return dict(zip(LOSS_NAMES, losses.numpy().tolist(), strict=True))

    def _minibatch_step(
        self, rows: Array, data: dict[str, Array], bc_noise: Array | None, train_actor: bool, step_eta: bool
    ) -> Array:
        if self.fast:
            losses, grads = self._fast_gradients(rows, data)
        else:
            losses, grads = self._plain_gradients(rows, data, bc_noise)
        if train_actor:
            if self.max_grad_norm is not None:
                grads["actor"], _ = clip_by_global_norm(grads["actor"], self.max_grad_norm)
            self.optimizers["actor"].apply(grads["actor"])
        if step_eta:
            self.optimizers["eta"].apply(grads["eta"])
        self.optimizers["critic"].apply(grads["critic"])
        return tf.stack([tf.cast(getattr(losses, n), tf.float64) for n in LOSS_NAMES])

    def _plain_gradients(self, rows: Array, data: dict[str, Array], bc_noise: Array | None) -> tuple[Any, dict]:
        a, f = self.algorithm, self.algorithm.ft_denoising_steps
        sample, step = rows // f, rows % f
        batch = Minibatch(
            obs={"state": tf.gather(data["state"], sample)},
            chains_prev=tf.gather_nd(data["chains"], tf.stack([sample, step], -1)),
            chains_next=tf.gather_nd(data["chains"], tf.stack([sample, step + 1], -1)),
            denoising_inds=step,
            returns=tf.gather(data["returns"], sample),
            oldvalues=tf.gather(data["values"], sample),
            advantages=tf.gather(data["advantages"], sample),
            old_log_prob=tf.gather_nd(data["old_log_prob"], tf.stack([sample, step], -1)),
        )
        with tf.GradientTape() as tape:
            losses = a.minibatch_loss(batch, self.reward_horizon, bc_noise)
            weighted = [tf.constant(c, a.dtype) * getattr(losses, n) for n, c in self.coefficients.items()]
            total = losses.pg_loss + tf.add_n(weighted)
        names = list(self.trained)
        grads = tape.gradient(total, [self.trained[n] for n in names])
        return losses, dict(zip(names, grads, strict=True))

    # ---------- between iterations ----------

    def end_iteration(self, train_actor: bool) -> None:
        """Advance the learning-rate schedules (the actor's only after the critic's warm-up) and the annealing."""
        for name, schedule in self.schedules.items():
            if name == "critic" or train_actor:
                self.optimizers[name].learning_rate.assign(schedule.step())
        if self.algorithm.step():
            self._compile()

    @property
    def learning_rates(self) -> dict[str, float]:
        """By name: actor, critic, and eta if it is trained."""
        return {name: float(o.learning_rate.numpy()) for name, o in self.optimizers.items()}

    def tensors(self) -> dict[str, np.ndarray]:
        """Optimizer moments for a checkpoint, under the names of the variables they belong to."""
        out = {}
        for name, optimizer in self.optimizers.items():
            for key, value in optimizer.state().items():
                out[f"optimizer.{name}.{key}"] = value
        return out

    def state(self) -> dict[str, Any]:
        """Schedules and annealing as JSON values."""
        a = self.algorithm
        floor = a._min_sampling_denoising_std
        return {
            "schedules": {n: s.state() for n, s in self.schedules.items()},
            "ft_denoising_steps": a.ft_denoising_steps,
            "ft_denoising_steps_cnt": a.ft_denoising_steps_cnt,
            "actor_is_network": a.actor is a.network,
            "sampling_floor": floor.state() if hasattr(floor, "state") else None,
        }

    def restore(self, tensors: Mapping[str, np.ndarray], state: Mapping[str, Any]) -> None:
        """Inverse of `tensors` and `state` (weights are loaded apart)."""
        for name, optimizer in self.optimizers.items():
            prefix = f"optimizer.{name}."
            optimizer.restore({k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)})
            self.schedules[name].restore(state["schedules"][name])
        a = self.algorithm
        a.ft_denoising_steps, a.ft_denoising_steps_cnt = state["ft_denoising_steps"], state["ft_denoising_steps_cnt"]
        if state["sampling_floor"] is not None:
            a._min_sampling_denoising_std.restore(state["sampling_floor"])
        self._compile()


def _schedule(train: Mapping[str, Any], name: str) -> CosineWarmupRestarts:
    s = train[f"{name}_lr_scheduler"]
    return CosineWarmupRestarts(
        first_cycle_steps=s["first_cycle_steps"],
        max_lr=train[f"{name}_lr"],
        min_lr=s["min_lr"],
        warmup_steps=s["warmup_steps"],
    )
