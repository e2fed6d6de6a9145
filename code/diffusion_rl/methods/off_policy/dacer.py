"""DACER: diffusion actor-critic with entropy regulator (Wang et al. 2024, arXiv:2405.15177).

    action       a = clip(denoise(o) + alpha * 0.15 * e, -1, 1),   e standard normal; without e when evaluating
    critics      Gaussians N(m_i, s_i) over returns, two of them (DSAC-T, Duan et al. 2023, arXiv:2310.05858):
                   y   = r + gamma (1 - terminated) m'            m', s' of the target critic with the smaller mean
                   y_z = r + gamma (1 - terminated) (m' + s' z)   z standard normal within 3
                   L_i = -(w_i^2 + 0.1) mean[ m_i (y - m_i) / (s_i^2 + 0.1)
                                            + s_i ((m_i - y_b)^2 - s_i^2) / (s_i^3 + 0.1) ]
                 with gradients through the leading m_i and s_i only, w_i the running mean of s_i and
                 y_b = m_i + clip(y_z - m_i, -3 w_i, 3 w_i)
    actor        maximises min_i m_i(o, a) through the whole denoising chain, once for two steps of the critics
    temperature  d log alpha = Adam on H - Hbar every 10000 steps of the critics, H the entropy of mixtures of Gaussians
                 fitted to many actions of each of some states

Here an action is a chunk and the chain may have been pre-trained. Against the earlier TensorFlow port of DPPO, whose
configurations these are: the backup takes the target critics (there the trained ones), the loss takes the same
positive deviations as everything else (there the network's raw output), rewards are scaled once (there by 0.01 and
again by 0.2), and log alpha has the published learning rate. Shapes: B batch, K denoising steps, H chunk, A action.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import tensorflow as tf

from diffusion_rl.core.keras import floatx, keras
from diffusion_rl.core.transitions import Transitions
from diffusion_rl.core.typing import Rng
from diffusion_rl.methods.off_policy.algorithm import Experience, OffPolicy, Part, Phase, Progress, Settings
from diffusion_rl.methods.off_policy.buffers import Draws, Rows
from diffusion_rl.networks.layers import Array, clone
from diffusion_rl.policies.diffusion import Cond
from diffusion_rl.policies.entropy import mixture_entropy
from diffusion_rl.policies.exploring import ExploringDiffusionPolicy

CRITIC_STEPS = 2  # of an update, before the actor's step and the targets'
FLOOR = 0.1  # added to powers of deviations in the critics' loss
BOUND = 3.0  # deviations within which returns are drawn and backed up


def distributional_loss(mean: Array, std: Array, target: Array, drawn: Array, scale: Array) -> Array:
    """Returns L_1 + L_2. mean, std [2,B]; y = target [B], y_z = drawn [B], w = scale [2], none with a gradient."""
    bound = BOUND * scale[:, None]
    m, s = tf.stop_gradient(mean), tf.stop_gradient(std)
    bounded = m + tf.clip_by_value(drawn - m, -bound, bound)
    by_mean = mean * (target - m) / (tf.square(s) + FLOOR)
    by_std = std * (tf.square(m - bounded) - tf.square(s)) / (s**3 + FLOOR)
    return -tf.reduce_sum((tf.square(scale) + FLOOR) * tf.reduce_mean(by_mean + by_std, axis=-1))


class DACER(OffPolicy, ExploringDiffusionPolicy):
    """A diffusion policy with noise of a learned size, two distributional critics in one, and their target.

    Args:
        actor: (x [B,H,A], t [B], cond) -> noise [B,H,A].
        critic: (cond, actions) -> (mean [2,B], std [2,B]).
        exploration_scale: factor on alpha.
        further arguments: see `ExploringDiffusionPolicy`; `min_sampling_denoising_std` has no effect.
    """

    KIND = "dacer"
    SIDE_BY_SIDE = False  # small batches: one program of XLA
    LABEL = "DACER"
    TRAIN_KEYS = (
        "actor critic n_critic_warmup_itr max_grad_norm replay_ratio target_ema_rate init_temperature "
        "target_entropy temperature_lr temperature_interval entropy_states entropy_samples"
    )
    _log_alpha: tf.Variable

    def __init__(
        self, actor: keras.layers.Layer, critic: keras.layers.Layer, exploration_scale: float = 0.15, **kwargs: Any
    ):
        super().__init__(actor=actor, **kwargs)
        self.critic, self.critic_target = critic, clone(critic)
        self.exploration_scale = float(exploration_scale)
        self.std_scale = tf.Variable(-tf.ones([2], self.dtype))  # w; negative: none yet
        self.n_updates = tf.Variable(np.zeros(1, np.int64))

    def experience(self, settings: Settings) -> Experience:
        return Experience(counts_steps=True)

    def parts(self, settings: Settings) -> dict[str, Part]:
        self._log_alpha = tf.Variable(np.log(settings["init_temperature"]), dtype=tf.float64)
        return super().parts(settings) | {"log_alpha": Part([self._log_alpha], "temperature_", constant=True)}

    def phases(self, settings: Settings, progress: Progress) -> list[Phase]:
        """Plans steps of critics that draw a new transition `replay_ratio` times, the temperature's among them."""
        n = int(progress.transitions / settings["batch_size"] * settings["replay_ratio"]) // CRITIC_STEPS
        if progress.itr < settings["n_critic_warmup_itr"]:
            return [Phase(n, False)]
        interval = max(1, int(settings["temperature_interval"]) // CRITIC_STEPS)
        phases, since = [], int(self.n_updates.numpy()[0]) % interval
        while n > 0:
            now = min(n, interval - since)
            phases.append(Phase(now))
            n, since = n - now, since + now
            if since == interval:
                phases.append(Phase(1, True, "update_temperature", "draw_temperature"))
                since = 0
        return phases

    def watched(self) -> dict[str, float]:
        return {"log_alpha": float(self._log_alpha.numpy())}

    # ---------- acting ----------

    def explored(self, cond: Cond, noise: Array, exploration: Array) -> Array:
        """Samples chunks [B,H,A] with noise of the learned size; noise [K+1,B,H,A], exploration [B,H,A] normal."""
        size = tf.cast(tf.exp(tf.stop_gradient(self._log_alpha)), self.dtype) * self.exploration_scale
        actions = self.sample(cond, noise, deterministic=True)
        return tf.clip_by_value(actions + size * tf.cast(exploration, self.dtype), -1.0, 1.0)

    def _action_draws(self, rng: Rng, batch: int, times: tuple[int, ...] = ()) -> tuple[np.ndarray, np.ndarray]:
        """Draws what `explored` takes, so many times."""
        chain = rng.normal((*times, *self.noise_shape(batch)), floatx())
        return chain, rng.normal((*times, batch, self.horizon_steps, self.action_dim), floatx())

    def draw_action(self, rng: Rng, batch: int, deterministic: bool, settings: Settings) -> dict[str, Any]:
        return dict(zip(("noise", "exploration"), self._action_draws(rng, batch), strict=True))

    def act(self, cond: Cond, draws: Draws, deterministic: bool, settings: Settings) -> Any:
        if deterministic:
            return self.sample(cond, draws["noise"], deterministic=True)
        return self.explored(cond, draws["noise"], draws["exploration"])

    # ---------- losses ----------

    def targets(
        self, batch: Transitions, gamma: float, noise: Array, exploration: Array, z: Array
    ) -> tuple[Array, Array]:
        """Returns y and y_z [B]. noise [K+1,B,H,A], exploration [B,H,A], z [B]."""
        following = {"state": batch.next_obs}
        mean, std = self.critic_target(following, self.explored(following, noise, exploration))
        spread = tf.where(mean[0] < mean[1], std[0], std[1]) * tf.clip_by_value(z, -BOUND, BOUND)
        mean, discount = tf.reduce_min(mean, axis=0), gamma * (1.0 - batch.terminated)
        return batch.rewards + discount * mean, batch.rewards + discount * (mean + spread)

    def loss_critic(self, batch: Transitions, target: Array, drawn: Array, scale: Array) -> Array:
        """Returns the loss of both critics. target, drawn: of `targets`; scale [2]."""
        mean, std = self.critic({"state": batch.obs}, batch.actions)
        return distributional_loss(mean, std, target, drawn, scale)

    def update_std_scale(self, batch: Transitions, tau: float) -> Array:
        """Returns w [2], moved towards the batch's mean deviations, with which it begins."""
        _, std = self.critic({"state": batch.obs}, batch.actions)
        mean, old = tf.reduce_mean(std, axis=-1), self.std_scale.read_value()
        return self.std_scale.assign(tf.where(old < 0, mean, (1 - tau) * old + tau * mean))

    def loss_actor(self, obs: Array, noise: Array, exploration: Array) -> Array:
        """Returns minus the smaller mean of the policy's own actions. noise [K+1,B,H,A], exploration [B,H,A]."""
        mean, _ = self.critic({"state": obs}, self.explored({"state": obs}, noise, exploration))
        return -tf.reduce_mean(tf.reduce_min(mean, axis=0))

    def entropy(self, obs: Array, n: int, noise: Array, exploration: Array) -> Array:
        """Returns H, a scalar: the mean over states of the entropy of n exploring actions. noise [K+1,B*n,H,A]."""
        actions = self.explored({"state": tf.repeat(obs, n, axis=0)}, noise, exploration)
        by_state = tf.reshape(actions, [-1, n, self.horizon_steps * self.action_dim])
        return tf.reduce_mean(mixture_entropy(by_state))

    def loss_temperature(self, entropy: Array, target_entropy: float) -> Array:
        """Returns log alpha (H - Hbar), a scalar: alpha grows while the entropy is below its target."""
        return self._log_alpha * tf.cast(entropy - target_entropy, tf.float64)

    # ---------- updates ----------

    def draw(self, rng: Rng, rows: Rows, settings: Settings, train_actor: bool) -> dict[str, Any]:
        b = int(settings["batch_size"])
        draws = {"rows": np.stack([rows.online(b) for _ in range(CRITIC_STEPS)])}
        draws["next_noise"], draws["next_exploration"] = self._action_draws(rng, b, (CRITIC_STEPS,))
        draws["z"] = rng.normal((CRITIC_STEPS, b), floatx())
        if train_actor:
            draws["noise"], draws["exploration"] = self._action_draws(rng, b)
        return draws

    def update(self, data: Any, draws: Draws, step: Any, settings: Settings, train_actor: bool) -> dict[str, Array]:
        """Steps the critics, each time on another batch; then the actor on the last of these, and the targets."""
        tau, norm = settings["target_ema_rate"], settings.get("max_grad_norm")
        losses = {}
        for k in range(CRITIC_STEPS):
            batch = data.online.at(draws["rows"][k])
            own = [draws[name][k] for name in ("next_noise", "next_exploration", "z")]
            inputs = (batch, *self.targets(batch, settings["gamma"], *own), self.update_std_scale(batch, tau))
            losses["loss_critic"] = step("critic", lambda inputs=inputs: self.loss_critic(*inputs), norm)
        if train_actor:
            own = [draws["noise"], draws["exploration"]]
            losses["loss_actor"] = step("actor", lambda: self.loss_actor(batch.obs, *own), norm)
        self.update_target_critic(tau)
        self.n_updates.assign_add([1])
        return losses

    def draw_temperature(self, rng: Rng, rows: Rows, settings: Settings, train_actor: bool) -> dict[str, Any]:
        b, n = int(settings["entropy_states"]), int(settings["entropy_samples"])
        return {"rows": rows.online(b), **self.draw_action(rng, b * n, False, settings)}

    def update_temperature(
        self, data: Any, draws: Draws, step: Any, settings: Settings, train_actor: bool
    ) -> dict[str, Array]:
        obs = data.online.at(draws["rows"]).obs
        entropy = self.entropy(obs, int(settings["entropy_samples"]), draws["noise"], draws["exploration"])
        loss = step("log_alpha", lambda: self.loss_temperature(entropy, float(settings["target_entropy"])))
        return {"loss_temperature": loss, "entropy": entropy}
