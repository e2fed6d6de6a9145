"""RLPD: reinforcement learning with prior data (Ball et al. 2023, arXiv:2302.02948): SAC with an ensemble of critics,
half of every batch from demonstrations, and several critic updates for each of the actor's.

    alg. 1   critics  r + gamma (1 - terminated) (min over two random target critics - alpha log pi(a' | o'))
             actor    mean over critics of Q_m(o, a) - alpha log pi(a | o)

Shapes as in `methods.off_policy.sac`; M critics.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import tensorflow as tf

from diffusion_rl.core.keras import floatx, keras
from diffusion_rl.core.transitions import Transitions
from diffusion_rl.core.typing import Rng
from diffusion_rl.methods.off_policy.algorithm import Experience, Part, Phase, Progress, Settings, mixed
from diffusion_rl.methods.off_policy.buffers import Draws, Rows
from diffusion_rl.methods.off_policy.sac import SoftPolicy
from diffusion_rl.networks.critics import CriticEnsemble
from diffusion_rl.networks.layers import Array, variables_of


class EnsembleCritics:
    """M critics, their targets, and two of the targets drawn at random; for a policy to inherit.

    As in the reference all members begin alike, and the modules of its list `critic_networks` are never trained: what
    is trained is `ensemble_params`, which began as their copy.
    """

    CRITICS = ("ensemble_params", "target_networks")

    def init_critics(self, critic: keras.layers.Layer, n_critics: int) -> None:
        """Builds the critics, when the policy is built."""
        self.n_critics = n_critics
        self.critic_networks = CriticEnsemble([critic] * n_critics)
        self.target_networks = CriticEnsemble([critic] * n_critics)
        self.ensemble_params = CriticEnsemble([critic] * n_critics)

    def draw_pair(self, rng: Rng) -> np.ndarray:
        """Draws the indices [2] of two different critics."""
        return rng.permutation(self.n_critics)[:2]

    def smaller(self, critics: CriticEnsemble, cond: Any, actions: Array, pair: Array) -> Array:
        """Returns the smaller value [B] of these two critics."""
        return tf.reduce_min(critics(cond, actions, pair), axis=0)

    def ensemble_error(self, batch: Transitions, next_value: Array, gamma: float) -> Array:
        """Averages over critics and batch the squared distance to r + gamma (1 - terminated) V(o'); next_value [B]."""
        target = tf.stop_gradient(batch.rewards + gamma * (1.0 - batch.terminated) * next_value)
        return tf.reduce_mean(tf.square(self.ensemble_params({"state": batch.obs}, batch.actions) - target))


class RLPD(EnsembleCritics, SoftPolicy):
    """A Gaussian policy, an ensemble of critics and a temperature.

    Args:
        actor: network cond -> (mean, std) [B,H*A], without a squashed mean.
        critic: network (cond, actions) -> q [B] (`double_q: false`), of which there will be `n_critics`.
        backup_entropy: count the entropy of the next action in the critics' target.
        further arguments: as in `GaussianPolicy`.
    """

    KIND = "rlpd"
    LABEL = "RLPD"
    TRAIN_KEYS = (
        "actor critic init_temperature target_entropy target_ema_rate n_explore_steps n_eval_episode critic_num_update"
    )

    def __init__(
        self,
        actor: keras.layers.Layer,
        critic: keras.layers.Layer,
        n_critics: int,
        horizon_steps: int,
        backup_entropy: bool = False,
        **kwargs: Any,
    ):
        super().__init__(actor, horizon_steps, **kwargs)
        self.backup_entropy = backup_entropy
        self.init_critics(critic, n_critics)

    def experience(self, settings: Settings) -> Experience:
        fields = Experience().fields
        return Experience(offline_fields=fields, counts_episodes=True, explores=True, evaluates_at_once=True)

    def parts(self, settings: Settings) -> dict[str, Part]:
        return {
            "actor": Part(self.trainable(), "actor_"),
            "critic": Part(variables_of(self.ensemble_params), "critic_"),
            "log_alpha": self.temperature(settings),
        }

    def phases(self, settings: Settings, progress: Progress) -> list[Phase]:
        """Plans the critics' updates, then the actor's on the last of their batches."""
        if progress.itr < settings["n_explore_steps"]:
            return []
        critics = Phase(settings["critic_num_update"], True, "update_critic", "draw_critic")
        return [critics, Phase(1, True)]

    # ---------- losses ----------

    def loss_critic(self, batch: Transitions, gamma: float, alpha: Array | float, pair: Array, noise: Array) -> Array:
        """Returns the Bellman error of all critics; `pair` [2] are the target critics that count."""
        following = {"state": batch.next_obs}
        next_actions, next_log_prob = self.sample(following, noise)
        next_value = self.smaller(self.target_networks, following, next_actions, pair)
        if self.backup_entropy:
            next_value -= alpha * next_log_prob
        return self.ensemble_error(batch, next_value, gamma)

    def loss_actor(self, obs: Array, alpha: Array | float, noise: Array) -> Array:
        """Returns minus the mean value of actions under all critics, and their entropy; obs [B,To,O]."""
        cond = {"state": obs}
        actions, log_prob = self.sample(cond, noise)
        return tf.reduce_mean(alpha * log_prob - tf.reduce_mean(self.ensemble_params(cond, actions), axis=0))

    # ---------- updates ----------

    def draw_critic(self, rng: Rng, rows: Rows, settings: Settings, train_actor: bool) -> dict[str, Any]:
        b = int(settings["batch_size"])
        return {
            "offline_rows": rows.offline(b // 2),
            "rows": rows.online(b // 2),
            "pair": self.draw_pair(rng),
            "noise": rng.normal(self.noise_shape(b // 2 * 2), floatx()),
        }

    def update_critic(
        self, data: Any, draws: Draws, step: Any, settings: Settings, train_actor: bool
    ) -> dict[str, Array]:
        batch, own = mixed(data, draws), (draws["pair"], draws["noise"])
        loss = step("critic", lambda: self.loss_critic(batch, settings["gamma"], self.alpha, *own))
        self.update_target_critic(settings["target_ema_rate"])
        return {"loss_critic": loss}

    def draw(self, rng: Rng, rows: Rows, settings: Settings, train_actor: bool) -> dict[str, Any]:
        b = int(settings["batch_size"]) // 2 * 2
        return {
            "offline_rows": rows.last["offline"],
            "rows": rows.last["online"],
            "noise": rng.normal((2, *self.noise_shape(b)), floatx()),
        }

    def update(self, data: Any, draws: Draws, step: Any, settings: Settings, train_actor: bool) -> dict[str, Array]:
        obs, alpha, noise = mixed(data, draws).obs, self.alpha, draws["noise"]
        actor = step("actor", lambda: self.loss_actor(obs, alpha, noise[0]))
        return {"loss_actor": actor, "loss_temperature": self.step_temperature(obs, noise[1], step, settings)}
