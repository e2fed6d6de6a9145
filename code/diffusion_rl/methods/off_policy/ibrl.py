"""IBRL: imitation-bootstrapped reinforcement learning (Hu et al. 2024, arXiv:2311.02198).

A frozen imitation policy proposes an action beside the trained policy's, for acting and for bootstrapping alike:

    eq. 2   act with      argmax over {a_IL, a_RL} of the value (or softly, in proportion to exp(exp(beta Q)))
    eq. 3   critics       r + gamma (1 - terminated) max over {a'_IL, a'_RL} of min over two random target critics
            actor         min over critics of Q_m(o, a)

Shapes: B batch, H chunk, A action, M critics. Noise is standard normal; W is the width of dropout's masks. As in the
reference all Gaussian networks drop out while training, when collecting too, and none in an evaluation.
"""

from __future__ import annotations

from typing import Any

import tensorflow as tf

from diffusion_rl.core.keras import floatx, keras
from diffusion_rl.core.transitions import Transitions
from diffusion_rl.core.typing import Rng
from diffusion_rl.methods.off_policy.algorithm import Experience, OffPolicy, Part, Phase, Progress, Settings, follow
from diffusion_rl.methods.off_policy.buffers import Draws, Rows
from diffusion_rl.methods.off_policy.rlpd import EnsembleCritics
from diffusion_rl.networks.layers import Array, clone, variables_of
from diffusion_rl.networks.mlp import draw_masks, split_masks
from diffusion_rl.policies.diffusion import Cond
from diffusion_rl.policies.exploring import ExploringGaussianPolicy

LARGEST_EXPONENT = 80.0  # of which float32 holds the exponential


class IBRL(EnsembleCritics, OffPolicy, ExploringGaussianPolicy):
    """A Gaussian policy, its target, the imitation policy it began as, and an ensemble of critics.

    Args:
        actor: network cond -> (mean, std) [B,H*A].
        critic: network (cond, actions) -> q [B] (`double_q: false`), of which there will be `n_critics`.
        soft_action_sample, soft_action_sample_beta: explore by a random choice between the two proposals.
        further arguments: as in `GaussianPolicy`.
    """

    KIND = "ibrl"
    LABEL = "IBRL"
    TRAIN_KEYS = "actor critic target_ema_rate n_explore_steps n_eval_episode critic_num_update update_freq"
    EXPORTABLE = False  # it chooses among proposals with its critics

    def __init__(
        self,
        actor: keras.layers.Layer,
        critic: keras.layers.Layer,
        n_critics: int,
        horizon_steps: int,
        soft_action_sample: bool = False,
        soft_action_sample_beta: float = 10,
        **kwargs: Any,
    ):
        super().__init__(actor, horizon_steps, **kwargs)
        self.soft_action_sample, self.soft_action_sample_beta = soft_action_sample, soft_action_sample_beta
        self.target_actor, self.bc_policy = clone(actor), clone(actor)
        self.init_critics(critic, n_critics)

    @property
    def copies(self) -> list[keras.layers.Layer]:
        """Returns the networks that start as the pre-trained one."""
        return [self.target_actor, self.bc_policy]

    def experience(self, settings: Settings) -> Experience:
        return Experience(starts_with_dataset=True, counts_episodes=True)

    def parts(self, settings: Settings) -> dict[str, Part]:
        critics = variables_of(self.ensemble_params)
        return {"actor": Part(self.trainable(), "actor_"), "critic": Part(critics, "critic_")}

    def phases(self, settings: Settings, progress: Progress) -> list[Phase]:
        """Plans in every so many iterations the critics' updates, then the actor's on the last of their batches."""
        if progress.itr <= settings["n_explore_steps"] or progress.itr % settings["update_freq"]:
            return []
        critics = Phase(settings["critic_num_update"], True, "update_critic", "draw_critic")
        return [critics, Phase(1, True)]

    # ---------- losses ----------

    def proposals(
        self, cond: Cond, network: keras.layers.Layer, noise: Array, deterministic: bool, keep: Array | None = None
    ) -> list[Array]:
        """Samples actions [B,H,A] of the imitation policy and of `network`. noise [2,B,H*A], keep [2,B,W]."""
        masks = [split_masks(network, None if keep is None else keep[i]) for i in range(2)]
        imitated, _ = self.sample(cond, noise[0], True, self.bc_policy, masks[0])
        learned, _ = self.sample(cond, noise[1], deterministic, network, masks[1])
        return [imitated, learned]

    def loss_critic(
        self, batch: Transitions, gamma: float, pair: Array, noise: Array, keep: Array | None = None
    ) -> Array:
        """Returns all critics' Bellman error. pair [2]: the target critics that count; noise, keep: of `proposals`."""
        following = {"state": batch.next_obs}
        actions = self.proposals(following, self.target_actor, noise, deterministic=False, keep=keep)
        values = [self.smaller(self.target_networks, following, chunk, pair) for chunk in actions]
        return self.ensemble_error(batch, tf.maximum(*values), gamma)

    def loss_actor(self, obs: Array, noise: Array, keep: Array | None = None) -> Array:
        """Returns minus the smallest value of the policy's own reparametrised actions. noise [B,H*A], keep [B,W]."""
        actions, _ = self.sample({"state": obs}, noise, keep_masks=split_masks(self.network, keep))
        return -tf.reduce_mean(tf.reduce_min(self.ensemble_params({"state": obs}, actions), axis=0))

    def update_target_actor(self, tau: float) -> None:
        follow(self.target_actor, self.network, tau)

    # ---------- updates ----------

    def draw_critic(self, rng: Rng, rows: Rows, settings: Settings, train_actor: bool) -> dict[str, Any]:
        b = int(settings["batch_size"])
        return {
            "rows": rows.online(b),
            "pair": self.draw_pair(rng),
            "noise": rng.normal((2, *self.noise_shape(b)), floatx()),
            "keep": draw_masks(self.network, rng, (2, b)),
        }

    def update_critic(
        self, data: Any, draws: Draws, step: Any, settings: Settings, train_actor: bool
    ) -> dict[str, Array]:
        batch = data.online.at(draws["rows"])
        own = [draws[name] for name in ("pair", "noise", "keep")]
        loss = step("critic", lambda: self.loss_critic(batch, settings["gamma"], *own))
        self.update_target_critic(settings["target_ema_rate"])
        return {"loss_critic": loss}

    def draw(self, rng: Rng, rows: Rows, settings: Settings, train_actor: bool) -> dict[str, Any]:
        b = int(settings["batch_size"])
        return {
            "rows": rows.last["online"],
            "noise": rng.normal(self.noise_shape(b), floatx()),
            "keep": draw_masks(self.network, rng, (b,)),
        }

    def update(self, data: Any, draws: Draws, step: Any, settings: Settings, train_actor: bool) -> dict[str, Array]:
        obs = data.online.at(draws["rows"]).obs
        loss = step("actor", lambda: self.loss_actor(obs, draws["noise"], draws["keep"]))
        self.update_target_actor(settings["target_ema_rate"])
        return {"loss_actor": loss}

    # ---------- acting ----------

    def draw_action(self, rng: Rng, batch: int, deterministic: bool, settings: Settings) -> dict[str, Any]:
        draws = {"pair": self.draw_pair(rng), "noise": rng.normal((2, *self.noise_shape(batch)), floatx())}
        return draws if deterministic else draws | {"keep": draw_masks(self.network, rng, (2, batch))}

    def act(self, cond: Cond, draws: Draws, deterministic: bool, settings: Settings) -> Any:
        return self.choices(cond, draws["pair"], draws["noise"], deterministic, draws.get("keep"))

    def choices(
        self, cond: Cond, pair: Array, noise: Array, deterministic: bool = False, keep: Array | None = None
    ) -> Any:
        """Returns the better proposal [B,H,A]; or, exploring softly, both [B,2,H,A] with their weights [B,2].

        The critics asked are, as in the reference, those that are never trained (quirk 49).

        Args:
            pair: [2] which critics;  noise: [2,B,H*A];  keep: [2,B,W].
        """
        actions = self.proposals(cond, self.network, noise, deterministic, keep)
        imitated, learned = (self.smaller(self.critic_networks, cond, chunk, pair) for chunk in actions)
        if deterministic or not self.soft_action_sample:
            return tf.where((imitated > learned)[:, None, None], *actions)
        beta = self.soft_action_sample_beta  # softmax of exp(beta Q), where exp(beta Q) may be too large
        scale = tf.exp(tf.minimum(beta * learned, LARGEST_EXPONENT))
        ahead = scale * tf.math.expm1(tf.minimum(beta * (imitated - learned), LARGEST_EXPONENT))
        return tf.stack(actions, axis=1), tf.stack([tf.sigmoid(ahead), tf.sigmoid(-ahead)], axis=1)
