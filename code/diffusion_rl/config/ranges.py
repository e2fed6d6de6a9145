"""The ranges and relations of the numbers of `script/run.py`'s configurations."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffusion_rl.config.checks import ENVS, SEED, SHARE, STEPS, Range, at_most, check_ranges, number, positive, whole
from diffusion_rl.config.instantiate import flatten

COUNT = whole(1, 10**6)  # of what lies in memory: dimensions, entries
SPAN = whole(1, 10**4)  # steps of a plan or of a history
RATE = number(0)  # of learning; 0 trains nothing
NOT_NEGATIVE = number(0)
FROM_ZERO = whole(0, 10**12)
ROWS = whole(1, 10**8)  # of a minibatch: what is more than there are is cut

_TOP = {
    **dict.fromkeys(("obs_dim", "action_dim"), COUNT),
    **dict.fromkeys(("cond_steps", "img_cond_steps", "horizon_steps", "act_steps"), SPAN),
    **dict.fromkeys(("denoising_steps", "ddim_steps", "num_modes", "reward_horizon"), whole(1, 10**4, null=True)),
    "ft_denoising_steps": whole(0, 10**4),
    "seed": SEED,
    "n_steps": STEPS,
    "render_num": FROM_ZERO,
    "ema.decay": SHARE,
    "env.n_envs": ENVS,
    "env.threads": whole(1, 1024),
    "env.max_episode_steps": whole(1, 10**12, null=True),
    "env.d4rl_time_limit": whole(1, 10**12, null=True),
    "env.best_reward_threshold_for_success": number(null=True),
    "env.worker_timeout": positive(null=True),
}
_TRAIN = {
    **dict.fromkeys(("n_epochs", "n_train_itr", "save_model_freq", "val_freq", "log_freq"), STEPS),
    "stop_at": whole(1, 10**12, null=True),
    "n_steps": whole(1, 10**7),
    **dict.fromkeys(("update_ema_freq", "render.freq", "update_epochs", "grad_accumulate", "buffer_size"), STEPS),
    **dict.fromkeys(("eta_update_interval", "temperature_interval", "update_freq", "critic_update_ratio"), STEPS),
    **dict.fromkeys(("entropy_states", "entropy_samples", "n_random_actions", "critic_num_update"), COUNT),
    **dict.fromkeys(("eval_sample_num", "n_eval_episode", "logprob_batch_size"), whole(1, 10**9)),
    **dict.fromkeys(("epoch_start_ema", "n_critic_warmup_itr", "render.num", "n_explore_steps"), FROM_ZERO),
    **dict.fromkeys(("n_episode_per_epoch", "num_update", "action_gradient_steps"), FROM_ZERO),
    **dict.fromkeys(("batch_size",), ROWS),
    **dict.fromkeys(("gamma", "gae_lambda", "target_ema_rate", "critic_tau"), SHARE),
    **dict.fromkeys(("learning_rate", "lr", "actor_lr", "critic_lr", "eta_lr", "action_lr", "temperature_lr"), RATE),
    **dict.fromkeys(("weight_decay", "actor_weight_decay", "critic_weight_decay", "eta_weight_decay"), NOT_NEGATIVE),
    **dict.fromkeys(("vf_coef", "bc_loss_coeff", "max_reward_weight", "max_adv_weight"), NOT_NEGATIVE),
    **dict.fromkeys(("ent_coef", "beta", "eta", "q_grad_coeff", "scale_reward_factor", "reward_scale_const"), number()),
    **dict.fromkeys(("target_kl", "max_grad_norm"), positive(null=True)),
    **dict.fromkeys(("init_temperature", "replay_ratio", "critic_replay_ratio", "actor_replay_ratio"), positive()),
    "train_split": Range(0, 1, open=True),
    "target_entropy": number(null=True),
}
_SCHEDULE = {"first_cycle_steps": STEPS, "warmup_steps": FROM_ZERO, "min_lr": RATE}
_POLICY = {
    **dict.fromkeys(("obs_dim", "action_dim"), COUNT),
    "horizon_steps": SPAN,
    **dict.fromkeys(("denoising_steps", "ddim_steps", "num_modes"), whole(1, 10**4, null=True)),
    "ft_denoising_steps": whole(0, 10**4),
    "gamma_denoising": SHARE,
    **dict.fromkeys(("clip_ploss_coef", "clip_ploss_coef_base", "clip_vloss_coef"), number(0, null=True)),
    **dict.fromkeys(("denoised_clip_value", "randn_clip_value", "final_action_clip_value"), positive(null=True)),
}
RANGES: dict[str, Range] = {
    **_TOP,
    **{f"train.{key}": allowed for key, allowed in _TRAIN.items()},
    **{
        f"train.{part}lr_scheduler.{key}": allowed
        for part in ("", "actor_", "critic_", "eta_")
        for key, allowed in _SCHEDULE.items()
    },
    **{f"model.{key}": allowed for key, allowed in _POLICY.items()},
}
#: Arguments of objects, wherever they stand.
SIZES = {
    **dict.fromkeys(("mlp_dims", "cond_mlp_dims", "dim_mults"), Range(1, 10**6, whole=True, null=True, many=True)),
    **dict.fromkeys(("time_dim", "cond_dim", "transformer_embed_dim", "transformer_num_heads", "depth"), COUNT),
    **dict.fromkeys(("dropout", "p_drop_emb", "p_drop_attn"), SHARE),
    "max_n_episodes": whole(1, 10**12, null=True),
    "fixed_std": positive(null=True),
}
RELATIONS = (
    at_most("act_steps", "horizon_steps"),
    at_most("reward_horizon", "horizon_steps"),
    at_most("img_cond_steps", "cond_steps"),
    at_most("ft_denoising_steps", "denoising_steps"),
    at_most("model.ft_denoising_steps", "model.denoising_steps"),
    at_most("model.ddim_steps", "model.denoising_steps"),
)


def check_numbers(config: Mapping[str, Any]) -> None:
    """Raise UserError naming the first number of a plain, resolved configuration that is out of its range."""
    flat = flatten(config)
    sizes = {key: SIZES[key.rpartition(".")[2]] for key in flat if "." in key and key.rpartition(".")[2] in SIZES}
    check_ranges(flat, sizes | RANGES, relations=RELATIONS)
