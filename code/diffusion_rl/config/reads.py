"""Which optional keys a configuration's loop, algorithm and environment read.

A key that is known, but that nothing of this very configuration reads, would do nothing in silence: `use_ddim=true` at
the top level where the policy does not take its value from there, or a setting of another algorithm.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

from diffusion_rl.config.declared import declared
from diffusion_rl.config.instantiate import PACKAGE, flatten

PATHS = ("logdir", "log_dir", "data_dir", "resume")  # keys that name files; so do those that end in _path
RUN = "suite stage project name seed device data_dir log_dir logdir resume tensorboard wandb ray"
ITERATIONS = "n_train_itr stop_at n_steps val_freq save_model_freq force_train render fast gamma batch_size"
PPO = (
    "gae_lambda update_epochs n_critic_warmup_itr reward_scale_const reward_scale_running target_kl ent_coef vf_coef "
    "max_grad_norm use_bc_loss bc_loss_coeff grad_accumulate augment logprob_batch_size "
    "precision devices replicas eta_lr eta_weight_decay eta_lr_scheduler eta_update_interval"
)

#: What each loop reads of `train`. "actor" stands for the actor's learning rate, its schedule and its weight decay.
LOOPS = {
    "PreTraining": "n_epochs stop_at batch_size epoch_start_ema update_ema_freq train_split save_model_freq val_freq "
    "learning_rate weight_decay lr_scheduler ent_coef fast precision devices replicas",
    "OnPolicyTraining": f"{ITERATIONS} {PPO} actor critic",
    "OffPolicyTraining": f"{ITERATIONS} scale_reward_factor log_freq buffer_size precision devices",
    "Evaluation": "",
}
#: Keys of `env` that one kind of environment reads.
ROBOMIMIC = ("env.reward_shaping", "env.reflections", "env.robosuite", "env.robomimic_env_cfg_path")
TOP_LEVEL = {
    "PreTraining": "env obs_dim action_dim train_dataset_path ema",
    "OnPolicyTraining": "obs_dim action_dim act_steps reward_horizon",
    "OffPolicyTraining": "obs_dim action_dim act_steps cond_steps horizon_steps",
    "Evaluation": "obs_dim action_dim act_steps base_policy_path ft_denoising_steps n_steps render_num",
}
#: Keys that files say and nothing reads: they name the task, or stand there as in the reference.
DESCRIPTIVE = (
    *("env_name", "task", "mode", "randomness", "offline_dataset_path", "base_policy_path", "robomimic_env_cfg_path"),
    *("shape_meta.obs.rgb.shape", "shape_meta.obs.state.shape", "shape_meta.action.shape"),
    *("train.n_critic_warmup_itr", "train.online_utd_ratio", "train.save_trajs"),
    *("env.use_image_obs", "env.wrappers.multi_step.verbose"),
)


def interpolated(node: Any) -> set[str]:
    """Returns the keys whose values other values of an unresolved configuration are made of: {"use_ddim"} of
    "${use_ddim}"."""
    if isinstance(node, Mapping):
        return set().union(*map(interpolated, node.values()))
    if isinstance(node, list):
        return set().union(*map(interpolated, node))
    return set(re.findall(r"\$\{([\w.]+)\}", node)) if isinstance(node, str) else set()


def is_read(key: str, config: Mapping[str, Any], used: Collection[str]) -> bool:
    """Returns whether anything of this configuration reads a key that is no argument of an object.

    config: plain and resolved. used: keys that other values are made of (`interpolated`).
    """
    loop = _class_name(config)
    if loop not in LOOPS or any(key == one or key.startswith(f"{one}.") for one in used):
        return True
    head, _, rest = key.partition(".")
    if head == "train":
        words = algorithm_keys(config)
        return words is None or _of(rest, f"{LOOPS[loop]} {words}")
    if head == "env":
        robomimic = any(str(name).startswith("robomimic") for name in _wrappers(config))
        return robomimic or key not in ROBOMIMIC
    return head in f"{RUN} {TOP_LEVEL[loop]}".split() or head == "env"


def algorithm_keys(config: Mapping[str, Any]) -> str | None:
    """Returns what the class of `model` says that it reads of `train` (its `TRAIN_KEYS`); the loop reads more.

    None: a class of the user's own package that does not say it; it may read any key.
    """
    model = config.get("model")
    target = str(model.get("_target_", "")) if isinstance(model, Mapping) else ""
    return declared(target, "TRAIN_KEYS", "" if not target or target.startswith(PACKAGE) else None)


def is_own(key: str, config: Mapping[str, Any]) -> bool:
    """Returns whether the algorithm says itself that it reads this key, known to the package or not."""
    head, _, rest = key.partition(".")
    return head == "train" and _of(rest, algorithm_keys(config) or "")


def _of(name: str, words: str) -> bool:
    """Returns whether a key of `train` is one of the words, or belongs to one."""
    first = name.partition(".")[0]
    part = re.fullmatch(r"(actor|critic)_(lr|lr_scheduler|weight_decay)", first)
    return first in words.split() or bool(part and part[1] in words.split())


def _class_name(node: Any) -> str:
    target = node.get("_target_", "") if isinstance(node, Mapping) else ""
    return str(target).rpartition(".")[2] if str(target).startswith(PACKAGE) else ""


def _wrappers(config: Mapping[str, Any]) -> Collection[str]:
    env = config.get("env")
    return (env.get("wrappers") or {}) if isinstance(env, Mapping) else {}


def unread(
    config: Mapping[str, Any], used: Collection[str], objects: tuple[str, ...], defaults: Mapping[str, Any]
) -> list[str]:
    """Returns the keys of a plain configuration that nothing reads; arguments of objects (by prefix) are not looked at.

    defaults: the flat configuration without overrides: what it says of `DESCRIPTIVE` keys may stay unread.
    """
    keys = []
    for key, value in flatten(config).items():
        if key == "_target_" or key.startswith(objects) or is_read(key, config, used):
            continue
        if key not in DESCRIPTIVE or (defaults and defaults.get(key, ...) != value):
            keys.append(key)
    return keys
