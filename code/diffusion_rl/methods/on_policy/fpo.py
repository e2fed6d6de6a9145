"""FPO: PPO for flow policies without a likelihood (flow policy optimization, McAllister et al. 2025, arXiv:2507.21053).

For every action of a rollout some pairs of a time and a noise are drawn, once. The ratio of PPO becomes

    exp(mean over the pairs of (loss_old - loss)),

with the conditional flow-matching loss of the action at each pair, before and now. Nothing is added to the flow: it
explores by the noise that it begins with.

FPO++ (Yi et al. 2026, arXiv:2602.02481) has a ratio for each pair (`ratio_per_pair`); where an advantage A is negative
it takes the gradient back to 1 instead of cutting it off (`trust_region: asymmetric`), with SPO's objective

    r A - |A| / (2 clip) (r - 1)^2;

and it acts from zeros instead of noise when it is evaluated (`zero_noise`).

Shapes: B rows, N samples of a rollout, P pairs; To, O, H, A as in `policies.diffusion`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import tensorflow as tf

from diffusion_rl.core.batching import in_chunks
from diffusion_rl.core.errors import UserError
from diffusion_rl.core.keras import floatx
from diffusion_rl.core.typing import Rng
from diffusion_rl.methods.on_policy.chunked import mean_gradients
from diffusion_rl.methods.on_policy.ppo import ChunkPPO, Gradients, Losses, PerRow, PPOTrainer, clipped_policy_loss
from diffusion_rl.networks.layers import Array
from diffusion_rl.networks.mlp import folding
from diffusion_rl.policies.diffusion import Cond
from diffusion_rl.policies.flow import FlowPolicy, draw_times

PAIRS = 1000  # whose losses and gradients are computed together
COLUMNS = ("state", "actions", "returns", "values", "advantages", "old_log_prob", "times", "noise")
WATCHED = ("pg_loss", "ratio", "approx_kl", "clipfrac", "flow_loss", "v_loss")


class FPO(ChunkPPO, FlowPolicy):
    """A flow policy with FPO's loss.

    Args:
        actor: the velocity's network, also known as `network` and `actor_ft`.
        critic: state value, cond -> [B,1].
        n_pairs: P.
        clip_ploss_coef: clip range of the ratio.
        difference_clip: bound on the difference of a pair's losses.
        ratio_per_pair: a ratio and a clip for each pair instead of one for each action.
        trust_region: clip, or asymmetric as in FPO++.
        zero_noise: evaluations begin with zeros.
        kwargs: of `ClippedPPO` and the policy.
    """

    KIND = "fpo"
    LABEL = "FPO"
    ACTS_AS: ClassVar[type[FlowPolicy]] = FlowPolicy

    def __init__(
        self,
        actor: Any,
        critic: Any,
        n_pairs: int = 8,
        clip_ploss_coef: float = 0.05,
        difference_clip: float = 3.0,
        ratio_per_pair: bool = False,
        trust_region: str = "clip",
        zero_noise: bool = False,
        **kwargs: Any,
    ):
        super().__init__(clip_ploss_coef, network=actor, **kwargs)
        if trust_region not in ("clip", "asymmetric"):
            raise UserError(f"model.trust_region={trust_region}: take clip or asymmetric")
        if hasattr(actor, "encode"):
            raise UserError("FPO fine-tunes flows that see states, not images: take ReinFlow")
        if n_pairs < 1:
            raise UserError(f"model.n_pairs={n_pairs}: at least one pair of time and noise is needed")
        self.actor_ft, self.critic = actor, critic
        self.n_pairs, self.difference_clip = int(n_pairs), float(difference_clip)
        self.ratio_per_pair, self.zero_noise = bool(ratio_per_pair), bool(zero_noise)
        self.trust_region = trust_region

    def decide(self, cond: Cond, noise: Array, deterministic: bool) -> tuple[Array, ...]:
        return super().decide(cond, tf.zeros_like(noise) if deterministic and self.zero_noise else noise, deterministic)

    def draw_pairs(self, rng: Rng, rows: int) -> tuple[np.ndarray, np.ndarray]:
        """Draws times [B,P] and noise [B,P,H,A]."""
        times = draw_times(rng, self.sample_t_type, (rows, self.n_pairs))
        return times, rng.normal((rows, self.n_pairs, self.horizon_steps, self.action_dim), floatx())

    def pair_losses(self, obs: Cond, actions: Array, times: Array, noise: Array) -> Array:
        """Returns the flow-matching loss [B,P] of actions [B,H,A] at times [B,P] with noise [B,P,H,A]."""
        flat = {name: tf.repeat(array, self.n_pairs, axis=0) for name, array in obs.items()}
        x1, t = tf.repeat(actions, self.n_pairs, axis=0), tf.reshape(times, [-1])
        x, target = self.between(x1, t, tf.reshape(noise, [-1, *x1.shape[1:]]))
        squared = tf.square(self.network(x, t, flat) - target)
        return tf.reshape(tf.reduce_mean(squared, axis=[1, 2]), [-1, self.n_pairs])

    def loss(  # type: ignore[override]  # with pairs
        self,
        obs: Cond,
        actions: Array,
        returns: Array,
        oldvalues: Array,
        advantages: Array,
        oldlosses: Array,
        times: Array,
        noise: Array,
    ) -> Losses:
        """Returns the loss of one minibatch.

        Args:
            obs: {"state": [B,To,O]};  actions: [B,H,A];  returns, oldvalues, advantages: [B]
            oldlosses, times: [B,P];  noise: [B,P,H,A], as they were drawn when the data were collected.
        """
        advantages = self.normalised(advantages)
        per_row, losses = self.row_losses(obs, actions, advantages, oldlosses, times, noise)
        watched = {"flow_loss": tf.stop_gradient(tf.reduce_mean(losses))}
        return {**self.mean_losses(per_row, obs, returns, oldvalues), **watched}

    def row_losses(
        self, obs: Cond, actions: Array, advantages: Array, oldlosses: Array, times: Array, noise: Array
    ) -> tuple[PerRow, Array]:
        """Returns `clipped_policy_loss` and the mean flow-matching loss [B] of the rows; arguments as of `loss`,
        advantages as they count."""
        losses = self.pair_losses(obs, actions, times, noise)
        difference = tf.clip_by_value(oldlosses - losses, -self.difference_clip, self.difference_clip)
        if self.ratio_per_pair:
            per_pair = self.ratio_loss(difference, advantages[:, None])
            loss, ratio, approx_kl, outside = (tf.reduce_mean(part, axis=1) for part in per_pair)
            return (loss, ratio, approx_kl, outside), tf.reduce_mean(losses, axis=1)
        return self.ratio_loss(tf.reduce_mean(difference, axis=1), advantages), tf.reduce_mean(losses, axis=1)

    def ratio_loss(self, log_ratio: Array, advantages: Array) -> PerRow:
        """Returns `clipped_policy_loss` of ratios [...], in the policy's trust region."""
        clip = tf.constant(self.clip_ploss_coef, log_ratio.dtype)
        loss, ratio, approx_kl, outside = clipped_policy_loss(log_ratio, tf.zeros_like(log_ratio), advantages, clip)
        if self.trust_region == "asymmetric":
            drawn_back = tf.abs(advantages) / (2 * clip) * tf.square(ratio - 1) - advantages * ratio
            loss = tf.where(advantages < 0, drawn_back, loss)
        return loss, ratio, approx_kl, outside

    def make_trainer(self, settings: Mapping[str, Any], reward_horizon: int) -> FPOTrainer:
        """Builds what updates this policy; arguments of `PPOTrainer`."""
        return FPOTrainer(self, settings, reward_horizon)


class FPOTrainer(PPOTrainer):
    """Updates an `FPO` policy with pairs that stay the same through all epochs; arguments as of `PPOTrainer`."""

    def __init__(self, policy: Any, settings: Mapping[str, Any], reward_horizon: int):
        if settings.get("use_bc_loss"):
            raise UserError("train.use_bc_loss=true: FPO has no behaviour-cloning loss")
        super().__init__(policy, settings, reward_horizon)
        self.pairs: tuple[np.ndarray, np.ndarray] | None = None

    def compile(self) -> None:
        super().compile()
        self.chunk = max(1, PAIRS // self.policy.n_pairs)

        @folding(self.fast)
        def losses(state: Array, *rest: Array) -> list[Array]:
            return [self.policy.pair_losses({"state": state}, *rest)]

        self._pair_losses = in_chunks(losses, self.chunk)

    def old_log_probs(
        self, state: np.ndarray, decisions: Mapping[str, np.ndarray], rng: Rng, rgb: np.ndarray | None = None
    ) -> np.ndarray:
        """Draws the pairs of a rollout; returns their losses [N,P] under the policy that collected it."""
        self.pairs = self.policy.draw_pairs(rng, len(state))
        columns = (state, decisions["actions"], *self.pairs)
        tensors = [tf.constant(column, self.policy.dtype) for column in columns]
        return self._pair_losses(*tensors)[0].numpy()

    def load(self, *columns: Any) -> int:
        n_rows = super().load(*columns)
        assert self.pairs is not None
        self.data["times"], self.data["noise"] = (tf.constant(pair, self.policy.dtype) for pair in self.pairs)
        return n_rows

    def losses(self, rows: Array, data: dict[str, Array], draws: Any) -> Losses:
        """Returns the parts of the loss of rows [B]."""
        state, *rest = (tf.gather(data[name], rows) for name in COLUMNS)
        return self.policy.loss({"state": state}, *rest)

    def gradients(self, rows: Array, data: dict[str, Array], draws: Any) -> tuple[Losses, Gradients]:
        """Returns the parts of the loss of rows [B] and the gradients by name; the fast path goes chunk by chunk."""
        if not self.fast:
            return super().gradients(rows, data, draws)
        p, size = self.policy, rows.shape[0]
        columns = {name: tf.gather(data[name], rows) for name in COLUMNS}
        columns["advantages"] = p.normalised(columns["advantages"])

        def sums(weight: Array, *columns: Array) -> tuple[Array, list[Array]]:
            state, actions, returns, before, *rest = columns
            per_row, losses = p.row_losses({"state": state}, actions, *rest)
            v_loss = p.value_loss(tf.reshape(p.critic({"state": state}), [-1]), returns, before)
            parts = [tf.reduce_sum(weight * x) for x in (*per_row, losses, v_loss)]
            return parts[0] + self.coefficients["v_loss"] * parts[-1], parts

        per_row = [tf.ones([size], p.dtype), *columns.values()]
        means, grads = mean_gradients(sums, per_row, size, self.chunk, self.trained, len(WATCHED))
        return dict(zip(WATCHED, means, strict=True)), grads
