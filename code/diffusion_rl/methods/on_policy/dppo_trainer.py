"""What DPPO does with a rollout: a row of a minibatch is one denoising step of one chunk.

The plain update is `DPPO.minibatch_loss` and its gradient. Where the networks allow it (`dppo_fast`), the
same update runs in a restructured form; a test holds the two together.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import tensorflow as tf

from diffusion_rl.core.keras import floatx
from diffusion_rl.methods.on_policy import dppo_fast
from diffusion_rl.methods.on_policy.dppo import Minibatch, PPOLoss, chunk_log_prob
from diffusion_rl.methods.on_policy.ppo_trainer import PPOTrainer, observations
from diffusion_rl.networks.layers import Array


class DPPOTrainer(PPOTrainer):
    """Samples, values and updates of a `DPPO` policy; arguments as of `PPOTrainer`."""

    SAMPLES = "chains"

    def modules(self) -> dict[str, Any]:
        a = self.algorithm
        return super().modules() | ({"eta": a.eta} if a.learn_eta else {})

    def compile(self) -> None:
        """(Re)build the compiled functions; needed again when annealing changed the number of fine-tuned steps."""
        super().compile()
        a = self.algorithm
        self.fast = bool(self.train.get("fast", True)) and not self.use_bc_loss and dppo_fast.applicable(a)
        if self.fast:
            self._fast_gradients: Any = dppo_fast.gradients(a, self.reward_horizon, self.coefficients)
        self._log_probs = tf.function(lambda state, chains: a.log_probs({"state": state}, chains)[0])
        self._chunk_log_prob = tf.function(self._reduce_log_probs)

    # ---------- collecting ----------

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

    def seen_log_probs(self, state: Array, samples: Array, rgb: Array) -> np.ndarray:
        return self.actor.log_probs(state, samples, rgb)

    # ---------- updating ----------

    def load(self, state: np.ndarray, samples: np.ndarray, *rest: Any, **images: Any) -> int:
        """Take a rollout of N samples; returns the number of rows N*F, the step running fastest.

        Args:
            samples: chains [N,F+1,H,A];  rest, rgb: as of `PPOTrainer.load`, with log_probs [N,F,H,A] per element.
        """
        return super().load(state, samples, *rest, **images) * self.algorithm.ft_denoising_steps

    def reduce(self, log_probs: np.ndarray) -> Any:
        return self._chunk_log_prob(tf.constant(log_probs, self.algorithm.dtype))

    def _reduce_log_probs(self, log_probs: Array) -> Array:
        """[N,F,H,A] -> [N,F]."""
        flat = tf.reshape(log_probs, tf.concat([[-1], tf.shape(log_probs)[2:]], axis=0))
        return tf.reshape(chunk_log_prob(flat, self.reward_horizon), tf.shape(log_probs)[:2])

    def draw(self, noise: Any, rows: int) -> Any:
        """Noise of the pre-trained policy's chains [steps + 1, B, H, A], where behaviour cloning is added."""
        return noise.normal(self.actor.noise_shape(rows), floatx()) if self.use_bc_loss else None

    def steps(self, name: str, train_actor: bool, number: int) -> bool:
        """Eta is trained every `eta_update_interval`-th minibatch; the actor unless annealing has frozen it."""
        if name == "eta" and number % int(self.train.get("eta_update_interval", 1)):
            return False
        return super().steps(name, train_actor, number) and not (name == "actor" and self.algorithm.actor_is_frozen)

    def gradients(self, rows: Array, data: dict[str, Array], draws: Any) -> tuple[Any, dict[str, list[Array]]]:
        return self._fast_gradients(rows, data) if self.fast else super().gradients(rows, data, draws)

    def losses(self, rows: Array, data: dict[str, Array], draws: Any) -> PPOLoss:
        a, f = self.algorithm, self.algorithm.ft_denoising_steps
        sample, step = rows // f, rows % f
        batch = Minibatch(
            obs=observations(data, sample),
            chains_prev=tf.gather_nd(data["chains"], tf.stack([sample, step], -1)),
            chains_next=tf.gather_nd(data["chains"], tf.stack([sample, step + 1], -1)),
            denoising_inds=step,
            returns=tf.gather(data["returns"], sample),
            oldvalues=tf.gather(data["values"], sample),
            advantages=tf.gather(data["advantages"], sample),
            old_log_prob=tf.gather_nd(data["old_log_prob"], tf.stack([sample, step], -1)),
        )
        return a.minibatch_loss(batch, self.reward_horizon, draws)

    # ---------- between iterations ----------

    def end_iteration(self, train_actor: bool) -> None:
        """Advance the schedules and the annealing."""
        super().end_iteration(train_actor)
        if self.algorithm.step():
            self.compile()

    def watched(self) -> dict[str, float]:
        return {"min_sampling_std": self.algorithm.min_sampling_denoising_std}

    def state(self) -> dict[str, Any]:
        """Schedules and annealing as JSON values."""
        a = self.algorithm
        floor = a._min_sampling_denoising_std
        return super().state() | {
            "ft_denoising_steps": a.ft_denoising_steps,
            "ft_denoising_steps_cnt": a.ft_denoising_steps_cnt,
            "actor_is_network": a.actor is a.network,
            "sampling_floor": floor.state() if hasattr(floor, "state") else None,
        }

    def before_weights(self, state: Mapping[str, Any]) -> None:
        if not state["actor_is_network"]:
            self.algorithm.separate_actor()

    def restore(self, tensors: Mapping[str, np.ndarray], state: Mapping[str, Any]) -> None:
        a = self.algorithm
        a.ft_denoising_steps, a.ft_denoising_steps_cnt = state["ft_denoising_steps"], state["ft_denoising_steps_cnt"]
        if state["sampling_floor"] is not None:
            a._min_sampling_denoising_std.restore(state["sampling_floor"])
        super().restore(tensors, state)
