"""SAC: Soft Actor-Critic with a learned temperature (Haarnoja et al. 2018, arXiv:1812.05905).

    eq. 5, 6   the critics regress on  r + gamma (1 - terminated) (min_i Q_i'(o', a') - alpha log pi(a' | o'))
    eq. 9      the actor minimises     alpha log pi(a | o) - min_i Q_i(o, a)   with a = tanh(mean + std * noise)
    eq. 18     the temperature         alpha (log pi(a | o) + target entropy), see `loss_temperature` for the sign

Shapes: B batch, To observation history, H chunk, O observation, A action; cond = {"state": [B,To,O]}. Noise, [B,H*A]
standard normal, is an argument.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import tensorflow as tf

from diffusion_rl.core.keras import floatx, keras
from diffusion_rl.core.transitions import Transitions
from diffusion_rl.core.typing import Rng
from diffusion_rl.methods.off_policy.algorithm import (
    Experience,
    OffPolicy,
    Part,
    Phase,
    Progress,
    Settings,
    bellman_error,
)
from diffusion_rl.methods.off_policy.buffers import Draws, Rows
from diffusion_rl.networks.layers import Array, clone, variables_of
from diffusion_rl.policies.exploring import ExploringGaussianPolicy

ACTOR_STEPS = 2  # of an update that trains the actor


class SoftPolicy(OffPolicy, ExploringGaussianPolicy):
    """A Gaussian policy with a temperature (not in the reference's state_dict): SAC, RLPD and Cal-QL."""

    _log_alpha: tf.Variable

    def temperature(self, settings: Settings) -> Part:
        """Makes the temperature, at its beginning, with Adam at the critic's rate."""
        self._log_alpha = tf.Variable(np.log(settings["init_temperature"]), dtype=tf.float64)
        return Part([self._log_alpha], "critic_", constant=True)

    @property
    def alpha(self) -> Array:
        """Returns the temperature, a scalar in the precision of the weights."""
        return tf.cast(tf.exp(self._log_alpha), self.dtype)

    def watched(self) -> dict[str, float]:
        return {"log_alpha": float(self._log_alpha.numpy())}

    def loss_temperature(self, obs: Array, alpha: Array, target_entropy: float, noise: Array) -> Array:
        """Returns -mean(alpha (log pi + target entropy)), obs [B,To,O]: alpha grows while the entropy is too small."""
        _, log_prob = self.sample({"state": obs}, noise)
        return -tf.reduce_mean(alpha * tf.stop_gradient(log_prob + target_entropy))

    def step_temperature(self, obs: Array, noise: Array, step: Any, settings: Settings) -> Array:
        """Takes a gradient step on the temperature; obs [B,To,O], noise as in `sample`. Returns the loss."""
        target = float(settings["target_entropy"])
        return step(
            "log_alpha",
            lambda obs, noise: self.loss_temperature(obs, self.alpha, target, noise),
            rows=[obs, noise],
        )


class SoftActorCritic(SoftPolicy):
    """A soft policy with double Q-learning: SAC and Cal-QL.

    Args:
        actor: network cond -> (mean, std) [B,H*A], without a squashed mean.
        critic: network (cond, action [B,H,A]) -> (q1 [B], q2 [B]); the target critic starts as its copy.
        horizon_steps: H; the rest as in `GaussianPolicy` (`tanh_output` squashes samples).
    """

    CRITICS = ("critic", "target_critic")

    def __init__(self, actor: keras.layers.Layer, critic: keras.layers.Layer, horizon_steps: int, **kwargs: Any):
        super().__init__(actor, horizon_steps, **kwargs)
        self.critic, self.target_critic = critic, clone(critic)

    def loss_actor(self, obs: Array, alpha: Array | float, noise: Array) -> Array:
        """Returns the mean of alpha log pi - min Q at reparametrised actions; obs [B,To,O]."""
        actions, log_prob = self.sample({"state": obs}, noise)
        return tf.reduce_mean(alpha * log_prob - tf.minimum(*self.critic({"state": obs}, actions)))


class SAC(SoftActorCritic):
    """SAC; arguments of `SoftActorCritic`."""

    KIND = "sac"
    LABEL = "SAC"
    TRAIN_KEYS = (
        "actor critic init_temperature target_entropy target_ema_rate n_explore_steps n_eval_episode "
        "critic_replay_ratio actor_replay_ratio"
    )
    EXPORT_SETTINGS = {"tanh_output": True}  # earlier checkpoints do not say so

    def experience(self, settings: Settings) -> Experience:
        return Experience(counts_episodes=True, explores=True)

    def parts(self, settings: Settings) -> dict[str, Part]:
        return {
            "actor": Part(self.trainable(), "actor_", constant=True),
            "critic": Part(variables_of(self.critic), "critic_", constant=True),
            "log_alpha": self.temperature(settings),
        }

    def phases(self, settings: Settings, progress: Progress) -> list[Phase]:
        """Plans an update in every so many iterations (each a step of one environment), of the actor in fewer."""
        every, every_actor = (
            max(1, int(settings["batch_size"] / settings[f"{part}_replay_ratio"])) for part in ("critic", "actor")
        )
        if progress.itr <= settings["n_explore_steps"] or progress.itr % every:
            return []
        return [Phase(1, progress.itr % every_actor == 0)]

    # ---------- losses ----------

    def loss_critic(self, batch: Transitions, gamma: float, alpha: Array | float, noise: Array) -> Array:
        """Returns the sum of both critics' mean squared Bellman errors, a scalar; the target carries no gradient."""
        following = {"state": batch.next_obs}
        next_actions, next_log_prob = self.sample(following, noise)
        soft_value = tf.minimum(*self.target_critic(following, next_actions)) - alpha * next_log_prob
        return bellman_error(self.critic({"state": batch.obs}, batch.actions), batch, soft_value, gamma)

    # ---------- one update ----------

    def draw(self, rng: Rng, rows: Rows, settings: Settings, train_actor: bool) -> dict[str, Any]:
        b = int(settings["batch_size"])
        draws = {"rows": rows.distinct(b), "next_noise": rng.normal(self.noise_shape(b), floatx())}
        if train_actor:
            steps = settings.get("actor_steps", ACTOR_STEPS)
            draws["actor_noise"] = rng.normal((steps, 2, *self.noise_shape(b)), floatx())
        return draws

    def update(self, data: Any, draws: Draws, step: Any, settings: Settings, train_actor: bool) -> dict[str, Array]:
        """Steps the critic and its target; then several times actor and temperature on the same batch."""
        batch, alpha = data.online.at(draws["rows"]), self.alpha  # its value at the beginning serves throughout
        losses = {
            "loss_critic": step(
                "critic",
                lambda batch, noise: self.loss_critic(batch, settings["gamma"], alpha, noise),
                rows=[batch, draws["next_noise"]],
            )
        }
        self.update_target_critic(settings["target_ema_rate"])
        for k in range(draws["actor_noise"].shape[0]) if train_actor else ():
            noise = draws["actor_noise"][k]
            actor = step("actor", lambda obs, noise: self.loss_actor(obs, alpha, noise), rows=[batch.obs, noise[0]])
            temperature = self.step_temperature(batch.obs, noise[1], step, settings)
            losses |= {f"loss_actor.{k}": actor, f"loss_temperature.{k}": temperature}
        return losses
