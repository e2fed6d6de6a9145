"""What the PPO algorithms do with a rollout: optimizers, compiled minibatch updates, learning-rate schedules.

`PPOTrainer` is the whole of it for policies whose action chunks are single decisions (`ppo.ChunkPPO`); the
trainers of diffusion policies differ in what a row of a minibatch is and in how its gradient is computed.

Where networks see, an observation is `state` and `rgb` [N,To,C,Hi,Wi], which stays in bytes until a network takes it.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import tensorflow as tf

from diffusion_rl.core.keras import floatx
from diffusion_rl.core.lr_schedules import CosineWarmupRestarts
from diffusion_rl.core.optimizers import AdamW, clip_by_global_norm
from diffusion_rl.networks.layers import Array, variables_of
from diffusion_rl.networks.vision import RandomShiftsAug
from diffusion_rl.policies.acting import Decision, actor_for

log = logging.getLogger(__name__)


class PPOTrainer:
    """Samples, values and updates of an algorithm for the on-policy loop.

    Args:
        algorithm: the policy with its loss; its weights are trained in place.
        train: the `train` node of the configuration.
        reward_horizon: actions of a chunk that count in the loss of denoising steps.
    """

    SAMPLES: ClassVar[str] = "actions"  # which part of a decision the update is about

    def __init__(self, algorithm: Any, train: Mapping[str, Any], reward_horizon: int):
        self.algorithm, self.train, self.reward_horizon = algorithm, train, reward_horizon
        if getattr(getattr(algorithm, "network", None), "dropout", 0):
            log.warning("the network's dropout acts in supervised training alone: fine-tuning drops nothing")
        self.trained = {name: variables_of(module) for name, module in self.modules().items()}
        self.schedules = {name: CosineWarmupRestarts.of(train, f"{name}_") for name in self.trained}
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
        self.max_grad_norm = train.get("max_grad_norm", None)
        self.augment = RandomShiftsAug(pad=4) if train.get("augment", False) else None
        self.batch_rows = int(train.get("logprob_batch_size", 1000))  # images looked at together between updates
        self.grad_accumulate = int(train.get("grad_accumulate", 1))
        self.pending = {
            name: [tf.Variable(tf.zeros_like(v), trainable=False) for v in variables]
            for name, variables in self.trained.items()
            if self.grad_accumulate > 1
        }
        self.data: dict[str, tf.Tensor] = {}
        self.compile()

    def modules(self) -> dict[str, Any]:
        """What is trained, each with an optimizer and a schedule of its own."""
        return {"actor": self.algorithm.actor_ft, "critic": self.algorithm.critic}

    def compile(self) -> None:
        """(Re)build the compiled functions."""
        a = self.algorithm
        self.actor = actor_for(a, bool(self.train.get("fast", True)))
        self._values = tf.function(lambda *obs: tf.reshape(a.critic(observation(*obs)), [-1]), reduce_retracing=True)
        self._seen_log_probs = tf.function(lambda actions, *obs: a.log_probs(observation(*obs), actions)[0])
        self._step = tf.function(self._minibatch_step)
        self.loss_names: tuple[str, ...] = ()  # known once `_step` has been traced

    # ---------- collecting ----------

    def act(self, state: np.ndarray, draws: Any, deterministic: bool, rgb: np.ndarray | None = None) -> Decision:
        """Decide for all environments; see the actor's `act`."""
        return self.actor.act(state, draws, deterministic, **({} if rgb is None else {"rgb": rgb}))

    def values(self, state: np.ndarray, rgb: np.ndarray | None = None) -> np.ndarray:
        """State values [N] of observations [N,To,O]."""
        state = tf.constant(state, self.algorithm.dtype)
        if rgb is None:
            return self._values(state).numpy()
        return np.concatenate([self._values(state[cut], tf.constant(rgb[cut])).numpy() for cut in self._cuts(rgb)])

    def shifted(self, rgb: np.ndarray, noise: Any) -> np.ndarray:
        """Images [N,To,C,Hi,Wi] shifted at random, each by its own number of pixels, if `train.augment` says so."""
        if self.augment is None:
            return rgb
        images = rgb.reshape(-1, *rgb.shape[2:])
        shifts = noise.integers(0, 2 * self.augment.pad + 1, (len(images), 1, 1, 2))
        parts = [self.augment(tf.constant(images[cut]), tf.constant(shifts[cut])) for cut in self._cuts(images)]
        return np.concatenate([part.numpy() for part in parts]).reshape(rgb.shape)

    def old_log_probs(
        self, state: np.ndarray, decisions: Mapping[str, np.ndarray], noise: Any, rgb: np.ndarray | None = None
    ) -> np.ndarray:
        """Log-probabilities [N,...] of a rollout under the policy that collected it: captured while sampling, or, with
        the images that were shifted since, computed now."""
        if rgb is None or self.augment is None:
            return decisions["log_probs"]
        state, samples = (tf.constant(x, self.algorithm.dtype) for x in (state, decisions[self.SAMPLES]))
        return np.concatenate([self.seen_log_probs(state[c], samples[c], tf.constant(rgb[c])) for c in self._cuts(rgb)])

    def seen_log_probs(self, state: Array, samples: Array, rgb: Array) -> np.ndarray:
        """Log-probabilities of samples, as those captured while sampling."""
        return self._seen_log_probs(samples, state, rgb).numpy()

    def _cuts(self, rows: np.ndarray) -> list[slice]:
        return [slice(i, i + self.batch_rows) for i in range(0, len(rows), self.batch_rows)]

    # ---------- updating ----------

    def load(
        self,
        state: np.ndarray,
        samples: np.ndarray,
        returns: np.ndarray,
        values: np.ndarray,
        advantages: np.ndarray,
        log_probs: np.ndarray,
        rgb: np.ndarray | None = None,
    ) -> int:
        """Take a rollout of N samples; returns the number of rows that minibatches index.

        Args:
            state, rgb: the observations;  samples: [N,H,A] chunks (of the decisions, the part named by `SAMPLES`);
            returns, values, advantages: [N];  log_probs: of `old_log_probs`.
        """
        arrays = {
            "state": state,
            self.SAMPLES: samples,
            "returns": returns,
            "values": values,
            "advantages": advantages,
            "old_log_prob": self.reduce(log_probs),
        }
        self.data = {name: tf.constant(array, self.algorithm.dtype) for name, array in arrays.items()}
        if rgb is not None:
            self.data["rgb"] = tf.constant(rgb)
        return len(state)

    def reduce(self, log_probs: np.ndarray) -> Any:
        """Old log-probabilities as the loss takes them."""
        return log_probs

    def draw(self, noise: Any, rows: int) -> Any:
        """What the update of a minibatch of that many rows needs of `noise`; None if nothing."""
        shape = self.algorithm.bc_noise_shape(rows) if self.use_bc_loss else None
        return None if shape is None else noise.normal(shape, floatx())

    def minibatch(self, rows: np.ndarray, train_actor: bool, number: int, draws: Any = None) -> dict[str, float]:
        """One update.

        Args:
            rows: [B] indices of rows.
            train_actor: False while only the critic warms up.
            number: of this minibatch within its epoch.
            draws: of `draw`.

        Returns:
            the parts of the loss by name, as floats.
        """
        self.actor.weights_changed()
        given = None if draws is None else tf.constant(draws, self.algorithm.dtype)
        stepped = tuple(name for name in self.trained if self.steps(name, train_actor, number))
        losses = self._step(tf.constant(rows, tf.int32), self.data, given, stepped, self.complete(number))
        return dict(zip(self.loss_names, losses.numpy().tolist(), strict=True))

    def steps(self, name: str, train_actor: bool, number: int) -> bool:
        """Whether that optimizer takes a step in this minibatch."""
        return self.complete(number) and (name == "critic" or train_actor)

    def complete(self, number: int) -> bool:
        """Whether `train.grad_accumulate` gradients have come together. What an epoch leaves over waits for the next
        one's, as in the reference; they are added, not averaged."""
        return (number + 1) % self.grad_accumulate == 0

    def _minibatch_step(
        self, rows: Array, data: dict[str, Array], draws: Any, stepped: tuple[str, ...], complete: bool
    ) -> Array:
        losses, grads = self.gradients(rows, data, draws)
        for name, totals in self.pending.items():
            grads[name] = [
                g if g is None else total.assign_add(g) for total, g in zip(totals, grads[name], strict=True)
            ]
        for name in stepped:
            if name == "actor" and self.max_grad_norm is not None:
                grads[name], _ = clip_by_global_norm(grads[name], self.max_grad_norm)
            self.optimizers[name].apply(grads[name])
        for total in sum(self.pending.values(), []) if complete else []:
            total.assign(tf.zeros_like(total))
        self.loss_names = losses._fields
        return tf.stack([tf.cast(value, tf.float64) for value in losses])

    def gradients(self, rows: Array, data: dict[str, Array], draws: Any) -> tuple[Any, dict[str, list[Array]]]:
        """The parts of the loss and the gradients by name; compiled as part of the step."""
        with tf.GradientTape() as tape:
            losses = self.losses(rows, data, draws)
            weighted = [c * getattr(losses, n) for n, c in self.coefficients.items() if n in losses._fields]
            total = losses.pg_loss + tf.add_n(weighted)
        names = list(self.trained)
        grads = tape.gradient(total, [self.trained[n] for n in names])
        return losses, dict(zip(names, grads, strict=True))

    def losses(self, rows: Array, data: dict[str, Array], draws: Any) -> Any:
        """The parts of the loss of these rows, straight from the algorithm's definition."""
        names = (self.SAMPLES, "returns", "values", "advantages", "old_log_prob")
        given = (tf.gather(data[name], rows) for name in names)
        return self.algorithm.loss(observations(data, rows), *given, use_bc_loss=draws is not None, bc_noise=draws)

    # ---------- between iterations ----------

    def end_iteration(self, train_actor: bool) -> None:
        """Advance the learning-rate schedules (the actor's only after the critic's warm-up)."""
        for name, schedule in self.schedules.items():
            if name == "critic" or train_actor:
                self.optimizers[name].learning_rate.assign(schedule.step())

    @property
    def learning_rates(self) -> dict[str, float]:
        """By name: actor, critic, and what else is trained."""
        return {name: float(o.learning_rate.numpy()) for name, o in self.optimizers.items()}

    def watched(self) -> dict[str, float]:
        """What else belongs into the metrics of an iteration."""
        return {}

    def tensors(self) -> dict[str, np.ndarray]:
        """Optimizer moments for a checkpoint, under the names of the variables they belong to."""
        out = {}
        for name, optimizer in self.optimizers.items():
            for key, value in optimizer.state().items():
                out[f"optimizer.{name}.{key}"] = value
        for name, totals in self.pending.items():
            out |= {f"pending.{name}.{i}": total.numpy() for i, total in enumerate(totals)}
        return out

    def state(self) -> dict[str, Any]:
        """What else a checkpoint needs, as JSON values."""
        return {"schedules": {n: s.state() for n, s in self.schedules.items()}}

    def before_weights(self, state: Mapping[str, Any]) -> None:
        """To be called with `state` before the weights of a checkpoint are loaded."""

    def restore(self, tensors: Mapping[str, np.ndarray], state: Mapping[str, Any]) -> None:
        """Inverse of `tensors` and `state` (weights are loaded apart)."""
        for name, optimizer in self.optimizers.items():
            prefix = f"optimizer.{name}."
            optimizer.restore({k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)})
            self.schedules[name].restore(state["schedules"][name])
            optimizer.learning_rate.assign(self.schedules[name].lr)
        for name, totals in self.pending.items():
            for i, total in enumerate(totals):
                total.assign(tensors[f"pending.{name}.{i}"])
        self.compile()


def observation(state: Array, rgb: Array | None = None) -> dict[str, Array]:
    """What networks take."""
    return {"state": state} if rgb is None else {"state": state, "rgb": rgb}


def observations(data: Mapping[str, Array], rows: Array) -> dict[str, Array]:
    """Those of `data` in these rows."""
    return {name: tf.gather(data[name], rows) for name in ("state", "rgb") if name in data}
