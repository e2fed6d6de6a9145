"""QSM: Q-score matching (Psenka et al. 2024, arXiv:2312.11752).

    eq. 13  the score is matched to the critic's slope:  || -eps_theta(x_t, t, o) - c dQ/da(o, x_t) ||^2
            the critics regress on r + gamma min_i Q_i'(o', a'),  a' ~ pi_theta(. | o')

As in the PyTorch reference the slope is taken at the noisy action and averaged over both critics. Shapes: B batch, K
denoising steps, H chunk, A action.
"""

from __future__ import annotations

from typing import Any

import tensorflow as tf

from diffusion_rl.core.keras import floatx, keras
from diffusion_rl.core.precision import only_slopes
from diffusion_rl.core.transitions import Transitions
from diffusion_rl.core.typing import Rng
from diffusion_rl.methods.off_policy.algorithm import Experience, OffPolicy, Settings
from diffusion_rl.methods.off_policy.buffers import Draws, Rows
from diffusion_rl.networks.layers import Array, clone
from diffusion_rl.policies.diffusion import Cond
from diffusion_rl.policies.exploring import ExploringDiffusionPolicy


class QSM(OffPolicy, ExploringDiffusionPolicy):
    """A diffusion policy, two critics in one, and their target.

    Args:
        actor: (x [B,H,A], t [B], cond) -> noise [B,H,A].
        critic: (cond, actions) -> (q1 [B], q2 [B]).
        further arguments: see `ExploringDiffusionPolicy`.
    """

    KIND = "qsm"
    LABEL = "QSM"
    CRITICS = ("critic_q", "target_q")
    TRAIN_KEYS = "actor critic n_critic_warmup_itr max_grad_norm replay_ratio critic_tau q_grad_coeff"

    def __init__(self, actor: keras.layers.Layer, critic: keras.layers.Layer, **kwargs: Any):
        super().__init__(actor=actor, **kwargs)
        self.critic_q, self.target_q = critic, clone(critic)

    def experience(self, settings: Settings) -> Experience:
        return Experience(counts_steps=True, acts_on_last=True)

    # ---------- losses ----------

    def action_slope(self, cond: Cond, actions: Array) -> Array:
        """Averages dQ/da [B,H,A] over both critics; no gradient flows through it."""
        with tf.GradientTape(watch_accessed_variables=False) as tape, only_slopes():
            tape.watch(actions)
            q1, q2 = self.critic_q(cond, actions)
            total = tf.reduce_sum(q1 + q2)
        return tf.stop_gradient(tape.gradient(total, actions)) / 2

    def loss_actor(self, obs: Array, actions: Array, q_grad_coeff: float, noise: Array, t: Array) -> Array:
        """Matches the score to the slope at noisy actions. actions, noise [B,H,A], t [B]."""
        cond = {"state": obs}
        noisy = self.q_sample(actions, t, noise)
        slope = self.action_slope(cond, noisy)
        predicted = self.predictor(self.network)(noisy, t, cond)
        return tf.reduce_mean(tf.square(-predicted - q_grad_coeff * slope))

    def loss_critic(self, batch: Transitions, gamma: float, noise: Array) -> Array:
        """Returns the Bellman error of both critics. noise [K+1,B,H,A]."""
        return self.double_q_error(batch, self.sample({"state": batch.next_obs}, noise), gamma)

    # ---------- one update ----------

    def draw(self, rng: Rng, rows: Rows, settings: Settings, train_actor: bool) -> dict[str, Any]:
        b = int(settings["batch_size"])
        return {
            "rows": rows.online(b),
            "next_noise": rng.normal(self.noise_shape(b), floatx()),
            "noise": rng.normal((b, self.horizon_steps, self.action_dim), floatx()),
            "t": rng.integers(0, self.denoising_steps, (b,)),
        }

    def update(self, data: Any, draws: Draws, step: Any, settings: Settings, train_actor: bool) -> dict[str, Array]:
        batch = data.online.at(draws["rows"])
        critic = step("critic", lambda: self.loss_critic(batch, settings["gamma"], draws["next_noise"]))
        actor = step(
            "actor",
            lambda: self.loss_actor(batch.obs, batch.actions, settings["q_grad_coeff"], draws["noise"], draws["t"]),
            settings.get("max_grad_norm"),
            apply=train_actor,
        )
        self.update_target_critic(settings["critic_tau"])
        return {"loss_critic": critic, "loss_actor": actor}
