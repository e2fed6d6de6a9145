"""FQL: flow Q-learning (Park et al. 2025, arXiv:2502.02538), on chunks too, which is Q-chunking (Li, Zhou and Levine
2025, arXiv:2507.07969).

    flow       v(x, t, o), by flow matching on the data's actions
    policy     mu(o, z): one step from noise z to an action, which minimises
                   alpha |mu(o, z) - (where the flow brings z)|^2 - mean_i Q_i(o, mu(o, z))
    critics    r + gamma (1 - terminated) Q'(o', mu(o', z)), Q' the mean of both targets, or the smaller

A chunk is one action: r is what it earned, o' what followed it, and gamma the discount of a whole chunk. Offline the
rows are the data's; online the replay buffer goes on from them. Shapes: B batch, H chunk, A action, O observation;
cond = {"state": [B,To,O]}; noise z [B,H,A].
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import tensorflow as tf

from diffusion_rl.core.errors import UserError
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
from diffusion_rl.policies.diffusion import Cond
from diffusion_rl.policies.flow import FlowPolicy, draw_times

TOGETHER = {"min": lambda q: tf.minimum(*q), "mean": lambda q: (q[0] + q[1]) / 2}  # of two values


class OneStepPolicy(FlowPolicy):
    """A policy that goes from noise to an action in one step of its network (`networks.flow.OneStepMLP`)."""

    SAMPLING: ClassVar[tuple[str, ...]] = ("inference_steps", "act_min", "act_max")

    def __init__(self, network: keras.layers.Layer, **kwargs: Any):
        super().__init__(network, **{**kwargs, "inference_steps": 1})


class FQL(OffPolicy, OneStepPolicy):
    """A one-step policy, the flow that it is distilled from, and two critics in one with their target.

    Args:
        actor: the one-step network, also known as `network`.
        flow: the flow's velocity.
        critic: (cond, actions) -> (q1 [B], q2 [B]).
        flow_steps: steps of Euler's method in which the flow brings noise to an action.
        alpha: weight of the distance to the flow.
        q_agg: how both target critics count: min or mean.
        normalize_q_loss: divide the values by their mean size.
        kwargs: of `FlowPolicy`.
    """

    KIND = "fql"
    LABEL = "FQL"
    TRAIN_KEYS = "actor critic n_explore_steps n_eval_episode target_ema_rate num_update train_online"
    ACTS_AS: ClassVar[type[FlowPolicy]] = OneStepPolicy
    DISTILS: ClassVar[bool] = True

    def __init__(
        self,
        actor: keras.layers.Layer,
        flow: keras.layers.Layer,
        critic: keras.layers.Layer,
        flow_steps: int = 10,
        alpha: float = 10.0,
        q_agg: str = "mean",
        normalize_q_loss: bool = False,
        **kwargs: Any,
    ):
        super().__init__(actor, **kwargs)
        if q_agg not in TOGETHER:
            raise UserError(f"model.q_agg={q_agg}: take one of {', '.join(TOGETHER)}")
        self.actor, self.flow = actor, flow
        self.critic, self.critic_target = critic, clone(critic)
        self.flow_steps, self.alpha = int(flow_steps), float(alpha)
        self.q_agg, self.normalize_q_loss = q_agg, bool(normalize_q_loss)
        sizes = (self.horizon_steps, self.obs_dim, self.action_dim, self.act_min, self.act_max)
        self._flow = FlowPolicy(flow, *sizes, inference_steps=self.flow_steps, time_grid="left")

    def take_weights(self, weights: Mapping[str, Any], load: Any) -> None:
        """Takes everything of an earlier training: critics and flow, too."""
        load(self, weights)

    # ---------- what the loop asks ----------

    def experience(self, settings: Settings) -> Experience:
        online = bool(settings["train_online"])
        return Experience(
            offline_fields=() if online else Experience().fields,
            starts_with_dataset=online,
            n_episodes=None if online else 0,
            counts_episodes=True,
            evaluates_at_once=True,
        )

    def parts(self, settings: Settings) -> dict[str, Part]:
        modules = {"actor": self.actor, "flow": self.flow, "critic": self.critic}
        prefixes = {"actor": "actor_", "flow": "actor_", "critic": "critic_"}
        return {name: Part(variables_of(m), prefixes[name], constant=True) for name, m in modules.items()}

    def phases(self, settings: Settings, progress: Progress) -> list[Phase]:
        """Plans so many updates in each iteration; online once `n_explore_steps` of them have collected."""
        waits = settings["train_online"] and progress.itr < settings["n_explore_steps"]
        return [] if waits else [Phase(int(settings["num_update"]))]

    # ---------- losses ----------

    def decided(self, cond: Cond, noise: Array) -> Array:
        """Returns the one-step policy's actions [B,H,A], not clipped, from noise [B,H,A]."""
        batch = tf.shape(noise)[0]
        return noise + self.actor(noise, tf.zeros([batch], noise.dtype), cond)  # a step of Euler's method

    def chosen(self, cond: Cond, noise: Array) -> Array:
        """Returns the actions [B,H,A] with which the critics' targets go on."""
        return tf.clip_by_value(self.decided(cond, noise), self.act_min, self.act_max)

    def carried(self, cond: Cond, noise: Array) -> Array:
        """Returns where the flow brings noise [B,H,A]; clipped at the end alone."""
        return self._flow.sample(cond, noise, clip_each=False).trajectories

    def next_value(self, next_obs: Array, noise: Array) -> Array:
        """Returns the value [B] of the actions chosen next; noise for `chosen`."""
        following = {"state": next_obs}
        return TOGETHER[self.q_agg](self.critic_target(following, self.chosen(following, noise)))

    def loss_critic(self, batch: Transitions, gamma: float, next_value: Array) -> Array:
        """Returns the mean over both critics and the batch of the squared Bellman error; next_value [B]."""
        return bellman_error(self.critic({"state": batch.obs}, batch.actions), batch, next_value, gamma) / 2

    def loss_flow(self, obs: Array, actions: Array, time: Array, noise: Array) -> Array:
        """Returns the flow-matching loss at times [B]; actions, noise [B,H,A]."""
        return self._flow.loss(actions, {"state": obs}, time, noise)

    def loss_actor(self, obs: Array, noise: Array) -> Array:
        """Returns the one-step policy's loss; noise [B,H,A]."""
        cond = {"state": obs}
        actions = self.decided(cond, noise)
        distance = tf.reduce_mean(tf.square(actions - tf.stop_gradient(self.carried(cond, noise))))
        values = TOGETHER["mean"](self.critic(cond, tf.clip_by_value(actions, self.act_min, self.act_max)))
        value = tf.reduce_mean(values)
        if self.normalize_q_loss:
            value /= tf.stop_gradient(tf.reduce_mean(tf.abs(values)))
        return self.alpha * distance - value

    # ---------- one update ----------

    def draw(self, rng: Rng, rows: Rows, settings: Settings, train_actor: bool) -> dict[str, Any]:
        b = int(settings["batch_size"])
        return {
            "rows": rows.online(b) if settings["train_online"] else rows.offline(b),
            "next_noise": rng.normal(self.candidates_shape(b), floatx()),
            "time": draw_times(rng, self.sample_t_type, (b,)),
            "noise": rng.normal((2, *self.noise_shape(b)), floatx()),
        }

    def candidates_shape(self, batch: int) -> tuple[int, ...]:
        """Returns the shape of the noise from which an action is chosen."""
        return self.noise_shape(batch)

    def update(self, data: Any, draws: Draws, step: Any, settings: Settings, train_actor: bool) -> dict[str, Array]:
        """Moves the critics' target towards them, then steps all three, everything by the weights from before."""
        batch = (data.online if settings["train_online"] else data.offline).at(draws["rows"])
        obs, gamma, noise = batch.obs, settings["gamma"], draws["noise"]
        next_value, losses = self.next_value(batch.next_obs, draws["next_noise"]), {}
        self.update_target_critic(settings["target_ema_rate"])
        if self.DISTILS:
            losses["loss_actor"] = step("actor", lambda: self.loss_actor(obs, noise[1]))
        losses["loss_flow"] = step("flow", lambda: self.loss_flow(obs, batch.actions, draws["time"], noise[0]))
        losses["loss_critic"] = step("critic", lambda: self.loss_critic(batch, gamma, next_value))
        return losses

    # ---------- acting ----------

    def draw_action(self, rng: Rng, batch: int, deterministic: bool, settings: Settings) -> dict[str, Any]:
        """Returns the draws that `act` takes, by name."""
        return {"noise": rng.normal(self.candidates_shape(batch), floatx())}

    def act(self, cond: Cond, draws: Draws, deterministic: bool, settings: Settings) -> Array:
        """Returns action chunks [B,H,A]; the policy explores by its noise, in evaluations too."""
        return self.chosen(cond, draws["noise"])


class BestOfFlow(FQL):
    """Q-chunking without a one-step policy: of N samples of the flow that which the critics value most.

    Args:
        flow: the velocity, also known as `actor`.
        n_candidates: N.
        further arguments: of `FQL`.
    """

    KIND = "qc"
    LABEL = "QC"
    EXPORTABLE = False  # it chooses among samples with its critics
    DISTILS: ClassVar[bool] = False

    def __init__(self, flow: keras.layers.Layer, n_candidates: int = 32, **kwargs: Any):
        if n_candidates < 1:
            raise UserError(f"model.n_candidates={n_candidates}: at least one sample is needed")
        super().__init__(actor=flow, flow=flow, **kwargs)
        self.n_candidates = int(n_candidates)

    def parts(self, settings: Settings) -> dict[str, Part]:
        return {name: part for name, part in super().parts(settings).items() if name != "actor"}

    def candidates_shape(self, batch: int) -> tuple[int, ...]:
        return (batch, self.n_candidates, self.horizon_steps, self.action_dim)

    def chosen(self, cond: Cond, noise: Array) -> Array:
        """Returns the best samples [B,H,A] from noise [B,N,H,A]."""
        n = self.n_candidates
        repeated = {name: tf.repeat(array, n, axis=0) for name, array in cond.items()}
        samples = self.carried(repeated, tf.reshape(noise, [-1, self.horizon_steps, self.action_dim]))
        values = tf.reshape(TOGETHER[self.q_agg](self.critic(repeated, samples)), [-1, n])
        samples = tf.reshape(samples, [-1, n, self.horizon_steps, self.action_dim])
        return tf.gather(samples, tf.argmax(values, axis=1), axis=1, batch_dims=1)
