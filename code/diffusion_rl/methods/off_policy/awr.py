"""AWR: advantage-weighted regression (Peng et al. 2019, arXiv:1910.00177), of a diffusion policy (DAWR) or a Gaussian.

    the critic regresses on TD(lambda) targets of all steps in the buffer
    w = min(exp(beta A), max_adv_weight),  A the advantage, normalised over the batch
    the actor minimises  mean_b w_b ||eps_theta(x_t, t, o) - eps||^2,  or  -mean_b w_b log pi(a | o)

Shapes: S steps of E environments in the buffer, B batch, K denoising steps, H chunk, A action.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import tensorflow as tf

from diffusion_rl.core.keras import keras
from diffusion_rl.core.returns import td_lambda
from diffusion_rl.core.typing import Rng
from diffusion_rl.methods.off_policy.algorithm import Experience, OffPolicy, Phase, Progress, Settings
from diffusion_rl.methods.off_policy.buffers import Draws, Rows
from diffusion_rl.methods.off_policy.rwr import WeightedDenoising, WeightedLikelihood
from diffusion_rl.networks.layers import Array
from diffusion_rl.policies.diffusion import Cond

ROWS_AT_ONCE = 20_000  # of a pass over the buffer


class AdvantageWeighted(OffPolicy):
    """Supervised learning on a buffer, weighted by advantages; and a state value, cond -> [B,1].

    A policy that inherits it has `actor`, `weighted_loss` and `draw_loss`.
    """

    TRAIN_KEYS = "actor critic n_critic_warmup_itr max_grad_norm replay_ratio critic_update_ratio beta max_adv_weight"
    actor: keras.layers.Layer
    weighted_loss: Any  # of the policy: batch, weights [B], draws -> a scalar
    draw_loss: Any  # of the policy: rng, rows -> its draws

    def __init__(self, critic: keras.layers.Layer, **kwargs: Any):
        super().__init__(**kwargs)
        self.critic = critic

    def experience(self, settings: Settings) -> Experience:
        names = ("obs", "actions", "rewards", "terminated", "returns", "advantages")
        return Experience(fields=names, counts_steps=True)

    def phases(self, settings: Settings, progress: Progress) -> list[Phase]:
        """Plans the critic's updates, then the actor's with the advantages that the new critic gives."""
        n = int(progress.transitions / settings["batch_size"] * settings["replay_ratio"])
        return [
            Phase(n // settings["critic_update_ratio"], True, "update_critic", "draw_critic", "estimate"),
            Phase(n, progress.itr >= settings["n_critic_warmup_itr"], before="estimate"),
        ]

    def estimate(self, data: Any, settings: Settings, n_envs: int) -> dict[str, np.ndarray]:
        """Writes TD(lambda) targets and advantages [S,E] of all rows into the buffer.

        Their discount and lambda are the reference's defaults, whatever `gamma` the configuration has.
        """
        obs = data.online.read("obs")
        parts = np.split(obs, range(ROWS_AT_ONCE, len(obs), ROWS_AT_ONCE))
        values = np.concatenate([value_of(self.critic, tf.constant(part)) for part in parts]).reshape(-1, n_envs)
        rewards, terminated = (data.online.read(name).reshape(-1, n_envs) for name in ("rewards", "terminated"))
        targets = td_lambda(rewards, terminated, values)
        advantages = targets - values
        data.online.write("returns", targets.reshape(-1))
        data.online.write("advantages", advantages.reshape(-1))
        return {"td_trajs": targets, "values_trajs": values, "advantages_trajs": advantages.reshape(-1)}

    def loss_critic(self, cond: Cond, targets: Array) -> Array:
        """Averages the squared distance of values [B,1] and targets [B]: each target meets every value (quirk 43)."""
        return tf.reduce_mean(tf.square(self.critic(cond) - targets))

    @staticmethod
    def advantage_weights(advantages: Array, beta: float, most: float) -> Array:
        """Normalises advantages [B] over the batch (unbiased deviation), exponentiates and bounds them."""
        centred = advantages - tf.reduce_mean(advantages)
        count = tf.cast(tf.size(advantages), advantages.dtype)
        deviation = tf.sqrt(tf.reduce_sum(tf.square(centred)) / (count - 1))
        return tf.minimum(tf.exp(beta * centred / (deviation + 1e-6)), tf.cast(most, advantages.dtype))

    # ---------- updates ----------

    def draw_critic(self, rng: Rng, rows: Rows, settings: Settings, train_actor: bool) -> dict[str, Any]:
        """Draws rows for the critic, from as many as there are steps, though rows are E times as many (quirk 64)."""
        return {"rows": rows.online(int(settings["batch_size"]), steps_only=True)}

    def update_critic(
        self, data: Any, draws: Draws, step: Any, settings: Settings, train_actor: bool
    ) -> dict[str, Array]:
        batch = data.online.at(draws["rows"])
        return {"loss_critic": step("critic", lambda: self.loss_critic({"state": batch.obs}, batch.returns))}

    def draw(self, rng: Rng, rows: Rows, settings: Settings, train_actor: bool) -> dict[str, Any]:
        b = int(settings["batch_size"])
        return {"rows": rows.online(b)} | self.draw_loss(rng, b)

    def update(self, data: Any, draws: Draws, step: Any, settings: Settings, train_actor: bool) -> dict[str, Array]:
        batch = data.online.at(draws["rows"])
        weights = self.advantage_weights(batch.advantages, settings["beta"], settings["max_adv_weight"])
        clip = settings.get("max_grad_norm")
        loss = step("actor", lambda: self.weighted_loss(batch, weights, draws), clip, apply=train_actor)
        return {"loss_actor": loss}


class AWR(AdvantageWeighted, WeightedDenoising):
    """DAWR: AWR of a diffusion policy.

    Args:
        actor: (x [B,H,A], t [B], cond) -> noise [B,H,A].
        critic: cond -> [B,1].
        further arguments: as in `ExploringDiffusionPolicy`.
    """

    KIND = "awr"
    LABEL = "DAWR"


class GaussianAWR(AdvantageWeighted, WeightedLikelihood):
    """AWR of a Gaussian policy.

    Args:
        actor: cond -> (mean, std) [B,H*A].
        critic: cond -> [B,1].
        further arguments: as in `GaussianPolicy`.
    """

    KIND = "gaussian_awr"


@tf.function(reduce_retracing=True, autograph=False)
def value_of(critic: keras.layers.Layer, obs: Array) -> Array:
    """Returns state values [B] of observations [B,To,O], compiled."""
    return critic({"state": obs})[:, 0]
