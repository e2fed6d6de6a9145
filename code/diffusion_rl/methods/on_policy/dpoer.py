"""DPOER: DPPO with an entropy term weighted by a tuned temperature alpha, in two forms.

Names as in `dppo`: r ratio, A advantage of a denoising step, lp the mean log-probability of its chunk;
C = `lambda_alpha_entropy`, Hbar = `target_entropy`.

`mode="published"` is the form of the earlier TensorFlow port of DPPO (its class SAC_PPODiffusion):

    L_policy = mean max( -A r + (alpha / C) lp,  -A clip(r) )
    d alpha  = Adam on (H - Hbar) / alpha, once a minibatch, also while the critic warms up
    H        = entropy of a mixture of three Gaussians fitted to the Ta time steps of one denoised chunk, averaged
               over the minibatch; estimated anew every 50 minibatches

What is known of it:

* On-policy the expected gradient of lp is zero (score-function identity), so the added term has no expected effect
  where r = 1; away from there it drives the new policy from the old one. The deviation of a denoising step is given
  by the schedule, so its entropy does not depend on the weights at all.
* Three full covariances on four points of 3 to 7 dimensions collapse to their floor: H hardly depends on the policy,
  and H - Hbar has one sign. Alpha rises steadily (chunks of 4), or falls to zero and then jitters around it, negative
  values included (chunks of 8 with 14 dimensions). H is of A dimensions, Hbar counts Ta * A.
* alpha / C begins at 2.7e-5 (C = 10000) against advantages of order one; the term acts on those rows only where the
  unclipped branch is the larger.
* The mixture sees noise of mixed denoising levels, not the executed action.

`mode="corrected"` means what the name promises, the entropy of the actions that are executed:

    L_policy   = L_DPPO - (alpha / C) mean_o H( pi(. | o) ),     alpha = exp(log alpha) > 0
    d log alpha = Adam on H - Hbar

H is the nearest-neighbour estimate (`policies.entropy`) from N = 32 actions of each of some states of the minibatch,
drawn through the whole denoising chain; its gradient flows through the fine-tuned steps (reparametrisation).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import tensorflow as tf

from diffusion_rl.core.errors import UserError
from diffusion_rl.core.keras import floatx
from diffusion_rl.core.optimizers import AdamW
from diffusion_rl.core.typing import Rng
from diffusion_rl.diffusion.gaussian import clip
from diffusion_rl.methods.on_policy.dppo import DPPO, DPPOTrainer
from diffusion_rl.methods.on_policy.ppo import Gradients, Losses, PerRow
from diffusion_rl.networks.layers import Array
from diffusion_rl.policies.diffusion import Cond
from diffusion_rl.policies.entropy import mixture_entropy, nearest_neighbour_entropy

SMALLEST_SAMPLE = 32  # actions of a state that its entropy is estimated from


class DPOER(DPPO):
    """The policy with DPOER's loss.

    Args:
        mode: "published" or "corrected".
        lambda_alpha_entropy: C; default 10000 (published), 100 (corrected).
        target_entropy: Hbar; default -(H * A).
        init_temperature, temperature_lr: alpha at the start, and the learning rate of alpha or log alpha.
        entropy_refresh_interval: published: minibatches between two estimates of H (10000 in its first versions).
        entropy_bounds: published: H is clipped between these multiples of Hbar; its early versions used [2, 0.5].
        entropy_rows: published: rows of a minibatch whose chunks are fitted (None: all, which takes long).
        entropy_states, entropy_samples: corrected: states of a minibatch, and N.
        clip_entropy: accepted for the published configurations; it does nothing in the published code either.
        kwargs: of `DPPO`.
    """

    KIND = "dpoer"
    LABEL = "DPOER"

    def __init__(
        self,
        mode: str = "published",
        lambda_alpha_entropy: float | None = None,
        target_entropy: float | None = None,
        init_temperature: float = 0.272,
        temperature_lr: float = 3e-4,
        entropy_refresh_interval: int = 50,
        entropy_bounds: tuple[float, float] | None = None,
        entropy_rows: int | None = 256,
        entropy_states: int = 32,
        entropy_samples: int = SMALLEST_SAMPLE,
        clip_entropy: bool = False,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        if mode not in ("published", "corrected"):
            raise UserError(f"model.mode={mode}: take published or corrected")
        if mode == "published" and self.min_sampling_denoising_std != self.min_logprob_denoising_std:
            raise UserError(
                "model.min_sampling_denoising_std and model.min_logprob_denoising_std must be equal with "
                "model.mode=published, as in all its configurations: its loss takes one where DPPO takes the other"
            )
        if entropy_samples < SMALLEST_SAMPLE:
            raise UserError(f"model.entropy_samples={entropy_samples}: give at least {SMALLEST_SAMPLE}")
        self.mode = mode
        self.entropy_scale = float(lambda_alpha_entropy or (10000 if mode == "published" else 100))
        self.target_entropy = -float(self.horizon_steps * self.action_dim)
        if target_entropy is not None:
            self.target_entropy = float(target_entropy)
        self.temperature_lr, self.entropy_refresh_interval = temperature_lr, int(entropy_refresh_interval)
        self.entropy_bounds, self.entropy_rows = entropy_bounds, entropy_rows
        self.entropy_states, self.entropy_samples = int(entropy_states), int(entropy_samples)
        start = tf.constant(init_temperature, self.dtype)
        # alpha, or its logarithm; no weight of the policy, hence the underscore
        self._temperature = tf.Variable(start if mode == "published" else tf.math.log(start))

    @property
    def temperature(self) -> Array:
        """Returns alpha, a scalar."""
        return self._temperature if self.mode == "published" else tf.exp(self._temperature)

    def temperature_gradient(self, entropy: Array) -> Array:
        """Returns the gradient, a scalar, of the temperature's loss by the variable that is trained."""
        excess = entropy - self.target_entropy
        return excess / self._temperature if self.mode == "published" else excess

    # ---------- published ----------

    def step_policy_loss(
        self, log_prob: Array, old_log_prob: Array, advantages: Array, denoising_inds: Array
    ) -> PerRow:
        """Returns the clipped loss of denoising steps, all arguments [B]; as published with the entropy's bonus."""
        loss, ratio, approx_kl, outside = super().step_policy_loss(log_prob, old_log_prob, advantages, denoising_inds)
        if self.mode == "published":
            bound = self.clip_range(denoising_inds)
            bonus = self.temperature / self.entropy_scale * log_prob
            clipped = tf.clip_by_value(ratio, 1 - bound, 1 + bound)
            loss = tf.maximum(-advantages * ratio + bonus, -advantages * clipped)
        return loss, ratio, approx_kl, outside

    def published_entropy(self, obs: Cond, chains_prev: Array, denoising_inds: Array, noise: Array) -> Array:
        """Estimates H, a scalar, from chunks drawn by one denoising step each.

        Args:
            obs: {"state": [B,To,O]};  chains_prev, noise: [B,H,A];  denoising_inds: [B].
        """
        t_table, index_table = self.fine_tuned_timesteps()
        t, index = tf.gather(t_table, denoising_inds), tf.gather(index_table, denoising_inds)
        output = self.actor_ft(chains_prev, t, obs)
        mean, logvar, _ = self.mean_var_eta(chains_prev, t, obs, index, output, deterministic=False)
        chunks = mean + self.log_prob_std(logvar) * clip(noise, self.randn_clip_value)
        entropy = tf.cast(tf.reduce_mean(mixture_entropy(chunks)), self.dtype)
        if self.entropy_bounds is not None:
            low, high = sorted(bound * self.target_entropy for bound in self.entropy_bounds)
            entropy = tf.clip_by_value(entropy, low, high)
        return entropy

    # ---------- corrected ----------

    def action_entropy(self, obs: Cond, noise: Array, std_floor: Array) -> Array:
        """Estimates H, a scalar, the mean over states of the entropy of their executed actions; differentiable.

        Args:
            obs: {"state": [B,To,O]};  noise: [sampling_steps + 1, B*N, H, A];
            std_floor: of the exploration noise.
        """
        repeated = {name: tf.repeat(value, self.entropy_samples, axis=0) for name, value in obs.items()}
        actions = self.sample(repeated, noise, std_floor=std_floor).trajectories
        by_state = tf.reshape(actions, [-1, self.entropy_samples, self.horizon_steps * self.action_dim])
        return tf.reduce_mean(nearest_neighbour_entropy(by_state))

    def make_trainer(self, settings: Mapping[str, Any], reward_horizon: int) -> DPOERTrainer:
        """Builds what updates this policy; arguments of `PPOTrainer`."""
        return DPOERTrainer(self, settings, reward_horizon)


# ---------- the update ----------


class DPOERTrainer(DPPOTrainer):
    """Updates a `DPOER` policy and its temperature; arguments as of `PPOTrainer`."""

    def __init__(self, policy: Any, settings: Mapping[str, Any], reward_horizon: int):
        if settings.get("use_bc_loss", False):
            raise UserError("train.use_bc_loss=true: DPOER has no behaviour-cloning loss")
        self.published, self.n_minibatches = policy.mode == "published", 0
        self.entropy = tf.Variable(tf.zeros([], policy.dtype))
        self.std_floor = tf.Variable(tf.zeros([], policy.dtype))
        self.temperature_optimizer = AdamW([policy._temperature], policy.temperature_lr)
        super().__init__(policy, settings, reward_horizon)

    def compile(self) -> None:
        super().compile()
        self._refresh = tf.function(self._published_entropy, autograph=False)
        self._tune = tf.function(self._temperature_step, autograph=False)

    def draw(self, rng: Rng, rows: int) -> Any:
        """Draws noise for an estimate that is due: published, of chunks [B',H,A]; corrected, of whole chains."""
        p = self.policy
        if not self.published:
            return rng.normal(self.actor.noise_shape(min(rows, p.entropy_states) * p.entropy_samples), floatx())
        if self.n_minibatches % p.entropy_refresh_interval:
            return None
        return rng.normal((min(rows, p.entropy_rows or rows), p.horizon_steps, p.action_dim), floatx())

    def minibatch(self, rows: np.ndarray, train_actor: bool, number: int, draws: Any = None) -> dict[str, float]:
        p = self.policy
        if self.published and draws is not None:
            fitted = tf.constant(rows[: len(draws)], tf.int32)
            self.entropy.assign(self._refresh(fitted, self.data, tf.constant(draws, p.dtype)))
            draws = None
        self.std_floor.assign(p.min_sampling_denoising_std)
        self.n_minibatches += 1
        losses = super().minibatch(rows, train_actor, number, draws)
        self._tune()
        return losses

    def _published_entropy(self, rows: Array, data: dict[str, Array], noise: Array) -> Array:
        f = self.policy.ft_denoising_steps
        sample, step = rows // f, rows % f
        previous = tf.gather_nd(data["chains"], tf.stack([sample, step], -1))
        return self.policy.published_entropy({"state": tf.gather(data["state"], sample)}, previous, step, noise)

    def _temperature_step(self) -> None:
        self.temperature_optimizer.apply([self.policy.temperature_gradient(self.entropy)])

    def shared_gradients(self, rows: Array, data: dict[str, Array], draws: Any) -> tuple[Losses, Gradients]:
        """Returns the parts of the loss of rows [B] and the gradients by name, the entropy's own included; that is
        small, and every replica computes it."""
        losses, grads = super().shared_gradients(rows, data, None)
        if self.published:
            return losses, grads
        p, actor = self.policy, self.trained["actor"]
        states = tf.gather(data["state"], rows[: p.entropy_states] // p.ft_denoising_steps)
        with tf.GradientTape() as tape:
            entropy = p.action_entropy({"state": states}, draws, self.std_floor)
            loss = -p.temperature / p.entropy_scale * entropy
        self.entropy.assign(entropy)
        more = tape.gradient(loss, actor, unconnected_gradients=tf.UnconnectedGradients.ZERO)
        grads["actor"] = [g + m for g, m in zip(grads["actor"], more, strict=True)]
        return losses, grads

    # ---------- between iterations ----------

    def watched(self) -> dict[str, float]:
        values = {"entropy": self.entropy, "temperature": self.policy.temperature}
        return super().watched() | {name: float(value.numpy()) for name, value in values.items()}

    def tensors(self) -> dict[str, np.ndarray]:
        own = {f"optimizer.temperature.{k}": v for k, v in self.temperature_optimizer.state().items()}
        own["train.temperature"] = self.policy._temperature.numpy()
        return super().tensors() | own | {"train.entropy": self.entropy.numpy()}

    def state(self) -> dict[str, Any]:
        return super().state() | {"n_minibatches": self.n_minibatches}

    def restore(self, tensors: Mapping[str, np.ndarray], state: Mapping[str, Any]) -> None:
        super().restore(tensors, state)
        prefix = "optimizer.temperature."
        self.temperature_optimizer.restore({k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)})
        self.policy._temperature.assign(tensors["train.temperature"])
        self.entropy.assign(tensors["train.entropy"])
        self.n_minibatches = int(state["n_minibatches"])
