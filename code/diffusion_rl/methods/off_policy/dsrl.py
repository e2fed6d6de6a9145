"""DSRL: steering a frozen policy by the noise that it begins with (Wagenmaker et al. 2025, arXiv:2506.15799).

A diffusion policy that samples with DDIM, or a flow, is a function a = f(o, w) of the observation and of the noise w.
SAC's policy pi(w | o) learns which noise is best; f never changes.

    DSRL-SAC   w is the action, and what is kept of it
               critics        r + gamma (1 - terminated) (min_i Q_i'(o', w') - alpha log pi(w' | o')),   w' ~ pi(. | o')
    DSRL-NA    many noises lead to one action (noise aliasing): values are learned of actions, and those of noise from
               them
               critics        r + gamma (1 - terminated) (min_i Q_i'(o', f(o', w')) - alpha log pi(w' | o'))
               noise critics  Q_i(o, f(o, w)),   w ~ N(0, I)
    both       actor          alpha log pi(w | o) - min_i Q_i(o, w), of the noise critics in DSRL-NA
               temperature    -log alpha (log pi(w | o) + target entropy)

The noise is bounded: w = b tanh(.), and critics of noise are given w / b. Shapes: B batch, E environments, H chunk, A
action, O observation; cond = {"state": [B,To,O]}.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import numpy as np
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
from diffusion_rl.policies.diffusion import Cond, DiffusionPolicy, Sample
from diffusion_rl.policies.flow import FlowPolicy, ShortcutFlowPolicy
from diffusion_rl.policies.gaussian import GaussianPolicy

SAMPLERS: dict[str, Any] = {"flow": FlowPolicy, "shortcut": ShortcutFlowPolicy, "diffusion": DiffusionPolicy}


class SteeredPolicy(FlowPolicy):
    """A frozen policy that begins with the noise which a network chooses.

    Args:
        network: of the frozen policy.
        noise_actor: cond -> (mean, std) [B,H*A] of the noise before it is squashed.
        horizon_steps, obs_dim, action_dim: H, O, A.
        sampler: how `network` samples: flow, shortcut, or diffusion (DDIM).
        sampling: arguments of that policy, `inference_steps` for one.
        noise_bound: b.
        network_path, device: accepted for configurations; the loops load weights.
    """

    SAMPLING: ClassVar[tuple[str, ...]] = ()

    def __init__(
        self,
        network: keras.layers.Layer,
        noise_actor: keras.layers.Layer,
        horizon_steps: int,
        obs_dim: int,
        action_dim: int,
        sampler: str = "flow",
        sampling: Mapping[str, Any] | None = None,
        noise_bound: float = 1.5,
        network_path: str | None = None,
        device: str | None = None,
    ):
        super().__init__(network, horizon_steps, obs_dim, action_dim)
        if sampler not in SAMPLERS:
            raise UserError(f"model.sampler={sampler}: take one of {', '.join(SAMPLERS)}")
        if hasattr(network, "encode"):
            raise UserError("DSRL steers policies that see states, not images")
        self._base = SAMPLERS[sampler](network, horizon_steps, obs_dim, action_dim, **dict(sampling or {}))
        if isinstance(self._base, DiffusionPolicy) and not self._base.use_ddim:
            raise UserError("model.sampling.use_ddim=true is needed: with DDPM plans have further noise")
        self.noise_actor, self.noise_bound = noise_actor, float(noise_bound)
        self._gaussian = GaussianPolicy(noise_actor, horizon_steps, tanh_output=True)
        self.steering = tf.Variable(0.0, trainable=False)  # 1 once `noise_actor` chooses; before that noise is normal

    @classmethod
    def from_description(cls, node: Mapping[str, Any], build: Callable[[Any], Any]) -> SteeredPolicy:
        """Builds the acting part of what the `model` node of a configuration describes; `build` makes its networks."""
        names = ("horizon_steps", "obs_dim", "action_dim", "sampler", "sampling", "noise_bound")
        networks = {name: build(node[name]) for name in ("network", "noise_actor")}
        return SteeredPolicy(**networks, **{name: node[name] for name in names if name in node})

    @property
    def denoising_steps(self) -> int | None:
        """Returns K of a diffusion policy."""
        return getattr(self._base, "denoising_steps", None)

    def take_weights(self, weights: Mapping[str, np.ndarray], load: Callable[[Any, Any], Any]) -> None:
        """Takes the frozen policy's weights of its own training, or everything of a steered one."""
        own = {k.removeprefix("noise_actor."): v for k, v in weights.items() if k.startswith("noise_actor.")}
        if own:
            load(self.noise_actor, own)
            self.steering.assign(weights["steering"])
        tuned = any(name.startswith("actor_ft.") for name in weights)
        if tuned and isinstance(self._base, DiffusionPolicy):
            raise UserError("a fine-tuned diffusion policy has two networks: steer the pre-trained one")
        start = "actor_ft.policy." if tuned else "network."
        load(self.network, {k.removeprefix(start): v for k, v in weights.items() if k.startswith(start)})

    def steered(self, cond: Cond, noise: Array) -> Array:
        """Returns the action chunks [B,H,A] that the frozen policy makes of noise [B,H,A]."""
        if isinstance(self._base, DiffusionPolicy):
            steps = self._base.sampling_steps
            noise = tf.concat([noise[None], tf.zeros([steps, *noise.shape], noise.dtype)], axis=0)
        return self._base.sample(cond, noise).trajectories

    def steer(self, cond: Cond, noise: Array, deterministic: bool = False) -> tuple[Array, Array]:
        """Chooses noise w [B,H,A] with standard normal `noise` [B,H*A]; returns it and the log-density [B] of w / b."""
        chosen, log_prob = self._gaussian.sample(cond, noise, deterministic)
        return self.noise_bound * chosen, log_prob

    def used(self, cond: Cond, noise: Array, deterministic: bool, within: bool = False) -> Array:
        """Returns the noise w [B,H,A] to begin with: the chosen one, drawn with `noise` [B,H,A], or while nothing has
        been learned `noise` itself; `within`: that too within the bound."""
        flat = tf.reshape(noise, [-1, self.horizon_steps * self.action_dim])
        plain = tf.clip_by_value(noise, -self.noise_bound, self.noise_bound) if within else noise
        return tf.where(self.steering > 0, self.steer(cond, flat, deterministic)[0], plain)

    def sample(self, cond: Cond, noise: Array, steps: int | None = None, clip_each: bool = True) -> Sample:
        """Decides as an evaluation does, with noise [B,H,A]; the last two arguments are not used."""
        return Sample(self.steered(cond, self.used(cond, noise, deterministic=True)))


class DSRL(OffPolicy, SteeredPolicy):
    """A steered policy, its critics and its temperature.

    Args:
        critic: (cond, actions [B,H,A]) -> (q1 [B], q2 [B]); of noise in DSRL-SAC.
        noise_aliased: DSRL-NA, with noise critics that begin as the critics do. They are trained in a phase of their
            own, which follows that of the critics and the actor in every iteration.
        backup_entropy: count the entropy of the next noise in the critics' target.
        further arguments: of `SteeredPolicy`. Chunks are executed whole (act_steps = horizon_steps).
    """

    KIND = "dsrl"
    LABEL = "DSRL"
    CRITICS = ("critic", "target_critic")
    TRAIN_KEYS = (
        "actor critic init_temperature target_entropy target_ema_rate n_explore_steps n_eval_episode num_update "
        "noise_critic_num_update"
    )
    ACTS_AS: ClassVar[type[FlowPolicy]] = SteeredPolicy

    def __init__(
        self, critic: keras.layers.Layer, noise_aliased: bool = True, backup_entropy: bool = True, **kwargs: Any
    ):
        super().__init__(**kwargs)
        self.critic, self.target_critic = critic, clone(critic)
        self.noise_aliased, self.backup_entropy = noise_aliased, backup_entropy
        if noise_aliased:
            self.noise_critic = clone(critic)

    # ---------- what the loop asks ----------

    def experience(self, settings: Settings) -> Experience:
        return Experience(counts_episodes=True, evaluates_at_once=True, stores_rest=not self.noise_aliased)

    def parts(self, settings: Settings) -> dict[str, Part]:
        self._log_alpha = tf.Variable(np.log(settings["init_temperature"]), dtype=tf.float64)
        modules = {"actor": self.noise_actor, "critic": self.critic}
        parts = {name: Part(variables_of(module), f"{name}_", constant=True) for name, module in modules.items()}
        if self.noise_aliased:
            parts["noise_critic"] = Part(variables_of(self.noise_critic), "critic_", constant=True)
        return parts | {"log_alpha": Part([self._log_alpha], "critic_", constant=True)}

    def phases(self, settings: Settings, progress: Progress) -> list[Phase]:
        """Plans so many updates in each iteration, once the frozen policy has acted for `n_explore_steps` of them."""
        self.steering.assign(float(progress.itr + 1 >= settings["n_explore_steps"]))
        if progress.itr < settings["n_explore_steps"]:
            return []
        phases = [Phase(int(settings["num_update"]))]
        if self.noise_aliased:
            n = int(settings["noise_critic_num_update"])
            phases.append(Phase(n, update="update_noise_critic", draw="draw_aliases"))
        return phases

    def watched(self) -> dict[str, float]:
        return {"log_alpha": float(self._log_alpha.numpy())}

    # ---------- losses ----------

    @property
    def alpha(self) -> Array:
        """Returns the temperature, a scalar in the precision of the weights."""
        return tf.cast(tf.exp(self._log_alpha), self.dtype)

    def valued(self, cond: Cond, noise: Array) -> Array:
        """Returns what critics value of noise w [B,H,A]: the actions that it leads to, or the noise itself as w / b."""
        return self.steered(cond, noise) if self.noise_aliased else self.scaled(noise)

    def scaled(self, noise: Array) -> Array:
        """Returns noise w [B,H,A] as w / b, which critics of noise are given."""
        return noise / self.noise_bound

    def loss_critic(self, batch: Transitions, gamma: float, alpha: Array | float, noise: Array) -> Array:
        """Returns half the sum of both critics' mean squared Bellman errors; noise [B,H*A]."""
        following = {"state": batch.next_obs}
        chosen, log_prob = self.steer(following, noise)
        value = tf.minimum(*self.target_critic(following, self.valued(following, chosen)))
        value -= alpha * log_prob if self.backup_entropy else 0.0
        return bellman_error(self.critic({"state": batch.obs}, batch.actions), batch, value, gamma) / 2

    def loss_noise_critic(self, obs: Array, noise: Array) -> Array:
        """Returns half the squared distance of the noise critics to the critics, summed over both; noise w [B,H,A]."""
        cond = {"state": obs}
        targets = self.critic(cond, self.steered(cond, noise))
        pairs = zip(self.noise_critic(cond, self.scaled(noise)), targets, strict=True)
        return tf.add_n([tf.reduce_mean(tf.square(q - tf.stop_gradient(target))) for q, target in pairs]) / 2

    def loss_actor(self, obs: Array, alpha: Array | float, noise: Array) -> Array:
        """Returns the mean of alpha log pi - min Q at reparametrised noise; noise [B,H*A]."""
        cond = {"state": obs}
        chosen, log_prob = self.steer(cond, noise)
        values = (self.noise_critic if self.noise_aliased else self.critic)(cond, self.scaled(chosen))
        return tf.reduce_mean(alpha * log_prob - tf.minimum(*values))

    def loss_temperature(self, obs: Array, target_entropy: float, noise: Array) -> Array:
        """Returns -mean(log alpha (log pi + target entropy)): alpha grows while the entropy is too small."""
        _, log_prob = self.steer({"state": obs}, noise)
        return -tf.reduce_mean(tf.cast(self._log_alpha, self.dtype) * tf.stop_gradient(log_prob + target_entropy))

    # ---------- one update ----------

    def draw(self, rng: Rng, rows: Rows, settings: Settings, train_actor: bool) -> dict[str, Any]:
        b, flat = int(settings["batch_size"]), self.horizon_steps * self.action_dim
        return {"rows": rows.online(b), "noise": rng.normal((2, b, flat), floatx())}

    def update(self, data: Any, draws: Draws, step: Any, settings: Settings, train_actor: bool) -> dict[str, Array]:
        """Steps temperature, critics and actor, each with the temperature from before, then the critics' target."""
        batch, alpha, (following, noise) = data.online.at(draws["rows"]), self.alpha, tf.unstack(draws["noise"])
        gamma, target = settings["gamma"], float(settings["target_entropy"])
        losses = {"loss_temperature": step("log_alpha", lambda: self.loss_temperature(batch.obs, target, noise))}
        losses["loss_critic"] = step("critic", lambda: self.loss_critic(batch, gamma, alpha, following))
        losses["loss_actor"] = step("actor", lambda: self.loss_actor(batch.obs, alpha, noise))
        self.update_target_critic(settings["target_ema_rate"])
        return losses

    def draw_aliases(self, rng: Rng, rows: Rows, settings: Settings, train_actor: bool) -> dict[str, Any]:
        """Draws what an update of the noise critics takes: rows and noise w [B,H,A]."""
        b = int(settings["batch_size"])
        return {"rows": rows.online(b), "aliases": rng.normal(self.noise_shape(b), floatx())}

    def update_noise_critic(
        self, data: Any, draws: Draws, step: Any, settings: Settings, train_actor: bool
    ) -> dict[str, Array]:
        """Steps the noise critics towards the critics; arguments of `update`."""
        obs, aliases = data.online.at(draws["rows"]).obs, draws["aliases"]
        return {"loss_noise_critic": step("noise_critic", lambda: self.loss_noise_critic(obs, aliases))}

    # ---------- acting ----------

    def draw_action(self, rng: Rng, batch: int, deterministic: bool, settings: Settings) -> dict[str, Any]:
        """Returns the draws that `act` takes, by name."""
        return {"noise": rng.normal(self.noise_shape(batch), floatx())}

    def act(self, cond: Cond, draws: Draws, deterministic: bool, settings: Settings) -> Array:
        """Returns action chunks [E,H,A]; exploring in DSRL-SAC with the noise w / b behind them, [E,2H,A]."""
        both = not deterministic and not self.noise_aliased
        used = self.used(cond, draws["noise"], deterministic, within=both)
        actions = self.steered(cond, used)
        return tf.concat([actions, used / self.noise_bound], axis=1) if both else actions
