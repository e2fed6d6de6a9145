"""DIPO: diffusion policy for model-free online reinforcement learning (Yang et al. 2023, arXiv:2305.13122).

    alg. 2  actions in the buffer climb the critic:  a <- a + step of Adam along d min_i Q_i(o, a) / da,  several times
            the actor imitates the improved actions, which replace the old ones
            the critics regress on r + gamma min_i Q_i'(o', a'),  a' of the target actor, which also acts

Shapes: B batch, K denoising steps, H chunk, A action.
"""

from __future__ import annotations

from typing import Any

import tensorflow as tf

from diffusion_rl.core.keras import floatx, keras
from diffusion_rl.core.optimizers import clip_by_global_norm
from diffusion_rl.core.precision import only_slopes
from diffusion_rl.core.transitions import Transitions
from diffusion_rl.core.typing import Rng
from diffusion_rl.methods.off_policy.algorithm import OffPolicy, Settings, follow
from diffusion_rl.methods.off_policy.buffers import Draws, Rows
from diffusion_rl.networks.layers import Array, clone
from diffusion_rl.policies.diffusion import Cond
from diffusion_rl.policies.exploring import ExploringDiffusionPolicy

BETAS, EPSILON = (0.9, 0.999), 1e-5  # of Adam over actions
GRADIENT_SCALE = 0.1  # the bound of the actions' gradient, for each element of the chunk


class DIPO(OffPolicy, ExploringDiffusionPolicy):
    """A diffusion policy, two critics in one, and targets of both.

    Args:
        actor: (x [B,H,A], t [B], cond) -> noise [B,H,A].
        critic: (cond, actions) -> (q1 [B], q2 [B]).
        further arguments: see `ExploringDiffusionPolicy`.
    """

    KIND = "dipo"
    LABEL = "DIPO"
    TRAIN_KEYS = (
        "actor critic n_critic_warmup_itr max_grad_norm replay_ratio target_ema_rate action_lr action_gradient_steps"
    )
    ACTS_WITH = "actor_target"

    def __init__(self, actor: keras.layers.Layer, critic: keras.layers.Layer, **kwargs: Any):
        super().__init__(actor=actor, **kwargs)
        self.critic, self.critic_target = critic, clone(critic)
        self.actor_target = clone(self.actor)

    @property
    def copies(self) -> list[keras.layers.Layer]:
        """Returns the networks that start as the pre-trained one."""
        return [self.actor_target]

    # ---------- losses ----------

    def target_sample(self, cond: Cond, noise: Array, deterministic: bool = False) -> Array:
        """Samples action chunks [B,H,A] of the target actor."""
        return self.sample(cond, noise, deterministic, network=self.actor_target)

    def loss_critic(self, batch: Transitions, gamma: float, noise: Array) -> Array:
        """Returns the Bellman error of both critics. noise [K+1,B,H,A]."""
        return self.double_q_error(batch, self.target_sample({"state": batch.next_obs}, noise), gamma)

    def improve(self, cond: Cond, actions: Array, lr: float, n_steps: int, max_norm: float) -> Array:
        """Returns actions [B,Ta,A] after `n_steps` of Adam up the smaller critic.

        The gradient's norm is bounded over the whole batch; actions stay in [-1, 1].
        """
        (b1, b2), m, v = BETAS, tf.zeros_like(actions), tf.zeros_like(actions)
        for k in range(1, n_steps + 1):
            with tf.GradientTape(watch_accessed_variables=False) as tape, only_slopes():
                tape.watch(actions)
                loss = -tf.reduce_sum(tf.minimum(*self.critic(cond, actions)))
            slope: Any = clip_by_global_norm([tape.gradient(loss, actions)], max_norm)[0][0]
            m, v = b1 * m + (1 - b1) * slope, b2 * v + (1 - b2) * tf.square(slope)
            scale = tf.sqrt(v) / (1 - b2**k) ** 0.5 + EPSILON
            actions = tf.clip_by_value(actions - lr / (1 - b1**k) * m / scale, -1.0, 1.0)
        return actions

    def update_target_actor(self, tau: float) -> None:
        follow(self.actor_target, self.actor, tau)

    # ---------- one update ----------

    def draw(self, rng: Rng, rows: Rows, settings: Settings, train_actor: bool) -> dict[str, Any]:
        b = int(settings["batch_size"])
        draws = {"rows": rows.online(b), "next_noise": rng.normal(self.noise_shape(b), floatx())}
        if train_actor:
            draws |= {
                "actor_rows": rows.online(b),
                "t": rng.integers(0, self.denoising_steps, (b,)),
                "noise": rng.normal((b, self.horizon_steps, self.action_dim), floatx()),
            }
        return draws

    def update(self, data: Any, draws: Draws, step: Any, settings: Settings, train_actor: bool) -> dict[str, Array]:
        batch = data.online.at(draws["rows"])
        critic = step("critic", lambda: self.loss_critic(batch, settings["gamma"], draws["next_noise"]))
        losses = {"loss_critic": critic}
        if train_actor:
            losses["loss_actor"] = self.update_actor(data, draws, step, settings)
        self.update_target_critic(settings["target_ema_rate"])
        self.update_target_actor(settings["target_ema_rate"])
        return losses

    def update_actor(self, data: Any, draws: Draws, step: Any, settings: Settings) -> Array:
        """Improves actions [B,Ta,A], puts them back and imitates them; returns the loss."""
        batch = data.online.at(draws["actor_rows"])
        cond, n_elements = {"state": batch.obs}, batch.actions.shape[1] * batch.actions.shape[2]
        actions = self.improve(
            cond,
            batch.actions,
            settings["action_lr"],
            settings["action_gradient_steps"],
            n_elements * GRADIENT_SCALE,
        )
        data.online.replace("actions", draws["actor_rows"], actions)
        return step(
            "actor",
            lambda: self.loss(actions, cond, draws["t"], draws["noise"]),
            settings.get("max_grad_norm"),
        )

    # ---------- acting ----------

    def act(self, cond: Cond, draws: Draws, deterministic: bool, settings: Settings) -> Any:
        return self.target_sample(cond, draws["noise"], deterministic)
