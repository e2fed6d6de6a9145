"""ReinFlow: PPO for flow policies whose steps get learned noise (Zhang et al. 2025, arXiv:2505.22094).

The steps of Euler's method become a Markov chain

    x_0 ~ N(0, I),    x_{i+1} ~ N(clip(x_i + v(x_i, t_i, o) / K), std_i(o, t_i)^2),    i = 0 .. K-1,

whose log-probability is a sum. It is divided by the number of its terms and of the chunk's elements, and the whole
chain is one decision.

Shapes: B rows, K steps; To, O, H, A as in `policies.diffusion`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import tensorflow as tf

from diffusion_rl.core.errors import UserError
from diffusion_rl.core.lr_schedules import held
from diffusion_rl.methods.on_policy.chunked import mean_gradients
from diffusion_rl.methods.on_policy.ppo import (
    ChunkPPO,
    Gradients,
    Losses,
    PerRow,
    PPOTrainer,
    clipped_policy_loss,
)
from diffusion_rl.networks.layers import Array
from diffusion_rl.policies.diffusion import Cond, encoded
from diffusion_rl.policies.flow import (
    FULL,
    Counting,
    FineTunedFlowPolicy,
    FineTunedShortcutPolicy,
    FlowPolicy,
    ShortcutFlowPolicy,
)

CHUNK = 1000  # rows
REPEATS = {False: 10, True: 5}  # of samples in an epoch: without images, with
RATES = {"actor": (1e-5, 5e-4), "critic": (1e-5, 1e-3)}  # within which adaptive learning rates stay
ROUNDED = 1e-12  # a KL divergence of equal policies in single precision is less
SCHEDULED_LEVELS = (0.016, 0.08)  # of the noise that follows the iterations
WATCHED = ("pg_loss", "ratio", "approx_kl", "clipfrac", "std", "entropy_loss", "bc_loss", "v_loss")


class ReinFlow(ChunkPPO, FineTunedFlowPolicy):
    """A flow policy with PPO's loss over its chains.

    Args:
        logprob_min, logprob_max: log-probabilities beyond them get no gradient.
        bc_loss_type: the distance of `bc_loss`; "W2" alone.
        kwargs: of `ClippedPPO` and the policy.
    """

    KIND = "reinflow"
    LABEL = "ReinFlow"
    ACTS_AS: ClassVar[type[FlowPolicy]] = FlowPolicy  # without noise
    TRAIN_KEYS = (
        "repeat_samples max_noise_hold_ratio max_noise_decay_ratio lr_schedule actor_update_freq actor_update_epoch "
        "clip_intermediate_actions account_for_initial_stochasticity"
    )

    def __init__(
        self,
        clip_ploss_coef: float = 0.01,
        logprob_min: float = -1.0,
        logprob_max: float = 1.0,
        bc_loss_type: str = "W2",
        **kwargs: Any,
    ):
        super().__init__(clip_ploss_coef, **kwargs)
        if bc_loss_type != "W2":
            raise UserError(f"model.bc_loss_type={bc_loss_type}: W2 is the only one there is")
        self.log_prob_range = (float(logprob_min), float(logprob_max))

    def make_trainer(self, settings: Mapping[str, Any], reward_horizon: int) -> ReinFlowTrainer:
        """Builds what updates this policy; arguments of `PPOTrainer`."""
        return ReinFlowTrainer(self, settings, reward_horizon)

    # ---------- the loss ----------

    def policy_loss(self, log_prob: Array, old_log_prob: Array, advantages: Array) -> PerRow:
        """Returns `clipped_policy_loss` of log-probabilities [B], clamped to their range."""
        new, old = (tf.clip_by_value(x, *self.log_prob_range) for x in (log_prob, old_log_prob))
        return clipped_policy_loss(new, old, advantages, tf.constant(self.clip_ploss_coef, log_prob.dtype))

    def loss(
        self,
        obs: Cond,
        chains: Array,
        returns: Array,
        oldvalues: Array,
        advantages: Array,
        oldlogprobs: Array,
        use_bc_loss: bool = False,
        bc_noise: Array | None = None,
        counting: Counting | None = None,
    ) -> Losses:
        """Returns the loss of one minibatch.

        Args:
            obs: {"state": [B,To,O]};  chains: [B,K+1,H,A];  returns, oldvalues, advantages, oldlogprobs: [B]
            use_bc_loss: add `bc_loss`, from bc_noise [B,H,A].
            counting: of the log-probabilities, see `FineTunedFlowPolicy.sample`.
        """
        log_prob, entropy, std = self.log_probs(obs, chains, counting)
        per_row = self.policy_loss(log_prob, oldlogprobs, self.normalised(advantages))
        return {
            **self.mean_losses(per_row, obs, returns, oldvalues),
            "entropy_loss": -tf.reduce_mean(entropy),
            "bc_loss": self.bc_loss(obs, bc_noise) if use_bc_loss else tf.zeros([], log_prob.dtype),
            "std": tf.stop_gradient(tf.reduce_mean(std)),
        }

    def bc_noise_shape(self, rows: int) -> tuple[int, ...]:
        return rows, self.horizon_steps, self.action_dim

    def bc_loss(self, obs: Cond, noise: Array | None) -> Array:
        """Returns the mean of `bc_distance`."""
        return tf.reduce_mean(self.bc_distance(obs, noise))

    def bc_distance(self, obs: Cond, noise: Array | None) -> Array:
        """Returns the mean squared distance [B] of what both policies make of the same noise [B,H,A] without
        adding any: an upper bound of their squared Wasserstein distance (W2).

        The reference begins with zeros, and its second policy where the first one's first step ends.
        """
        batch = tf.shape(obs["state"])[0]
        start = noise
        if start is None or self.time_grid == "upstream":
            start = tf.zeros([batch, self.horizon_steps, self.action_dim], self.dtype)
        before = tf.stop_gradient(self._carried(self.actor_old, start, obs))
        if self.time_grid == "upstream":
            start = tf.stop_gradient(start + self._velocity(self.actor_old, start, 0.0, obs) / self.inference_steps)
        return tf.reduce_mean(tf.square(before - self._carried(self.actor_ft.policy, start, obs)), axis=[1, 2])

    def _velocity(self, network: Any, x: Array, time: float, obs: Cond) -> Array:
        now = tf.fill([tf.shape(x)[0]], tf.constant(time, x.dtype))
        return network(x, now, obs, *self.size(tf.shape(x)[0], x.dtype))

    def _carried(self, network: Any, x: Array, obs: Cond) -> Array:
        """Returns the action chunks [B,H,A] to which a velocity carries noise [B,H,A]."""
        obs = encoded(network, obs)
        for time in self._grid(sampling=True):
            x = x + self._velocity(network, x, time, obs) / self.inference_steps
            x = tf.clip_by_value(x, self.act_min, self.act_max)
        return x


class ShortcutReinFlow(ReinFlow, FineTunedShortcutPolicy):
    """ReinFlow for shortcut models, whose velocity knows the size of the step; arguments of `ReinFlow`."""

    KIND = "shortcut_reinflow"
    LABEL = "ReinFlow (shortcut)"
    ACTS_AS = ShortcutFlowPolicy


# ---------- the update ----------


class ReinFlowTrainer(PPOTrainer):
    """Updates a `ReinFlow` policy, and narrows its noise; arguments as of `PPOTrainer`.

    `train.repeat_samples`: every sample comes ten times in an epoch, five times with images, in minibatches of their
    own draw.
    `train.max_noise_hold_ratio`, `train.max_noise_decay_ratio`: with learn_decay, the share of the iterations in which
    the noise's upper bound stays, and how far it then goes towards the lower one.
    `train.lr_schedule`: fixed, or adaptive_kl, which shrinks the learning rates where the KL divergence is far above
    `train.target_kl`, lets them grow where it is far below, and does not stop at it.
    `train.actor_update_freq`, `train.actor_update_epoch`: iterations from one training of the actor to the next, and
    its steps along each gradient.
    `train.clip_intermediate_actions`, `train.account_for_initial_stochasticity`: whether means of steps are clipped,
    and whether the noise that a chain begins with counts in its log-probability.
    """

    SAMPLES = "chains"
    CLIPPED = ("actor", "critic")
    SHIFTS_LAST = True

    def __init__(self, policy: Any, settings: Mapping[str, Any], reward_horizon: int):
        kind = settings.get("lr_schedule") or "fixed"
        if kind not in ("fixed", "adaptive_kl"):
            raise UserError(f"train.lr_schedule={kind}: take fixed or adaptive_kl")
        if settings.get("clip_intermediate_actions") is False:
            policy.denoised_clip_value = math.inf
        policy.counting = FULL._replace(initial=settings.get("account_for_initial_stochasticity") is not False)
        self.iteration = 0
        self.target_kl = settings.get("target_kl") if kind == "adaptive_kl" else None
        self.rates = {name: tf.Variable(settings[f"{name}_lr"], dtype=tf.float64) for name in RATES}
        super().__init__(policy, settings, reward_horizon)

    def may_stop(self, train_actor: bool, number: int) -> bool:
        return self.target_kl is None and (train_actor or "rgb" not in self.data)

    def steps(self, name: str, train_actor: bool, number: int) -> bool:
        every = int(self.settings.get("actor_update_freq") or 1)
        if name == "actor" and every > 1 and (self.iteration - int(self.settings["n_critic_warmup_itr"])) % every:
            return False
        return super().steps(name, train_actor, number)

    def take_steps(self, names: tuple[str, ...], losses: Losses, grads: Gradients) -> None:
        """Steps as `PPOTrainer` does, the actor as often as `train.actor_update_epoch` says."""
        if self.target_kl is not None:
            self.adapt_rates(losses["approx_kl"], float(self.target_kl))
        super().take_steps(names, losses, grads)
        for _ in range(int(self.settings.get("actor_update_epoch") or 1) - 1 if "actor" in names else 0):
            super().take_steps(("actor",), losses, grads)

    def adapt_rates(self, approx_kl: Array, aim: float) -> None:
        """Lowers the learning rates where the KL divergence, a scalar, is far above `aim`, raises them far below."""
        kl, least = tf.cast(approx_kl, tf.float64), ROUNDED if approx_kl.dtype == tf.float32 else 0.0
        for name, (low, high) in RATES.items():
            rate = self.rates[name].read_value()
            grown = tf.where((kl > least) & (kl < aim / 2), tf.minimum(rate * 1.5, high), rate)
            rate = self.rates[name].assign(tf.where(kl > aim * 2, tf.maximum(rate / 1.5, low), grown))
            self.optimizers.optimizers[name].learning_rate.assign(rate)

    @property
    def rows_per_sample(self) -> int:
        return REPEATS["rgb" in self.data] if self.settings.get("repeat_samples") else 1

    def batches(self, rows: np.ndarray, size: int) -> list[np.ndarray]:
        """Deals rows [N] to minibatches [B], the last of which may be short."""
        return [rows[i : i + size] for i in range(0, len(rows), size)]

    def losses(self, rows: Array, data: dict[str, Array], draws: Any) -> Losses:
        return super().losses(rows // self.rows_per_sample, data, draws)

    def gradients(self, rows: Array, data: dict[str, Array], draws: Any) -> tuple[Losses, Gradients]:
        """Returns the parts of the loss of rows [B] and the gradients by name; the fast path, of observations without
        images, goes chunk by chunk, and looks once at samples that come several times."""
        if not self.fast or "rgb" in data:
            return super().gradients(rows, data, draws)
        p, b, n, samples = self.policy, rows.shape[0], data["state"].shape[0], rows // self.rows_per_sample
        advantages = p.normalised(tf.gather(data["advantages"], samples))
        if draws is None and n < b:  # each sample once, counted as often as it comes
            weight = tf.math.bincount(samples, minlength=n, maxlength=n, dtype=p.dtype)
            advantages = tf.tensor_scatter_nd_update(tf.zeros([n], p.dtype), samples[:, None], advantages)
            samples = tf.range(n)
        else:
            n, weight = b, tf.ones([b], p.dtype)
        columns = [tf.gather(data[k], samples) for k in ("state", "chains", "old_log_prob", "returns", "values")]
        columns += [advantages, weight, *([] if draws is None else [draws])]
        coefficients = [self.coefficients[name] for name in ("entropy_loss", "bc_loss", "v_loss")]

        def sums(
            state: Array,
            chains: Array,
            old: Array,
            returns: Array,
            before: Array,
            advantages: Array,
            weight: Array,
            *noise: Array,
        ) -> tuple[Array, list[Array]]:
            obs = {"state": state}
            log_prob, entropy, std = p.log_probs(obs, chains)
            loss, *watched = p.policy_loss(log_prob, old, advantages)
            distance = p.bc_distance(obs, noise[0]) if noise else tf.zeros_like(weight)
            v_loss = p.value_loss(tf.reshape(p.critic(obs), [-1]), returns, before)
            parts = [tf.reduce_sum(weight * x) for x in (loss, *watched, std, -entropy, distance, v_loss)]
            return parts[0] + sum(c * part for c, part in zip(coefficients, parts[-3:], strict=True)), parts

        means, grads = mean_gradients(sums, columns, b, CHUNK, self.trained, len(WATCHED))
        return dict(zip(WATCHED, means, strict=True)), grads

    def end_iteration(self, train_actor: bool) -> None:
        if self.target_kl is None:
            super().end_iteration(train_actor)
        self._set_noise(self.iteration)
        self.iteration += 1

    def _set_noise(self, iteration: int) -> None:
        """Sets the noise as it is after an iteration."""
        noisy = self.policy.actor_ft
        if noisy.kind == "learn_decay":
            noisy.explore_noise_net.set_range(noisy.bounds[0], self.upper_bound(iteration))
        elif noisy.kind == "const_schedule_itr":
            n = int(self.settings["n_train_itr"])
            hold, fall, warmup = (int(n * part) for part in (0.29, 0.7, 0.01))
            noisy.set_level(held(iteration, *SCHEDULED_LEVELS, hold, fall, warmup))

    def upper_bound(self, iteration: int) -> float:
        """Returns the noise's upper bound after an iteration: it stays, then falls as a cosine does."""
        low, high = self.policy.actor_ft.bounds
        n, hold = int(self.settings["n_train_itr"]), float(self.settings["max_noise_hold_ratio"])
        rest = float(self.settings["max_noise_decay_ratio"])
        return held(iteration, low * (1 - rest) + high * rest, high, int(n * hold), int(n * (1 - hold)))

    def watched(self) -> dict[str, float]:
        return {"max_noise_std": math.exp(0.5 * float(self.policy.actor_ft.explore_noise_net.logvar_max.numpy()))}

    def state(self) -> dict[str, Any]:
        rates = {name: float(rate.numpy()) for name, rate in self.rates.items()}
        return super().state() | {"iteration": self.iteration, "rates": rates}

    def restore(self, tensors: Mapping[str, np.ndarray], state: Mapping[str, Any]) -> None:
        self.iteration = int(state["iteration"])
        for name, rate in (state.get("rates") or {}).items():
            self.rates[name].assign(rate)
        super().restore(tensors, state)
        if self.target_kl is not None:
            for name, optimizer in self.optimizers.optimizers.items():
                optimizer.learning_rate.assign(float(tensors[f"optimizer.{name}.learning_rate"]))
        if self.iteration and self.policy.actor_ft.kind == "const_schedule_itr":
            self._set_noise(self.iteration - 1)
