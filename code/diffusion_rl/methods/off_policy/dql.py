"""DQL: Diffusion Q-learning (Wang et al. 2023, arXiv:2208.06193).

    eq. 3   the actor minimises    L_d(theta) - eta E[Q_1(o, a)] / E|Q_2(o, a)|,   a ~ pi_theta(. | o) differentiably
    eq. 4   the critics regress on r + gamma min_i Q_i'(o', a'),                    a' ~ pi_theta(. | o')

As in the PyTorch reference L_d is the denoising loss on the policy's own samples, not on the data's actions, and a coin
decides which critic is maximised and which normalises. Shapes: B batch, K denoising steps, H chunk, A action.
"""

from __future__ import annotations

from typing import Any

import tensorflow as tf

from diffusion_rl.core.keras import floatx, keras
from diffusion_rl.core.transitions import Transitions
from diffusion_rl.core.typing import Rng
from diffusion_rl.methods.off_policy.algorithm import OffPolicy, Settings
from diffusion_rl.methods.off_policy.buffers import Draws, Rows
from diffusion_rl.networks.layers import Array, clone
from diffusion_rl.policies.exploring import ExploringDiffusionPolicy


class DQL(OffPolicy, ExploringDiffusionPolicy):
    """A diffusion policy, two critics in one, and their target.

    Args:
        actor: (x [B,H,A], t [B], cond) -> noise [B,H,A].
        critic: (cond, actions) -> (q1 [B], q2 [B]).
        further arguments: see `ExploringDiffusionPolicy`.
    """

    KIND = "dql"
    LABEL = "DQL"
    TRAIN_KEYS = "actor critic n_critic_warmup_itr max_grad_norm replay_ratio target_ema_rate eta"

    def __init__(self, actor: keras.layers.Layer, critic: keras.layers.Layer, **kwargs: Any):
        super().__init__(actor=actor, **kwargs)
        self.critic, self.critic_target = critic, clone(critic)

    # ---------- losses ----------

    def loss_critic(self, batch: Transitions, gamma: float, noise: Array) -> Array:
        """Returns the Bellman error of both critics. noise [K+1,B,H,A]."""
        return self.double_q_error(batch, self.sample({"state": batch.next_obs}, noise), gamma)

    def loss_actor(
        self, obs: Array, eta: float, act_steps: int, noise: Array, t: Array, denoising_noise: Array, coin: Array
    ) -> Array:
        """Returns the denoising loss plus eta times the normalised value, of the policy's own actions.

        Args:
            noise: [K+1,B,H,A] for the actions;  t [B], denoising_noise [B,act_steps,A] for their denoising loss.
            coin: uniform in [0,1): above a half the first critic is maximised and the second normalises.
        """
        cond = {"state": obs}
        bound = 1.0 if self.final_action_clip_value else None  # the reference's bound here, whatever the value
        actions = self.sample(cond, noise, final_clip=bound)[:, :act_steps]
        q1, q2 = self.critic(cond, actions)
        heads = tf.cast(coin, q1.dtype) > 0.5
        value = tf.reduce_mean(tf.where(heads, q1, q2))
        scale = tf.stop_gradient(tf.reduce_mean(tf.abs(tf.where(heads, q2, q1))))
        return self.loss(actions, cond, t, denoising_noise) - eta * value / scale

    # ---------- one update ----------

    def draw(self, rng: Rng, rows: Rows, settings: Settings, train_actor: bool) -> dict[str, Any]:
        b, horizon = int(settings["batch_size"]), self.horizon_steps
        return {
            "rows": rows.online(b),
            "next_noise": rng.normal(self.noise_shape(b), floatx()),
            "noise": rng.normal(self.noise_shape(b), floatx()),
            "t": rng.integers(0, self.denoising_steps, (b,)),
            "denoising_noise": rng.normal((b, horizon, self.action_dim), floatx()),
            "coin": rng.uniform((), dtype=floatx()),
        }

    def update(self, data: Any, draws: Draws, step: Any, settings: Settings, train_actor: bool) -> dict[str, Array]:
        batch = data.online.at(draws["rows"])
        critic = step("critic", lambda: self.loss_critic(batch, settings["gamma"], draws["next_noise"]))
        own = [draws[name] for name in ("noise", "t", "denoising_noise", "coin")]
        actor = step(
            "actor",
            lambda: self.loss_actor(batch.obs, settings["eta"], self.horizon_steps, *own),
            settings.get("max_grad_norm"),
            apply=train_actor,
        )
        self.update_target_critic(settings["target_ema_rate"])
        return {"loss_critic": critic, "loss_actor": actor}
