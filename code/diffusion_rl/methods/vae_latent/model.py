"""VAE + Diffusion RL: a VAE makes latents of actions, a diffusion model denoises latents given each agent's past, and
the denoising chain is fine-tuned by reinforcement learning.

    stage 0   VAE              L_vae  = reconstruction + beta KL(q(z|a) || N(0, 1))
    stage 1   offline          L_off  = |eps - eps_theta(z_t, t, past)|^2 + vae_weight L_vae [+ bc_weight |a - a_hat|^2]
    stage 2   Q (optional)     L_Q    = (r + gamma^k Q'(s', z') - Q(s, z))^2,   L_off += policy_weight * -Q(s, z_hat)
    stage 3   online           L      = offline_rl_weight L_off + online_rl_weight (pg_weight L_pg + v_weight (V - R)^2
                                        - entropy_weight H)

L_pg is DPPO's (`on_policy.dppo`): every denoising step of the latents is an action of its own. The VAE does not move
in stage 3, since what a latent means must not change under the policy. Latents are constants for the diffusion loss.

Shapes: B batch, N agents, To rows of the past with the present one last, O observation, A action, H planned actions,
Z latent of an action, K denoising steps, F fine-tuned ones. A row of a state is, agent by agent, its action and
observation.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import tensorflow as tf

from diffusion_rl.diffusion.schedules import ddim_schedule
from diffusion_rl.methods.on_policy.dppo import DPPO, Minibatch
from diffusion_rl.networks.critics import CriticObs, CriticObsAct
from diffusion_rl.networks.latent import (
    ActionVAE,
    DiffusionBackbone,
    LatentDenoiser,
    TrajectoryEncoder,
    kl_to_standard_normal,
)
from diffusion_rl.networks.layers import Array, clone, copy_weights, with_variables

POLICY = (  # settings that the policy takes under the same names
    *("gamma_denoising", "clip_ploss_coef", "clip_ploss_coef_base", "clip_ploss_coef_rate", "predict_epsilon"),
    *("randn_clip_value", "min_sampling_denoising_std", "min_logprob_denoising_std"),
)


class Sizes(NamedTuple):
    """N, O, A, H, To, and whether actions are discrete (A of them, one-hot)."""

    n_agents: int
    obs_dim: int
    action_dim: int
    horizon: int
    steps: int
    discrete: bool = False

    @property
    def row(self) -> int:
        """Returns the width of a row of the state."""
        return self.n_agents * (self.action_dim + self.obs_dim)


class Batch(NamedTuple):
    """Windows of the data."""

    state: Array  # [B,To,N*(A+O)]
    actions: Array  # [B,H,N*A]
    mask: Array  # [B,H,1], 1 within the episode
    returns: Array | None = None  # [B,1], scaled
    rewards: Array | None = None  # [B,1], discounted sum over the executed actions
    alive: Array | None = None  # [B,1], the discount of what follows; 0 where the episode has ended
    next_state: Array | None = None  # [B,To,N*(A+O)], after the executed actions


class Draws(NamedTuple):
    """What a step on a batch draws."""

    t: Array  # [B] in [0, K)
    noise: Array  # [B,H,N*Z]
    vae_noise: Array  # [B,H,N*Z]
    keep: Array | None = None  # [B,1], 0 where the return is not told
    sample_noise: Array | None = None  # [steps+1,B,H,N*Z] of latents that are sampled with gradients
    next_noise: Array | None = None  # the same, of the following state


class LatentDiffusionRL:
    """The networks and their losses.

    Args:
        settings: as in cfg/planning/vae_diffusion_rl.yaml.
        sizes: of the task.
    """

    KIND = "vae_diffusion_rl"

    def __init__(self, settings: Mapping[str, Any], sizes: Sizes):
        s = self.settings = settings
        self.sizes = sizes
        n, width = sizes.n_agents, sizes.action_dim + sizes.obs_dim
        self.vae = ActionVAE(sizes.action_dim, s["vae_latent_dim"], s["vae_hidden_dim"])
        encoder = TrajectoryEncoder(
            width,
            sizes.steps,
            s["trajectory_latent_dim"],
            s["trajectory_hidden_dim"],
            s["trajectory_encoder"],
            s["trajectory_layers"],
            s["trajectory_heads"],
        )
        backbone = DiffusionBackbone(
            sizes.horizon * s["vae_latent_dim"],
            s["trajectory_latent_dim"],
            s["backbone_hidden_dim"],
            s["backbone_layers"],
            s["time_embed_dim"],
            s["backbone"],
            s["returns_condition"],
        )
        centralised = not s["decentralized_execution"]
        network = LatentDenoiser(
            encoder, backbone, n, sizes.horizon, centralised, s["test_ret"], s["condition_guidance_w"]
        )
        dims = [s["value_hidden_dim"]] * 2
        self.policy = DPPO(
            **{key: s[key] for key in POLICY},
            actor=network,
            critic=CriticObs(sizes.steps * sizes.row, dims, activation_type="ReLU"),
            ft_denoising_steps=s["ft_denoising_steps"] or s["n_diffusion_steps"],
            horizon_steps=sizes.horizon,
            obs_dim=sizes.row,
            action_dim=n * s["vae_latent_dim"],
            denoising_steps=s["n_diffusion_steps"],
            denoised_clip_value=s["latent_clip"],
        )
        self.ema = clone(network)
        self.online = False  # whether stage 3 has begun
        if s["offline_rl"]:
            latent_dim = n * s["vae_latent_dim"]
            self.q = CriticObsAct(sizes.steps * sizes.row, dims, latent_dim, sizes.horizon, activation_type="ReLU")
            self.q_target = clone(self.q)

    @property
    def dtype(self) -> tf.DType:
        return self.policy.dtype

    def modules(self) -> dict[str, Any]:
        """Returns everything with weights, by name."""
        p = self.policy
        modules = {"vae": self.vae, "base": p.actor, "network": p.actor_ft, "ema": self.ema, "critic": p.critic}
        return modules | ({"q": self.q, "q_target": self.q_target} if self.settings["offline_rl"] else {})

    def begin_online(self) -> None:
        """Lets the average of stage 1 become the pre-trained policy and the start of fine-tuning."""
        copy_weights(self.ema, self.policy.actor)
        copy_weights(self.ema, self.policy.actor_ft)
        self.online = True

    def acting(self, network: Any = None, ddim_steps: int | None = None) -> DPPO:
        """Returns the policy over latents with the given network (default: the averaged one), sharing the weights.

        Args:
            ddim_steps: DDIM (eta = 0 when deterministic) with so many steps in place of DDPM.
        """
        policy = copy.copy(self.policy)
        policy.actor_ft = self.ema if network is None else network
        policy.actor = self.policy.actor if self.online else policy.actor_ft
        if ddim_steps:
            policy.use_ddim, policy.ddim_schedule = True, ddim_schedule(policy.schedule, ddim_steps)
            policy.ft_denoising_steps = math.ceil(policy.ft_denoising_steps * ddim_steps / policy.denoising_steps)
        return policy

    # ---------- actions and latents ----------

    def latents(self, actions: Array, noise: Array) -> Array:
        """Returns actions [B,H,N*A] as latents [B,H,N*Z]: means, or samples with `sample_latents`; constants unless
        upstream's coupling is asked for (`detach_latents: false`), where the diffusion loss pulls the encoder to what
        is easily denoised."""
        z = self.vae.latent_dim
        mean, log_variance = self.vae.encode(tf.reshape(actions, [-1, self.sizes.action_dim]))
        if self.settings["sample_latents"]:
            mean = self.vae.reparameterize(mean, log_variance, tf.reshape(noise, [-1, z]))
        latents = tf.reshape(mean, [-1, self.sizes.horizon, self.sizes.n_agents * z])
        return tf.stop_gradient(latents) if self.settings["detach_latents"] else latents

    def decode(self, latents: Array) -> Array:
        """Decodes latents [B,H,N*Z] to actions (discrete: logits) [B,H,N*A]."""
        actions = self.vae.decode(tf.reshape(latents, [-1, self.vae.latent_dim]))
        return tf.reshape(actions, [-1, self.sizes.horizon, self.sizes.n_agents * self.sizes.action_dim])

    # ---------- stages 0 and 1 ----------

    def vae_losses(self, batch: Batch, noise: Array) -> tuple[Array, Array]:
        """Returns the reconstruction (squared error, or cross-entropy of discrete actions) and KL, scalars."""
        rows = tf.reshape(batch.actions, [-1, self.sizes.action_dim])
        recon, mean, log_variance = self.vae(rows, tf.reshape(noise, [-1, self.vae.latent_dim]))
        if self.sizes.discrete:
            errors = tf.nn.softmax_cross_entropy_with_logits(rows, recon)
        else:
            errors = tf.reduce_mean(tf.square(recon - rows), axis=-1)
        mask = tf.reshape(tf.repeat(batch.mask, self.sizes.n_agents, axis=-1), [-1])
        return masked_mean(errors, mask), masked_mean(kl_to_standard_normal(mean, log_variance), mask)

    def diffusion_loss(self, batch: Batch, draws: Draws) -> Array:
        """Returns the squared error, a scalar, of the noise of latents of H actions (Ho et al. 2020, eq. 14)."""
        p, cond = self.policy, {"state": batch.state}
        if self.settings["returns_condition"]:
            cond |= {"returns": batch.returns, "keep": draws.keep}
        clean = self.latents(batch.actions, draws.vae_noise)
        output = p.actor_ft(p.q_sample(clean, draws.t, draws.noise), draws.t, cond)
        errors = tf.square(output - (draws.noise if p.predict_epsilon else clean))
        return masked_mean(tf.reduce_mean(errors, axis=-1), batch.mask[..., 0])

    def sampled(self, state: Array, noise: Array, network: Any) -> Array:
        """Samples latents [B,H,N*Z] of a network by DDIM; gradients flow through its steps."""
        sampler = self.acting(network, self.settings["n_ddim_steps"])
        return sampler.sample({"state": state}, noise, deterministic=True).trajectories

    def offline_loss(self, batch: Batch, draws: Draws) -> tuple[Array, dict[str, Array]]:
        """Returns L_off and its parts, scalars."""
        s = self.settings
        recon, kl = self.vae_losses(batch, draws.vae_noise)
        parts = {"diffusion_loss": self.diffusion_loss(batch, draws), "vae_recon_loss": recon, "vae_kl_loss": kl}
        parts["vae_loss"] = recon + s["vae_kl_weight"] * kl
        total = parts["diffusion_loss"] + s["vae_weight"] * parts["vae_loss"]
        if s["use_behavior_cloning"] or s["offline_rl"]:
            latents = self.sampled(batch.state, draws.sample_noise, self.policy.actor_ft)
        if s["use_behavior_cloning"]:
            errors = tf.reduce_mean(tf.square(self.decode(latents) - batch.actions), axis=-1)
            parts["bc_loss"] = masked_mean(errors, batch.mask[..., 0])
            total += s["bc_weight"] * parts["bc_loss"]
        if s["offline_rl"]:
            parts["policy_loss"] = self.q_policy_loss(batch.state, latents)
            total += s["policy_weight"] * parts["policy_loss"]
        return total, parts

    # ---------- stage 2 ----------

    def q_policy_loss(self, state: Array, latents: Array) -> Array:
        """Returns minus the smaller value of sampled latents [B,H,N*Z]; the values' own weights are constants here."""
        frozen = with_variables(self.q, lambda name, variable: tf.stop_gradient(variable))
        return -tf.reduce_mean(tf.minimum(*frozen({"state": state}, latents)))

    def q_loss(self, batch: Batch, draws: Draws) -> Array:
        """Returns the squared error, a scalar, to r + gamma^k min Q'(s', z'), z' sampled with the averaged weights."""
        following = self.sampled(batch.next_state, draws.next_noise, self.ema)
        assert batch.rewards is not None and batch.alive is not None
        next_value = tf.minimum(*self.q_target({"state": batch.next_state}, following))
        target = tf.stop_gradient(batch.rewards[:, 0] + batch.alive[:, 0] * next_value)
        latents = tf.stop_gradient(self.latents(batch.actions, draws.vae_noise))
        q1, q2 = self.q({"state": batch.state}, latents)
        return tf.reduce_mean(tf.square(q1 - target) + tf.square(q2 - target))

    # ---------- stage 3 ----------

    def online_loss(self, items: Array, data: Mapping[str, Array]) -> tuple[Array, Array, dict[str, Array]]:
        """Returns DPPO's loss of all F denoising steps of the samples `items` [b] of a rollout, and that of the values.

        Args:
            data: state [M,To,..], chains [M,F+1,H,N*Z], old_log_prob [M,F], returns, values, advantages [M].

        Returns:
            actor's and critic's share of L, and what is watched.
        """
        s, p = self.settings, self.policy
        f, own = p.ft_denoising_steps, {name: tf.gather(array, items) for name, array in data.items()}
        cond = {"state": own["state"]}
        cond |= p.actor_ft.encode(cond)  # once for all denoising steps
        chains, shape = own["chains"], [-1, p.horizon_steps, p.action_dim]
        batch = Minibatch(
            obs={name: tf.repeat(array, f, axis=0) for name, array in cond.items()},
            chains_prev=tf.reshape(chains[:, :-1], shape),
            chains_next=tf.reshape(chains[:, 1:], shape),
            denoising_inds=tf.tile(tf.range(f), [tf.shape(items)[0]]),
            old_log_prob=tf.reshape(own["old_log_prob"], [-1]),
            returns=tf.repeat(own["returns"], f),
            oldvalues=tf.repeat(own["values"], f),
            advantages=tf.repeat(own["advantages"], f),
        )
        losses = p.minibatch_loss(batch, s["act_steps"])
        # The schedule fixes the steps' deviations, so the entropy is a constant: it is told, and has no gradient.
        stds = p.log_prob_std(tf.gather(p.schedule.ddpm_logvar_clipped, p.fine_tuned_timesteps()[0]))
        entropy = tf.reduce_mean(tf.cast(0.5 * tf.math.log(2 * math.pi * math.e * tf.square(stds)), p.dtype))
        value_loss = 2 * losses["v_loss"]
        actor = s["policy_gradient_weight"] * losses["pg_loss"] - s["entropy_weight"] * entropy
        watched = {"policy_loss": losses["pg_loss"], "value_loss": value_loss, "entropy": entropy}
        watched |= {"approx_kl": losses["approx_kl"], "clipfrac": losses["clipfrac"]}
        return actor, s["value_function_weight"] * value_loss, watched


def masked_mean(values: Array, mask: Array) -> Array:
    """Returns the mean of the values [...] whose mask [...] is 1."""
    return tf.reduce_sum(values * mask) / tf.maximum(tf.reduce_sum(mask), 1)
