"""RWR: reward-weighted regression (Peters & Schaal 2007), of a diffusion policy (DRWR) or a Gaussian one.

    R_t = sum_k gamma^k r_{t+k}  of complete episodes, normalised over the iteration
    w_t = min(exp(beta R_t), max_reward_weight)
    loss = mean_b w_b ||eps_theta(x_t, t, o) - eps||^2,  or  -mean_b w_b log pi(a | o)

Shapes: B batch, N transitions of an iteration, K denoising steps, H chunk, A action.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import tensorflow as tf

from diffusion_rl.core.keras import floatx, keras
from diffusion_rl.core.transitions import Transitions
from diffusion_rl.core.typing import Rng
from diffusion_rl.diffusion.gaussian import normal_log_prob
from diffusion_rl.methods.off_policy.algorithm import Experience, OffPolicy, Part, Phase, Progress, Settings
from diffusion_rl.methods.off_policy.buffers import Draws, Rows
from diffusion_rl.networks.layers import Array, variables_of
from diffusion_rl.policies.exploring import ExploringDiffusionPolicy, ExploringGaussianPolicy


class RewardWeighted(OffPolicy):
    """Supervised learning on an iteration's complete episodes, weighted by their rewards-to-go.

    A policy that inherits it has `network`, `weighted_loss` and `draw_loss`.
    """

    TRAIN_KEYS = "lr weight_decay lr_scheduler max_grad_norm update_epochs beta max_reward_weight"
    network: keras.layers.Layer
    weighted_loss: Any  # of the policy: batch, weights [B], draws -> a scalar
    draw_loss: Any  # of the policy: rng, rows -> its draws

    def experience(self, settings: Settings) -> Experience:
        return Experience(fields=("obs", "actions", "returns", "weights"), whole_episodes=True)

    def parts(self, settings: Settings) -> dict[str, Part]:
        return {"policy": Part([v for v in variables_of(self.network) if v.trainable], "")}

    def phases(self, settings: Settings, progress: Progress) -> list[Phase]:
        """Plans epochs over the iteration's complete episodes; what is left over of an epoch is dropped."""
        batches = max(1, progress.rows // settings["batch_size"]) if progress.rows else 0
        return [Phase(settings["update_epochs"] * batches, before="weigh")]

    def weigh(self, data: Any, settings: Settings, n_envs: int) -> dict[str, np.ndarray]:
        """Writes weights [N], made of the rewards-to-go [N], into the buffer."""
        returns = data.online.read("returns")
        normalised = (returns - returns.mean()) / (returns.std() + 1e-3)
        weights = np.minimum(np.exp(settings["beta"] * normalised.astype(floatx())), settings["max_reward_weight"])
        data.online.write("weights", weights)
        return {"returns_trajs_split": normalised, "rewards_k_scaled": weights}

    # ---------- one update ----------

    def draw(self, rng: Rng, rows: Rows, settings: Settings, train_actor: bool) -> dict[str, Any]:
        places = rows.shuffled(int(settings["batch_size"]))
        return {"rows": places} | self.draw_loss(rng, len(places))

    def update(self, data: Any, draws: Draws, step: Any, settings: Settings, train_actor: bool) -> dict[str, Array]:
        batch = data.online.at(draws["rows"])
        clip = settings.get("max_grad_norm")
        return {"loss_actor": step("policy", lambda: self.weighted_loss(batch, batch.weights, draws), clip)}


class WeightedDenoising(ExploringDiffusionPolicy):
    """A diffusion policy with the weighted loss; arguments of `ExploringDiffusionPolicy`."""

    def draw_loss(self, rng: Rng, b: int) -> dict[str, Any]:
        """Draws step and noise of the denoising loss for b rows."""
        return {
            "t": rng.integers(0, self.denoising_steps, (b,)),
            "noise": rng.normal((b, self.horizon_steps, self.action_dim), floatx()),
        }

    def weighted_loss(self, batch: Transitions, weights: Array, draws: Draws) -> Array:
        """Averages weight [B] times the chunk's mean error over the batch; draws t [B] and noise [B,H,A]."""
        errors = self.errors(batch.actions, {"state": batch.obs}, draws["t"], draws["noise"])
        return tf.reduce_mean(weights * tf.reduce_mean(errors, axis=[1, 2]))


class WeightedLikelihood(ExploringGaussianPolicy):
    """A Gaussian policy with the weighted loss.

    Args:
        actor: cond -> (mean, std) [B,H*A]; also known as `network`.
        further arguments: as in `GaussianPolicy`.
    """

    def __init__(self, actor: keras.layers.Layer, **kwargs: Any):
        super().__init__(network=actor, **kwargs)
        self.actor = self.network

    def draw_loss(self, rng: Rng, b: int) -> dict[str, Any]:
        """Draws nothing: the likelihood is exact."""
        return {}

    def weighted_loss(self, batch: Transitions, weights: Array, draws: Draws) -> Array:
        """Returns minus the mean over the batch of weight [B] times the chunk's mean log-probability."""
        mean, std = self.mean_std({"state": batch.obs})
        log_prob = normal_log_prob(tf.reshape(batch.actions, tf.shape(mean)), mean, std)
        return -tf.reduce_mean(weights * tf.reduce_mean(log_prob, axis=-1))


class RWR(RewardWeighted, WeightedDenoising):
    """RWR of a diffusion policy; arguments of `ExploringDiffusionPolicy`."""

    KIND = "rwr"
    LABEL = "DRWR"


class GaussianRWR(RewardWeighted, WeightedLikelihood):
    """RWR of a Gaussian policy; arguments of `WeightedLikelihood`."""

    KIND = "gaussian_rwr"
