"""Every configuration key that something reads, with what it means, and the check that catches a misspelt one.

Keys of objects (a mapping with a `_target_`, such as `model` or `train_dataset`) are not listed: they are the arguments
of that class, and are checked against its signature.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from diffusion_rl.config.instantiate import PACKAGE, find_class, flatten, parameters_of, targets
from diffusion_rl.config.ranges import RANGES
from diffusion_rl.config.reads import unread
from diffusion_rl.core.errors import UserError

KEYS: dict[str, str] = {
    # the run
    "_target_": "the loop: a class of diffusion_rl.methods",
    "suite": "family of tasks: first part of the log and data folders [ours]",
    "stage": "pretrain, finetune, scratch or eval: second part of the log folder's name [ours]",
    "project": "wandb's project; default <suite>-<environment>-<stage> [ours]",
    "name": "name of the run: third part of the log folder",
    "seed": "seed of weights, noise, minibatches and environments",
    "device": "cuda:N: N-th GPU if there is one, else the processor; cpu: never a GPU",
    "data_dir": "folder of data sets and pre-trained policies; default $DPPO_DATA_DIR, else data [ours]",
    "log_dir": "folder of all run folders; default $DPPO_LOG_DIR, else log [ours]",
    "logdir": "this run's folder",
    "resume": "never | auto (newest folder of this name and seed) | a run folder or checkpoint [ours]",
    "tensorboard": "write TensorBoard events; default true [ours]",
    "wandb": "null: off; wandb.mode=online turns it on",
    "wandb.mode": "online, offline or disabled",
    "wandb.entity": "default $DPPO_WANDB_ENTITY, else wandb's own",
    "wandb.project": "default `project`",
    "wandb.run": "default <time>_<name>",
    # the task
    "env_name": "the environment's name",
    "task": "Furniture-Bench: the piece of furniture; avoiding: the set of demonstrations",
    "mode": "avoiding: the gaps that the demonstrations take; only names the set",
    "randomness": "Furniture-Bench: how much initial poses vary, low or med",
    "obs_dim": "dimension O of one observation",
    "action_dim": "dimension A of one action",
    "cond_steps": "To, observations the policy sees",
    "img_cond_steps": "Ti, the last of them that it sees as images",
    "horizon_steps": "H, actions the policy plans",
    "act_steps": "Ta, actions of a plan that are executed",
    "denoising_steps": "K, denoising steps",
    "ft_denoising_steps": "F, of which fine-tuned; in an evaluation 0 leaves it to the checkpoint",
    "use_ddim": "sample with DDIM",
    "ddim_steps": "its denoising steps",
    "num_modes": "M, components of a Gaussian mixture",
    "reward_horizon": "actions of a chunk whose log-probabilities count in the policy loss; default act_steps",
    # files
    "train_dataset_path": "pre-training data (npz)",
    "normalization_path": "minima and maxima of observations and actions (npz)",
    "base_policy_path": "policy to start from or to evaluate: .safetensors, or the reference's .pt",
    "offline_dataset_path": "demonstrations of RLPD, IBRL and Cal-QL (npz)",
    "robomimic_env_cfg_path": "robomimic's description of the environment (JSON)",
    # environments
    "env": "in pre-training just the data set's name",
    "env.engine": "mujoco (locomotion batched and restorable) | gymnasium | d4rl (a process per environment) [ours]",
    "env.threads": "threads that step batched environments; default 2 [ours]",
    "env.worker_timeout": "seconds that an environment's process may take to answer; default 600 [ours]",
    "env.d4rl_time_limit": "steps after which D4RL ends an episode by itself; null: never [ours]",
    "env.env_type": "furniture: Furniture-Bench's simulator, all environments in one",
    "env.name": "the environment's name",
    "env.n_envs": "E, environments stepped together",
    "env.max_episode_steps": "environment steps after which an episode is truncated",
    "env.reset_at_iteration": "start new episodes at each iteration",
    "env.save_video": "write videos of evaluations to render/",
    "env.render": "avoiding: show environment 0 in a window; elsewhere without effect",
    "env.save_full_observations": "keep every observation, not only one per chunk",
    "env.best_reward_threshold_for_success": "an episode whose best chunk reward per action reaches it is a success",
    "env.robomimic_env_cfg_path": "robomimic: the description of the environment (JSON)",
    "env.reward_shaping": "robomimic: robosuite's shaped reward instead of 0 and 1; default false",
    "env.reflections": "robomimic: images with the floor's reflections, slower; default false [ours]",
    "env.wrappers.mujoco_locomotion_lowdim.normalization_path": "statistics that normalise observations and actions",
    "env.wrappers.d3il_lowdim.normalization_path": "the same for the avoiding task",
    "env.wrappers.multi_step.n_obs_steps": "observation history To",
    "env.wrappers.multi_step.n_action_steps": "executed chunk Ta",
    "env.wrappers.multi_step.max_episode_steps": "truncation of an episode",
    "env.wrappers.multi_step.reset_within_step": "begin the next episode in the step that ended one",
    "env.wrappers.multi_step.pass_full_observations": "infos carry every observation of the chunk",
    # evaluation
    "n_steps": "chunk steps S of an evaluation",
    "render_num": "environments of which an evaluation makes videos",
    # pre-training
    "ema.decay": "decay of the averaged weights",
    "train.n_epochs": "passes over the data",
    "train.learning_rate": "base learning rate",
    "train.weight_decay": "decoupled weight decay",
    "train.epoch_start_ema": "epoch from which weights are averaged; until then they are copied",
    "train.update_ema_freq": "epochs between updates of the averaged weights",
    "train.train_split": "share of the data trained on; the rest validates",
    # reinforcement learning
    "train.n_train_itr": "iterations",
    "train.n_critic_warmup_itr": "first iterations that train the critic only",
    "train.n_steps": "chunk steps S collected per environment and iteration",
    "train.gamma": "discount per chunk step",
    "train.gae_lambda": "lambda of generalised advantage estimation",
    "train.batch_size": "rows of a minibatch; in DPPO a row is one denoising step of one chunk",
    "train.update_epochs": "passes over an iteration's data",
    "train.reward_scale_running": "divide rewards by the running deviation of returns",
    "train.reward_scale_const": "and multiply them with this",
    "train.target_kl": "stop an iteration's update when the approximate KL divergence exceeds this",
    "train.ent_coef": "weight of the entropy bonus",
    "train.vf_coef": "weight of the value loss",
    "train.max_grad_norm": "clip the actor's gradient to this norm",
    "train.use_bc_loss": "add a behaviour-cloning loss on the base policy's own samples",
    "train.bc_loss_coeff": "its weight",
    "train.fast": "the compiled fast path; default true; false: the plain one, same numbers, slower [ours]",
    "train.force_train": "train in every iteration, evaluations included",
    "train.save_model_freq": "iterations (epochs) between checkpoints",
    "train.val_freq": "iterations between evaluations (epochs between validations)",
    "train.render.freq": "iterations between videos",
    "train.render.num": "environments of which videos are made",
    "train.eta_lr": "learning rate of a learned eta (model.learn_eta)",
    "train.eta_weight_decay": "its weight decay",
    "train.eta_update_interval": "updates of the actor between two of eta",
}
KEYS |= {
    # algorithms on a replay buffer
    "train.replay_ratio": "how often each new transition is drawn for an update",
    "train.buffer_size": "rows kept: transitions, or steps of all environments (IDQL, QSM, DAWR, DACER)",
    "train.scale_reward_factor": "factor on rewards",
    "train.target_ema_rate": "share of the trained networks in a step of their targets",
    "train.critic_tau": "the same (IDQL, QSM)",
    "train.log_freq": "iterations between rows of the metrics; default 1",
    "train.n_explore_steps": "first iterations, with random actions and without updates",
    "train.n_eval_episode": "episodes of an evaluation",
    "train.eta": "weight of the value against imitation (DQL)",
    "train.q_grad_coeff": "factor on the critic's slope (QSM)",
    "train.action_lr": "learning rate of actions (DIPO)",
    "train.action_gradient_steps": "steps that an action climbs (DIPO)",
    "train.eval_deterministic": "evaluations without exploration noise (IDQL)",
    "train.eval_sample_num": "samples among which a decision chooses (IDQL)",
    "train.use_expectile_exploration": "choose by the value's expectile, not the best (IDQL)",
    "train.beta": "inverse temperature of weights (DRWR, DAWR)",
    "train.max_reward_weight": "largest weight (DRWR)",
    "train.max_adv_weight": "largest weight (DAWR)",
    "train.critic_update_ratio": "actor updates for each of the critic's (DAWR)",
    "train.lr": "base learning rate (DRWR)",
    "train.lr_scheduler.first_cycle_steps": "iterations (epochs) of the first cosine cycle",
    "train.lr_scheduler.warmup_steps": "iterations (epochs) of linear warm-up",
    "train.lr_scheduler.min_lr": "learning rate at the cycle's ends",
    "train.init_temperature": "the temperature at the beginning (SAC, RLPD, Cal-QL, DACER)",
    "train.target_entropy": "entropy that the temperature aims at",
    "train.temperature_lr": "learning rate of log alpha (DACER) [ours]",
    "train.temperature_interval": "critic steps between two updates of the temperature (DACER) [ours]",
    "train.entropy_states": "states whose entropy is estimated then (DACER) [ours]",
    "train.entropy_samples": "actions of each of them (DACER) [ours]",
    "train.automatic_entropy_tuning": "learn the temperature (Cal-QL)",
    "train.critic_replay_ratio": "rows drawn for the critic per step (SAC)",
    "train.actor_replay_ratio": "rows drawn for the actor per step (SAC)",
    "train.critic_num_update": "critic updates for each of the actor's (RLPD, IBRL)",
    "train.update_freq": "iterations between updates (IBRL)",
    "train.train_online": "collect in the environment too (Cal-QL)",
    "train.num_update": "updates of an offline iteration (Cal-QL)",
    "train.n_episode_per_epoch": "episodes collected per iteration (Cal-QL)",
    "train.n_random_actions": "random actions of the conservative term (Cal-QL)",
}
for _which in ("actor", "critic", "eta"):
    KEYS |= {
        f"train.{_which}_lr_scheduler.first_cycle_steps": "iterations of the first cosine cycle",
        f"train.{_which}_lr_scheduler.warmup_steps": "iterations of linear warm-up",
        f"train.{_which}_lr_scheduler.min_lr": "learning rate at the cycle's ends",
    }
for _which in ("lowdim", "image"):
    KEYS |= {
        f"env.wrappers.robomimic_{_which}.{key}": meaning
        for key, meaning in {
            "normalization_path": "statistics that normalise observations and actions",
            "low_dim_keys": "parts of the state, in this order",
            "clamp_obs": "clip the normalised state to [-1, 1]; default false",
            "init_state": "simulator state that every episode begins with",
            "render_hw": "height and width of videos; default 256 and 256",
            "render_camera_name": "camera of videos; default agentview",
        }.items()
    }
for _where in ("", "env.wrappers.robomimic_image."):
    KEYS |= {
        f"{_where}shape_meta.obs.rgb.shape": "[channels of all images, height, width]",
        f"{_where}shape_meta.obs.state.shape": "[O]",
        f"{_where}shape_meta.action.shape": "[A]",
    }
KEYS |= {
    "env.wrappers.robomimic_image.image_keys": "cameras, in this order",
    "train.augment": "shift the images of a rollout at random by up to 4 pixels",
    "train.grad_accumulate": "minibatches whose gradients are added up for a step of the optimizers",
    "train.logprob_batch_size": "images that are looked at together between rollout and update; else no effect",
}
for _which in ("actor", "critic"):
    KEYS |= {
        f"train.{_which}_lr": f"base learning rate of the {_which}",
        f"train.{_which}_weight_decay": f"decoupled weight decay of the {_which}",
    }

KEYS |= dict.fromkeys(
    (
        *("train.online_utd_ratio", "train.save_trajs", "env.use_image_obs"),
        "env.wrappers.multi_step.verbose",
    ),
    "accepted for the reference's command lines; has no effect here",
)
#: Keyword arguments of an environment: anything goes.
OPEN = "env.specific."
#: Arguments that the reference's configurations pass to classes that ignore them.
IGNORED_ARGUMENTS = {"device", "residual_style", "input_dim", "mlp_dims", "action_dim", "rtol", "atol"}
#: Optional keys that no file gives a value to: one of their kind.
_KINDS = dict.fromkeys(
    (
        *("tensorboard", "env.render", "env.save_full_observations", "env.reward_shaping", "env.reflections"),
        *("train.augment", "train.fast", "train.force_train", "train.use_bc_loss", "train.reward_scale_running"),
    ),
    False,
)
MOST_NAMED = 6  # keys in one line
_HYDRA_ARGUMENTS = {"_target_", "_args_", "_partial_", "_recursive_", "_convert_"}


def unknown_key(key: str, known: Iterable[str]) -> str:
    """The line about a key that is not there, with what was probably meant."""
    known = set(known) - {key}
    if key in KEYS:
        return f"'{key}' is not in this configuration, and nothing of it reads it"
    inside = sorted(other for other in known if other.startswith(f"{key}."))
    if inside:
        return f"'{key}' is a group of keys, not a value; it holds {_some(inside)}"
    leaf = key.rsplit(".", 1)[-1]
    same_leaf = sorted(other for other in known if other.rsplit(".", 1)[-1] == leaf)
    close = difflib.get_close_matches(key, sorted(known), n=3, cutoff=0.75)
    best = list(dict.fromkeys(same_leaf + close))[:3]
    hint = f"; did you mean {' or '.join(best)}?" if best else "; --help with this configuration lists them all"
    return f"unknown configuration key '{key}': nothing reads it{hint}"


def _some(keys: list[str], n: int = 5) -> str:
    return ", ".join(keys[:n]) + (", …" if len(keys) > n else "")


def check_keys(config: Mapping[str, Any], defaults: Mapping[str, Any], used: Collection[str] | None = None) -> None:
    """Raise UserError naming the keys of `config` that nothing reads, or the first whose value is of the wrong kind.

    `defaults`: the flat configuration without overrides; a value must be of the kind it has there. `used`: keys that
    other values are made of; without it, a key that some other configuration reads passes. A loop class of the user's
    own package may read what it likes: then nothing is checked.
    """
    if not str(config.get("_target_", PACKAGE)).startswith(PACKAGE):
        return
    objects = tuple(f"{where}." for where, _ in targets(config) if where)
    own_env = not str(_get(config, "env._target_", PACKAGE)).startswith(PACKAGE)
    known = {*KEYS, *defaults}
    unknown = []
    for key, value in flatten(config).items():
        groups = [default for default in defaults if default.startswith(f"{key}.")]
        if groups and value is not None and value != {}:
            raise UserError(f"{key}={value}: '{key}' is a group of keys, not a value; it holds {_some(groups)}")
        _check_kind(key, value, defaults.get(key, _KINDS.get(key)))
        if key in KEYS or key.startswith((*objects, OPEN)) or (own_env and key.startswith("env.")):
            continue
        if not (value == {} and any(known.startswith(f"{key}.") for known in KEYS)):
            unknown.append(unknown_key(key, known))
    if not unknown and used is not None:
        unknown = [_not_read(key, config) for key in unread(config, used, (*objects, OPEN), defaults)]
    if unknown:
        more = f"; and {len(unknown) - MOST_NAMED} more" if len(unknown) > MOST_NAMED else ""
        raise UserError("; ".join(unknown[:MOST_NAMED]) + more)


def _not_read(key: str, config: Mapping[str, Any]) -> str:
    """The line about a key that other configurations read and this one does not."""
    takers = [
        where
        for where, mapping in targets(config)
        if where and key in parameters_of(find_class(mapping["_target_"]))[0]
    ]
    hint = f"; did you mean {' or '.join(f'{where}.{key}' for where in takers)}?" if takers else ""
    return f"'{key}' does nothing here: nothing of this configuration reads it{hint}"


def _check_kind(key: str, value: Any, default: Any) -> None:
    """Raise UserError if `value` is not of the kind of `default`: true/false, a number (a whole one), a list."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    match default:
        case bool():
            fits, kind = isinstance(value, bool), "true or false"
        case int() | float() if key in RANGES and RANGES[key].whole:
            fits, kind = number and float(value).is_integer(), "a whole number"
        case int() | float():
            fits, kind = number, "a number"
        case list():
            fits, kind = isinstance(value, list), "a list"
        case _:
            return
    if not fits and value is not None:
        raise UserError(f"{key}={value}: not {kind} (such as {default})")


def check_arguments(config: Mapping[str, Any]) -> None:
    """Raise UserError for an argument that the class of its `_target_` does not take. Imports those classes."""
    for where, mapping in targets(config):
        found = _class_at(where, mapping["_target_"])
        if not where:
            continue
        accepted, anything = parameters_of(found)
        for key, value in mapping.items():
            if key in accepted and key not in IGNORED_ARGUMENTS:
                _check_annotation(f"{where}.{key}", value, accepted[key].annotation)
            if anything or key in accepted or key in _HYDRA_ARGUMENTS or key in IGNORED_ARGUMENTS:
                continue
            matches = difflib.get_close_matches(str(key), sorted(accepted), n=3, cutoff=0.6)
            hint = "did you mean " + " or ".join(f"{where}.{m}" for m in matches) if matches else ""
            hint = f"; {hint}?" if hint else f"; it takes {', '.join(sorted(accepted))}"
            raise UserError(
                f"unknown configuration key '{where}.{key}': {mapping['_target_']} has no such argument{hint}"
            )


def _class_at(where: str, target: str) -> type:
    """The class of a `_target_`, if it can stand in that place. Raises UserError; nothing is built."""
    try:
        found = find_class(target)
    except UserError as error:
        raise UserError(f"{where}._target_: {error}".removeprefix(".")) from error
    last = where.rpartition(".")[2]
    if not where:
        needed: tuple[str, ...] = ("run",)
        what = "loop (it has no method run)"
    elif last in ("train_dataset", "offline_dataset"):
        needed, what = ("__len__", "require_dims"), "data set (see diffusion_rl.data.sequences.SequenceDataset)"
    elif last == "model":
        needed, what = ("KIND",), "policy (see diffusion_rl.policies)"
    else:
        needed, what = ("trainable_variables",), "network (a Keras layer or a tf.Module)"
    own = where and found.__module__.startswith((f"{PACKAGE}networks.", f"{PACKAGE}diffusion."))
    if not own and not all(hasattr(found, name) for name in needed):
        raise UserError(f"{where}._target_={target} is no {what}; refused".removeprefix("."))
    return found


def _check_annotation(key: str, value: Any, annotation: str) -> None:
    """Raise UserError if a plain value is not of the kind that the class says: true or false, a number, a whole one."""
    kinds = {"bool": "true or false", "int": "a whole number", "float": "a number"}
    kind, _, rest = str(annotation).partition(" | ")
    if kind not in kinds or rest not in ("", "None") or (value is None and rest):
        return
    number = isinstance(value, int | float) and not isinstance(value, bool)
    fits = {"bool": isinstance(value, bool), "int": number and float(value).is_integer(), "float": number}
    if not fits[kind]:
        raise UserError(f"{key}={value}: not {kinds[kind]}")


def _get(config: Mapping[str, Any], path: str, default: Any) -> Any:
    node: Any = config
    for part in path.split("."):
        if not isinstance(node, Mapping) or part not in node:
            return default
        node = node[part]
    return node
