"""Cal-QL: calibrated conservative Q-learning, offline and then online (Nakamoto et al. 2023, arXiv:2303.05479).

    eq. 3.1   critics   Bellman error + weight * (log sum_a exp Q_cal(o, a) - Q(o, a of the data))
    eq. 5.1   Q_cal     max(Q, return of the data) at the policy's actions, Q at random ones, each less its log-density
              actor and temperature as in SAC

As in the PyTorch reference the densities of the policy's actions, [B], meet its values, [B,1], so that each row has one
entry for every row of the batch; the density of random actions enters as it is, not as its logarithm; and the target
takes the best of several next actions, without entropy. Shapes as in `methods.off_policy.sac`; N actions.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import tensorflow as tf

from diffusion_rl.core.keras import floatx, keras
from diffusion_rl.core.transitions import Transitions
from diffusion_rl.core.typing import Rng
from diffusion_rl.diffusion.gaussian import normal_log_prob
from diffusion_rl.methods.off_policy.algorithm import Experience, Part, Phase, Progress, Settings, mixed
from diffusion_rl.methods.off_policy.buffers import Draws, Rows
from diffusion_rl.methods.off_policy.sac import SoftActorCritic
from diffusion_rl.networks.layers import Array, variables_of
from diffusion_rl.policies.diffusion import Cond

FIELDS = ("obs", "actions", "next_obs", "rewards", "terminated", "returns")


class CriticDraws(NamedTuple):
    """random_actions [B,N,H,A] in [-1,1]; next_noise [B*n_actions,H*A]; noise [2,B,H*A], for o and for o'."""

    random_actions: Array
    next_noise: Array
    noise: Array


class CalQL(SoftActorCritic):
    """A Gaussian policy with double critics and a temperature.

    Args:
        actor, critic, horizon_steps: as in `SoftActorCritic`, like what is not listed here.
        cql_clip_diff_min, cql_clip_diff_max: bounds of the conservative term.
        cql_min_q_weight: its weight.
        cql_n_actions: next actions of which the target takes the best.
    """

    KIND = "calql"
    LABEL = "Cal-QL"
    TRAIN_KEYS = (
        "actor critic init_temperature target_entropy target_ema_rate n_explore_steps n_eval_episode "
        "automatic_entropy_tuning n_episode_per_epoch n_random_actions num_update train_online"
    )
    CONTINUES = True  # online training starts from offline training's critics too

    def __init__(
        self,
        actor: keras.layers.Layer,
        critic: keras.layers.Layer,
        horizon_steps: int,
        cql_clip_diff_min: float = -math.inf,
        cql_clip_diff_max: float = math.inf,
        cql_min_q_weight: float = 5.0,
        cql_n_actions: int = 10,
        **kwargs: Any,
    ):
        super().__init__(actor, critic, horizon_steps, **kwargs)
        self.clip_diff, self.cql_min_q_weight = (cql_clip_diff_min, cql_clip_diff_max), cql_min_q_weight
        self.cql_n_actions = cql_n_actions

    def experience(self, settings: Settings) -> Experience:
        n_episodes = int(settings["n_episode_per_epoch"]) if settings["train_online"] else 0
        return Experience(
            fields=FIELDS,
            offline_fields=FIELDS,
            n_episodes=n_episodes,
            counts_episodes=True,
            explores=True,
            evaluates_at_once=True,
        )

    def parts(self, settings: Settings) -> dict[str, Part]:
        return {
            "actor": Part(self.trainable(), "actor_"),
            "critic": Part(variables_of(self.critic), "critic_"),
            "log_alpha": self.temperature(settings),
        }

    def phases(self, settings: Settings, progress: Progress) -> list[Phase]:
        """Plans offline a given number of updates, online one for each step of the episode just collected."""
        if progress.itr < settings["n_explore_steps"]:
            return []
        return [Phase(progress.first_episode if settings["train_online"] else settings["num_update"])]

    # ---------- losses ----------

    def loss_critic(self, batch: Transitions, gamma: float, draws: CriticDraws) -> Array:
        """Returns Bellman error and conservative term of both critics, a scalar."""
        q_data = self.critic({"state": batch.obs}, batch.actions)
        target = tf.stop_gradient(
            batch.rewards + gamma * (1.0 - batch.terminated) * self.best_next(batch.next_obs, draws.next_noise)
        )
        losses = []
        for q, out_of_data in zip(q_data, self.out_of_data(batch, draws), strict=True):
            gap = tf.clip_by_value(out_of_data - q, *(tf.constant(bound, q.dtype) for bound in self.clip_diff))
            losses += [tf.reduce_mean(tf.square(q - target)), self.cql_min_q_weight * tf.reduce_mean(gap)]
        return tf.add_n(losses)

    def best_next(self, next_obs: Array, noise: Array) -> Array:
        """Returns [B] the largest of `cql_n_actions` next actions' smaller target value."""
        n = self.cql_n_actions
        mean, std = self.mean_std({"state": next_obs})
        actions, _ = self.sample_of(tf.repeat(mean, n, axis=0), tf.repeat(std, n, axis=0), noise)
        q = tf.minimum(*self.target_critic({"state": tf.repeat(next_obs, n, axis=0)}, actions))
        return tf.reduce_max(tf.reshape(q, [-1, n]), axis=1)

    def out_of_data(self, batch: Transitions, draws: CriticDraws) -> list[Array]:
        """Returns a critic's log sum exp [B] over N random actions and, calibrated, policy actions at o and at o'."""
        (b, n), chunk = draws.random_actions.shape[:2], draws.random_actions.shape[2:]
        observations = [tf.repeat(batch.obs, n, axis=0), batch.obs, batch.next_obs]
        drawn = [
            self.drawn({"state": obs}, noise)
            for obs, noise in zip(observations[1:], tf.unstack(draws.noise), strict=True)
        ]
        actions = [tf.reshape(draws.random_actions, [-1, *chunk]), *(chunks for chunks, _ in drawn)]
        both = self.critic({"state": tf.concat(observations, axis=0)}, tf.concat(actions, axis=0))
        entries = []
        for random, *policy in (tf.split(q, [b * n, b, b]) for q in both):
            values = [tf.reshape(random, [-1, n]) - 0.5 ** (chunk[0] * chunk[1])]
            for q, (_, log_prob) in zip(policy, drawn, strict=True):
                values.append(tf.maximum(q, batch.returns)[:, None] - log_prob)  # [B,1] - [B], quirk 44
            entries.append(values)
        return [tf.reduce_logsumexp(tf.concat(values, axis=1), axis=1) for values in entries]

    def drawn(self, cond: Cond, noise: Array) -> tuple[Array, Array]:
        """Samples actions [B,H,A] without a gradient (but where the noise was clipped), their log-density [B]
        with one.

        So it is in the reference. Nothing comes of it there either: only the critics are trained on this loss.
        """
        mean, std = self.mean_std(cond)
        x = mean + std * tf.clip_by_value(noise, -self.randn_clip_value, self.randn_clip_value)
        x = tf.where(tf.abs(noise) > self.randn_clip_value, x, tf.stop_gradient(x))
        log_prob = normal_log_prob(x, mean, std)
        if self.tanh_output:
            x = tf.tanh(x)
            log_prob -= tf.math.log(1.0 - tf.square(x) + 1e-6)
        return tf.reshape(x, [-1, self.horizon_steps, self.network.action_dim]), tf.reduce_sum(log_prob, axis=-1)

    # ---------- one update ----------

    def draw(self, rng: Rng, rows: Rows, settings: Settings, train_actor: bool) -> dict[str, Any]:
        b, online = int(settings["batch_size"]), bool(settings["train_online"])
        draws = {"offline_rows": rows.offline(b // 2 if online else b)}
        if online:
            draws["rows"], b = rows.online(b // 2), b // 2 * 2
        shape = (b, int(settings["n_random_actions"]), self.horizon_steps, self.network.action_dim)
        draws |= {
            "random_actions": rng.uniform(shape, -1.0, 1.0, floatx()),
            "next_noise": rng.normal(self.noise_shape(b * self.cql_n_actions), floatx()),
            "noise": rng.normal((2, *self.noise_shape(b)), floatx()),
            "actor_noise": rng.normal(self.noise_shape(b), floatx()),
        }
        if settings["automatic_entropy_tuning"]:
            draws["temperature_noise"] = rng.normal(self.noise_shape(b), floatx())
        return draws

    def update(self, data: Any, draws: Draws, step: Any, settings: Settings, train_actor: bool) -> dict[str, Array]:
        batch = mixed(data, draws) if settings["train_online"] else data.offline.at(draws["offline_rows"])
        own, alpha = CriticDraws(*(draws[name] for name in CriticDraws._fields)), self.alpha
        losses = {"loss_critic": step("critic", lambda: self.loss_critic(batch, settings["gamma"], own))}
        self.update_target_critic(settings["target_ema_rate"])
        losses["loss_actor"] = step("actor", lambda: self.loss_actor(batch.obs, alpha, draws["actor_noise"]))
        if settings["automatic_entropy_tuning"]:
            losses["loss_temperature"] = self.step_temperature(batch.obs, draws["temperature_noise"], step, settings)
        return losses
