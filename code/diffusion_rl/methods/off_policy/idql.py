"""IDQL: implicit Q-learning with a diffusion policy (Hansen-Estruch et al. 2023, arXiv:2304.10573).

    eq. 4   V regresses on the target critics' minimum with the expectile loss |tau - 1(u < 0)| u^2,  u = Q' - V
    eq. 5   the critics regress on r + gamma V(o')
            the actor imitates all actions; it acts by choosing among its samples with the critics
    alg. 2  exploring: a sample in proportion to |tau - 1(A < 0)|, A its advantage;  evaluating: the best

Shapes: B batch, N samples for one decision, K denoising steps, H chunk, A action.
"""

from __future__ import annotations

from typing import Any

import tensorflow as tf

from diffusion_rl.core.keras import floatx, keras
from diffusion_rl.core.transitions import Transitions
from diffusion_rl.core.typing import Rng
from diffusion_rl.methods.off_policy.algorithm import Experience, OffPolicy, Part, Settings, bellman_error
from diffusion_rl.methods.off_policy.buffers import Draws, Rows
from diffusion_rl.networks.layers import Array, clone, variables_of
from diffusion_rl.policies.diffusion import Cond
from diffusion_rl.policies.exploring import ExploringDiffusionPolicy

EXPECTILE = 0.8  # of the value loss
EXPLORATION = 0.7  # of the choice among samples


def expectile_weight(u: Array, expectile: float) -> Array:
    """Returns the expectile where u > 0, else 1 - expectile, [...] as u."""
    return tf.where(u > 0, tf.constant(expectile, u.dtype), tf.constant(1 - expectile, u.dtype))


def expectile_loss(u: Array, expectile: float = EXPECTILE) -> Array:
    """Returns the asymmetric squared error, elementwise, [...] as u."""
    return expectile_weight(u, expectile) * tf.square(u)


class IDQL(OffPolicy, ExploringDiffusionPolicy):
    """A diffusion policy with action values, their target, and a state value.

    Args:
        actor: (x [B,H,A], t [B], cond) -> noise [B,H,A].
        critic_q: (cond, actions) -> (q1 [B], q2 [B]).
        critic_v: cond -> [B,1].
        further arguments: see `ExploringDiffusionPolicy`.
    """

    KIND = "idql"
    LABEL = "IDQL"
    CRITICS = ("critic_q", "target_q")
    TRAIN_KEYS = (
        "actor critic n_critic_warmup_itr max_grad_norm replay_ratio critic_tau eval_sample_num "
        "eval_deterministic use_expectile_exploration"
    )
    EXPORTABLE = False  # it chooses among samples with its critics

    def __init__(
        self, actor: keras.layers.Layer, critic_q: keras.layers.Layer, critic_v: keras.layers.Layer, **kwargs: Any
    ):
        super().__init__(actor=actor, **kwargs)
        self.critic_q, self.target_q, self.critic_v = critic_q, clone(critic_q), critic_v

    def experience(self, settings: Settings) -> Experience:
        return Experience(counts_steps=True, acts_on_last=True)

    def parts(self, settings: Settings) -> dict[str, Part]:
        return {
            "actor": Part(variables_of(self.actor), "actor_"),
            "critic_q": Part(variables_of(self.critic_q), "critic_"),
            "critic_v": Part(variables_of(self.critic_v), "critic_"),
        }

    # ---------- losses ----------

    def value(self, cond: Cond) -> Array:
        """Returns V(o) [B]."""
        return tf.reshape(self.critic_v(cond), [-1])

    def compute_advantages(self, cond: Cond, actions: Array) -> Array:
        """Returns min_i Q_i'(o, a) - V(o) [B]; a gradient flows through V only."""
        return tf.stop_gradient(tf.minimum(*self.target_q(cond, actions))) - self.value(cond)

    def loss_critic_v(self, batch: Transitions) -> Array:
        """Returns the mean expectile loss of the advantages, a scalar."""
        return tf.reduce_mean(expectile_loss(self.compute_advantages({"state": batch.obs}, batch.actions)))

    def loss_critic_q(self, batch: Transitions, gamma: float) -> Array:
        """Returns the Bellman error of both critics with the state value, a scalar."""
        q = self.critic_q({"state": batch.obs}, batch.actions)
        return bellman_error(q, batch, self.value({"state": batch.next_obs}), gamma)

    # ---------- one update ----------

    def draw(self, rng: Rng, rows: Rows, settings: Settings, train_actor: bool) -> dict[str, Any]:
        b = int(settings["batch_size"])
        return {
            "rows": rows.online(b),
            "t": rng.integers(0, self.denoising_steps, (b,)),
            "noise": rng.normal((b, self.horizon_steps, self.action_dim), floatx()),
        }

    def update(self, data: Any, draws: Draws, step: Any, settings: Settings, train_actor: bool) -> dict[str, Array]:
        batch = data.online.at(draws["rows"])
        v = step("critic_v", self.loss_critic_v, rows=[batch])
        q = step("critic_q", lambda batch: self.loss_critic_q(batch, settings["gamma"]), rows=[batch])
        self.update_target_critic(settings["critic_tau"])
        actor = step(
            "actor",
            lambda actions, obs, t, noise: self.loss(actions, {"state": obs}, t, noise),
            settings.get("max_grad_norm"),
            apply=train_actor,
            rows=[batch.actions, batch.obs, draws["t"], draws["noise"]],
        )
        return {"loss_critic_v": v, "loss_critic_q": q, "loss_actor": actor}

    # ---------- acting ----------

    def draw_action(self, rng: Rng, batch: int, deterministic: bool, settings: Settings) -> dict[str, Any]:
        return {"noise": rng.normal(self.noise_shape(settings["eval_sample_num"] * batch), floatx())}

    def act(self, cond: Cond, draws: Draws, deterministic: bool, settings: Settings) -> Any:
        return self.choices(
            cond,
            draws["noise"],
            deterministic and bool(settings.get("eval_deterministic", False)),
            settings["eval_sample_num"],
            settings["use_expectile_exploration"],
        )

    def choices(
        self,
        cond: Cond,
        noise: Array,
        deterministic: bool = False,
        num_sample: int = 10,
        use_expectile_exploration: bool = True,
        critic_hyperparam: float = EXPLORATION,
    ) -> Any:
        """Returns the best sample [B,H,A]; or, exploring by expectiles, all [B,N,H,A] with their weights [B,N].

        noise [K+1,N*B,H,A], the samples of one number together.
        """
        n = int(num_sample)
        cond = {"state": tf.tile(cond["state"], [n, 1, 1])}
        samples = self.sample(cond, noise, deterministic)
        q = tf.minimum(*self.target_q(cond, samples))
        candidates = tf.einsum("nbha->bnha", tf.reshape(samples, [n, -1, *samples.shape[1:]]))
        if deterministic or not use_expectile_exploration:
            return tf.gather(candidates, tf.argmax(tf.reshape(q, [n, -1]), axis=0), batch_dims=1)
        weights = expectile_weight(q - self.value(cond), critic_hyperparam)
        return candidates, tf.transpose(tf.reshape(weights, [n, -1]))
