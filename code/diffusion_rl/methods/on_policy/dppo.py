"""DPPO: Diffusion Policy Policy Optimization (Ren et al. 2024), its loss and its update.

PPO on the two-layer decision process in which every denoising step of an action chunk is an action of its own:

    state    (o, x_t)           action   x_{t-1}           policy   N(x_{t-1}; mu(x_t, t, o), sigma_t^2)

    eq. 4.2   advantage of a denoising step = gamma_denoising^(steps still to come) * A(o, a)
    eq. 4.3   PPO's clipped ratio, with a clip range that grows from the noisy steps to the clean ones

    collecting   policies.acting    every step of the chain is kept, with its log-probability
    update       ppo.PPOTrainer     values, advantages, minibatches, gradient steps
    here         a row of a minibatch is one denoising step of one chunk; `DPPO.minibatch_loss` is the loss of B rows
    dppo_fast    the same gradients in a restructured form, where the networks allow it; a test holds the two together

Shapes: N samples of a rollout, B rows of a minibatch, F fine-tuned denoising steps, To, H, O, A as in
`policies.diffusion`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from diffusion_rl.core.keras import floatx
from diffusion_rl.core.typing import Rng
from diffusion_rl.methods.on_policy import dppo_fast
from diffusion_rl.methods.on_policy.ppo import (
    ClippedPPO,
    Gradients,
    Losses,
    PerRow,
    PPOTrainer,
    chunk_log_prob,
    clipped_policy_loss,
    observations,
)
from diffusion_rl.networks.layers import Array
from diffusion_rl.policies.diffusion import Cond, FineTunedDiffusionPolicy


class Minibatch(NamedTuple):
    """B rows (sample, denoising step) of a rollout."""

    obs: Cond
    chains_prev: Array  # [B,H,A]
    chains_next: Array  # [B,H,A]
    denoising_inds: Array  # [B]
    returns: Array  # [B]
    oldvalues: Array  # [B]
    advantages: Array  # [B]
    old_log_prob: Array  # [B], averaged over the chunk


class DPPO(ClippedPPO, FineTunedDiffusionPolicy):
    """The policy with DPPO's loss.

    Args:
        gamma_denoising: discount over denoising steps.
        clip_ploss_coef_base: clip range of the ratio at the first (noisiest) fine-tuned step; `clip_ploss_coef` is
            that at the last.
        clip_ploss_coef_rate: exponential rate of the interpolation between them.
        clip_advantage_lower_quantile, clip_advantage_upper_quantile: advantages are clamped to these quantiles.
        kwargs: of `ClippedPPO` and the policy.
    """

    KIND = "dppo"
    LABEL = "DPPO"

    def __init__(
        self,
        gamma_denoising: float,
        clip_ploss_coef_base: float = 1e-3,
        clip_ploss_coef_rate: float = 3,
        clip_advantage_lower_quantile: float = 0,
        clip_advantage_upper_quantile: float = 1,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        self.gamma_denoising = gamma_denoising
        self.clip_ploss_coef_base, self.clip_ploss_coef_rate = clip_ploss_coef_base, clip_ploss_coef_rate
        self.advantage_quantiles = (clip_advantage_lower_quantile, clip_advantage_upper_quantile)

    def loss(  # type: ignore[override]  # supervised in the policy, PPO's here, under the reference's name
        self,
        obs: Cond,
        chains_prev: Array,
        chains_next: Array,
        denoising_inds: Array,
        returns: Array,
        oldvalues: Array,
        advantages: Array,
        oldlogprobs: Array,
        use_bc_loss: bool = False,
        reward_horizon: int = 4,
        bc_noise: Array | None = None,
    ) -> Losses:
        """Returns the loss of one minibatch, straight from the definition.

        Args:
            obs: {"state": [B,To,O]}
            chains_prev, chains_next: [B,H,A] before and after the denoising step.
            denoising_inds: [B] in [0, F), 0 = noisiest fine-tuned step.
            returns, oldvalues, advantages: [B]
            oldlogprobs: [B,H,A] per element, of the policy that collected the data.
            use_bc_loss, bc_noise: add the log-probability of the pre-trained policy's own chains; bc_noise
                [sampling_steps + 1, B, H, A] is what they are drawn with.
            reward_horizon: only the first so many actions of a chunk count.
        """
        old_log_prob = chunk_log_prob(oldlogprobs, reward_horizon)
        batch = Minibatch(obs, chains_prev, chains_next, denoising_inds, returns, oldvalues, advantages, old_log_prob)
        return self.minibatch_loss(batch, reward_horizon, bc_noise if use_bc_loss else None)

    def minibatch_loss(self, batch: Minibatch, reward_horizon: int, bc_noise: Array | None = None) -> Losses:
        """Returns the loss from old log-probabilities already averaged over the chunk."""
        new, eta = self.log_probs_subsample(batch.obs, batch.chains_prev, batch.chains_next, batch.denoising_inds)
        per_row = self.step_policy_loss(
            chunk_log_prob(new, reward_horizon),
            batch.old_log_prob,
            self.step_advantages(batch.advantages, batch.denoising_inds),
            batch.denoising_inds,
        )
        return {
            **self.mean_losses(per_row, batch.obs, batch.returns, batch.oldvalues),
            "entropy_loss": -tf.reduce_mean(eta),
            "bc_loss": tf.zeros([], self.dtype) if bc_noise is None else self.bc_loss(batch.obs, bc_noise),
            "eta": tf.reduce_mean(tf.stop_gradient(eta)),
        }

    # ---------- the pieces ----------

    def step_policy_loss(
        self, log_prob: Array, old_log_prob: Array, advantages: Array, denoising_inds: Array
    ) -> PerRow:
        """Returns `clipped_policy_loss` of denoising steps, all arguments [B]; advantages: of `step_advantages`."""
        return clipped_policy_loss(log_prob, old_log_prob, advantages, self.clip_range(denoising_inds))

    def normalised(self, advantages: Array, among: Array | None = None) -> Array:
        """Normalises advantages [...], and clamps them to the quantiles of the minibatch's."""
        normal = super().normalised(advantages, among)
        if self.advantage_quantiles == (0, 1) or self._normalised_before:
            return normal
        ordered = tf.sort(normal if among is None else super().normalised(among))
        low, high = (quantile(ordered, share) for share in self.advantage_quantiles)
        return tf.clip_by_value(normal, low, high)

    def step_advantages(self, advantages: Array, denoising_inds: Array) -> Array:
        """Normalises [B], then discounts by the denoising steps still to come."""
        advantages = self.normalised(advantages)
        f = self.ft_denoising_steps
        discounts = tf.constant([self.gamma_denoising ** (f - i - 1) for i in range(f)], advantages.dtype)
        return advantages * tf.gather(discounts, denoising_inds)

    def clip_range(self, denoising_inds: Array) -> Array:
        """Returns PPO's clip range [B]: base + (coef - base) (e^(rate i/(F-1)) - 1) / (e^rate - 1).

        With a single fine-tuned step the range is `clip_ploss_coef` (the reference divides zero by zero there).
        """
        f, rate = self.ft_denoising_steps, self.clip_ploss_coef_rate
        if f == 1:
            return tf.fill(tf.shape(denoising_inds), tf.constant(self.clip_ploss_coef, self.dtype))
        t = tf.cast(denoising_inds, self.dtype) / (f - 1)
        growth = (tf.exp(rate * t) - 1) / (math.exp(rate) - 1)
        return self.clip_ploss_coef_base + (self.clip_ploss_coef - self.clip_ploss_coef_base) * growth

    def bc_loss(self, obs: Cond, noise: Array) -> Array:
        """Returns minus the mean log-probability, under the fine-tuned policy, of chains that the pre-trained one
        draws.

        (Torne et al. 2024, eq. 2.) Not restricted to the reward horizon.
        """
        chains = tf.stop_gradient(self.sample(obs, noise, deterministic=False, use_base_policy=True).chains)
        log_prob, _ = self.log_probs(obs, chains)
        return -tf.reduce_mean(chunk_log_prob(log_prob, self.horizon_steps))

    def make_trainer(self, settings: Mapping[str, Any], reward_horizon: int) -> DPPOTrainer:
        """Builds what updates this policy; arguments of `PPOTrainer`."""
        return DPPOTrainer(self, settings, reward_horizon)


def quantile(ordered: Array, q: float) -> Array:
    """Returns the quantile of sorted values [N] with linear interpolation, as torch.quantile."""
    position = tf.constant(q, ordered.dtype) * tf.cast(tf.size(ordered) - 1, ordered.dtype)
    below = tf.cast(tf.floor(position), tf.int32)
    above = tf.minimum(below + 1, tf.size(ordered) - 1)
    low, high = tf.gather(ordered, below), tf.gather(ordered, above)
    return low + (high - low) * (position - tf.cast(below, ordered.dtype))


# ---------- the update ----------


class DPPOTrainer(PPOTrainer):
    """Updates a `DPPO` policy; arguments as of `PPOTrainer`."""

    SAMPLES = "chains"
    DRAWS_AXIS = 1

    def modules(self) -> dict[str, Any]:
        return super().modules() | ({"eta": self.policy.eta} if self.policy.learn_eta else {})

    def compile(self) -> None:
        """(Re)builds the compiled functions; needed again when annealing changed the number of fine-tuned steps."""
        super().compile()
        p = self.policy
        self.restructured = self.fast and not self.use_bc_loss and dppo_fast.applicable(p)
        if self.restructured:
            self._fast_gradients = dppo_fast.FastGradients(p, self.reward_horizon, self.coefficients["v_loss"])
        self._chunk_log_prob = tf.function(lambda log_probs: chunk_log_prob(log_probs, self.reward_horizon))

    # ---------- of a whole rollout ----------

    def seen_log_probs(self, state: Array, samples: Array, rgb: Array) -> np.ndarray:
        """Returns log-probabilities [N,F,H,A] of chains [N,F+1,H,A]."""
        return self.actor.log_probs(state, samples, rgb)

    @property
    def rows_per_sample(self) -> int:
        """Returns F: a row is one step of a chain, the step running fastest."""
        return self.policy.ft_denoising_steps

    def reduce(self, log_probs: np.ndarray) -> Any:
        """Averages over the chunk, [N,F,H,A] -> [N,F]."""
        return self._chunk_log_prob(tf.constant(log_probs, self.policy.dtype))

    # ---------- minibatches ----------

    def draw(self, rng: Rng, rows: int) -> Any:
        """Draws the noise of the pre-trained policy's chains [steps + 1, B, H, A], where behaviour cloning is added."""
        return rng.normal(self.actor.noise_shape(rows), floatx()) if self.use_bc_loss else None

    def steps(self, name: str, train_actor: bool, number: int) -> bool:
        """Steps eta every `eta_update_interval`-th minibatch, and the actor unless annealing has frozen it."""
        if name == "eta" and number % int(self.settings.get("eta_update_interval", 1)):
            return False
        return super().steps(name, train_actor, number) and not (name == "actor" and self.policy.actor_is_frozen)

    def gradients(self, rows: Array, data: dict[str, Array], draws: Any) -> tuple[Losses, Gradients]:
        """Returns the parts of the loss of rows [B] and the gradients by name."""
        return self._fast_gradients(rows, data) if self.restructured else super().gradients(rows, data, draws)

    def losses(self, rows: Array, data: dict[str, Array], draws: Any) -> Losses:
        """Returns the parts of the loss of rows [B], each a denoising step of a sample."""
        p, f = self.policy, self.policy.ft_denoising_steps
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
        return p.minibatch_loss(batch, self.reward_horizon, draws)

    # ---------- between iterations ----------

    def end_iteration(self, train_actor: bool) -> None:
        """Advances the schedules and the annealing."""
        super().end_iteration(train_actor)
        if self.policy.step():
            self.compile()

    def watched(self) -> dict[str, float]:
        return {"min_sampling_std": self.policy.min_sampling_denoising_std}

    def state(self) -> dict[str, Any]:
        """Returns schedules and annealing as JSON values."""
        p = self.policy
        floor = p._min_sampling_denoising_std
        return super().state() | {
            "ft_denoising_steps": p.ft_denoising_steps,
            "ft_denoising_steps_cnt": p.ft_denoising_steps_cnt,
            "actor_is_network": p.actor is p.network,
            "sampling_floor": floor.state() if hasattr(floor, "state") else None,
        }

    def before_weights(self, state: Mapping[str, Any]) -> None:
        if not state["actor_is_network"]:
            self.policy.separate_actor()

    def restore(self, tensors: Mapping[str, np.ndarray], state: Mapping[str, Any]) -> None:
        p = self.policy
        p.ft_denoising_steps, p.ft_denoising_steps_cnt = state["ft_denoising_steps"], state["ft_denoising_steps_cnt"]
        if state["sampling_floor"] is not None:
            p._min_sampling_denoising_std.restore(state["sampling_floor"])
        super().restore(tensors, state)
