"""Every configuration key that script/run.py reads, with what it means and may be; the check that finds misspelt ones.

Keys of objects (a mapping with a `_target_`, such as `model` or `train_dataset`) are the arguments of that class, and
are checked against its signature.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from diffusion_rl.config.instantiate import PACKAGE, find_class, flatten, parameters_of, targets
from diffusion_rl.config.reads import is_own, is_read, unread
from diffusion_rl.config.schema import (
    ABSENT,
    ANY,
    ENVS,
    FLAG,
    HYDRA,
    LIST,
    SEED,
    SHARE,
    STEPS,
    Kind,
    Option,
    at_most,
    check_kind,
    check_ranges,
    did_you_mean,
    near_words,
    number,
    one_of,
    positive,
    whole,
)
from diffusion_rl.core.errors import UserError

COUNT = whole(1, 10**6)  # of what lies in memory: dimensions, entries
SPAN = whole(1, 10**4)  # steps of a plan or of a history
NOT_NEGATIVE = number(0)  # a learning rate of 0 trains nothing
FROM_ZERO = whole(0, 10**12)
ROWS = whole(1, 10**8)  # of a minibatch: what is more than there are is cut
STEPS_OR_NONE = whole(1, 10**12, null=True)
DENOISING = whole(1, 10**4, null=True)

_TOP = {
    # the run
    "_target_": Option("the loop: a class of diffusion_rl.methods"),
    "suite": Option("family of tasks: first part of the log and data folders [ours]"),
    "stage": Option("pretrain, finetune, scratch or eval: second part of the log folder's name [ours]"),
    "project": Option("wandb's project; default <suite>-<environment>-<stage> [ours]"),
    "name": Option("name of the run: third part of the log folder"),
    "seed": Option("seed of weights, noise, minibatches and environments", SEED, default=42),
    "device": Option("cuda:N: N-th GPU if there is one, else the processor; cpu: never a GPU"),
    "data_dir": Option("folder of data sets and pre-trained policies; default $DPPO_DATA_DIR, else data [ours]"),
    "log_dir": Option("folder of all run folders; default $DPPO_LOG_DIR, else log [ours]"),
    "logdir": Option("this run's folder"),
    "resume": Option(
        "never | auto (newest folder of this name and seed) | a run folder or checkpoint [ours]", default="never"
    ),
    "tensorboard": Option("write TensorBoard events [ours]", FLAG, default=True),
    "wandb": Option("null: off; wandb.mode=online turns it on"),
    "wandb.mode": Option("online, offline or disabled"),
    "wandb.entity": Option("default $DPPO_WANDB_ENTITY, else wandb's own"),
    "wandb.project": Option("default `project`"),
    "wandb.run": Option("default <time>_<name>"),
    "ray.address": Option("local | auto (the cluster of this machine) | host:port of its head [ours]", default="local"),
    # the task
    "env_name": Option("the environment's name"),
    "task": Option("Furniture-Bench: the piece of furniture; avoiding: the set of demonstrations"),
    "mode": Option("avoiding: the gaps that the demonstrations take; only names the set"),
    "randomness": Option("Furniture-Bench: how much initial poses vary, low or med"),
    "obs_dim": Option("dimension O of one observation", COUNT),
    "action_dim": Option("dimension A of one action", COUNT),
    "cond_steps": Option("To, observations the policy sees", SPAN),
    "img_cond_steps": Option("Ti, the last of them that it sees as images", SPAN),
    "horizon_steps": Option("H, actions the policy plans", SPAN),
    "act_steps": Option("Ta, actions of a plan that are executed", SPAN),
    "denoising_steps": Option("K, denoising steps", DENOISING),
    "ft_denoising_steps": Option(
        "F, of which fine-tuned; in an evaluation 0 leaves it to the checkpoint", whole(0, 10**4), default=0
    ),
    "use_ddim": Option("sample with DDIM", FLAG),
    "ddim_steps": Option("its denoising steps", DENOISING),
    "num_modes": Option("M, components of a Gaussian mixture", DENOISING),
    "reward_horizon": Option(
        "actions of a chunk whose log-probabilities count in the policy loss; default act_steps", DENOISING
    ),
    # files
    "train_dataset_path": Option("pre-training data (npz)"),
    "normalization_path": Option("minima and maxima of observations and actions (npz)"),
    "base_policy_path": Option("policy to start from or to evaluate: .safetensors, or the reference's .pt"),
    "offline_dataset_path": Option("demonstrations of RLPD, IBRL and Cal-QL (npz)"),
    "robomimic_env_cfg_path": Option("robomimic's description of the environment (JSON)"),
    # environments
    "env": Option("in pre-training just the data set's name"),
    # evaluation
    "n_steps": Option("chunk steps S of an evaluation", STEPS),
    "render_num": Option("environments of which an evaluation makes videos", FROM_ZERO, default=0),
    # pre-training
    "ema.decay": Option("decay of the averaged weights", SHARE),
}
_ENV = {
    "engine": Option(
        "mujoco (locomotion batched and restorable) | gymnasium | d4rl (a process per environment) [ours]"
    ),
    "cluster": Option(
        "null: simulators on this machine | ray: at actors in a cluster [ours]", Kind("text", words=("ray",), null=True)
    ),
    "actors": Option("cluster: processes that simulate; default one for each core [ours]", whole(1, 10**5, null=True)),
    "nodes": Option("cluster: machines to wait for; default those that are there [ours]", whole(1, 10**5, null=True)),
    "collect": Option(
        "cluster: exact, the driver decides in every step | wide, actors decide, of rollouts of their own [ours]",
        one_of("exact", "wide"),
        default="exact",
    ),
    "spares": Option("cluster: processes ready to take over from late or lost ones [ours]", whole(0, 1000), default=0),
    "threads": Option("threads that step batched environments; default 2 [ours]", whole(1, 1024)),
    "worker_timeout": Option(
        "seconds that an environment's process may take to answer; default 600 [ours]", positive(null=True)
    ),
    "d4rl_time_limit": Option("steps after which D4RL ends an episode by itself; null: never [ours]", STEPS_OR_NONE),
    "env_type": Option("furniture: Furniture-Bench's simulator, all environments in one"),
    "name": Option("the environment's name"),
    "n_envs": Option("E, environments stepped together", ENVS),
    "max_episode_steps": Option("environment steps after which an episode is truncated", STEPS_OR_NONE),
    "reset_at_iteration": Option("start new episodes at each iteration", FLAG, default=True),
    "save_video": Option("write videos of evaluations to render/", FLAG, default=False),
    "render": Option("show environment 0 in a window", FLAG),
    "save_full_observations": Option("keep every observation, not only one per chunk", FLAG),
    "best_reward_threshold_for_success": Option(
        "an episode whose best chunk reward per action reaches it is a success", number(null=True)
    ),
    "robomimic_env_cfg_path": Option("robomimic: the description of the environment (JSON)"),
    "robosuite": Option(
        "robomimic: generation of the simulator, 1.4 or 1.5; default: that of the description [ours]", number(null=True)
    ),
    "reward_shaping": Option("robomimic: robosuite's shaped reward instead of 0 and 1; default false", FLAG),
    "reflections": Option("robomimic: images with the floor's reflections, slower; default false [ours]", FLAG),
    "wrappers.mujoco_locomotion_lowdim.normalization_path": Option(
        "statistics that normalise observations and actions"
    ),
    "wrappers.d3il_lowdim.normalization_path": Option("avoiding: statistics that normalise observations and actions"),
    "wrappers.multi_step.n_obs_steps": Option("observation history To"),
    "wrappers.multi_step.n_action_steps": Option("executed chunk Ta"),
    "wrappers.multi_step.max_episode_steps": Option("truncation of an episode"),
    "wrappers.multi_step.reset_within_step": Option("begin the next episode in the step that ended one", FLAG),
    "wrappers.multi_step.pass_full_observations": Option("infos carry every observation of the chunk", FLAG),
}
_TRAIN = {
    # pre-training
    "n_epochs": Option("passes over the data", STEPS),
    "learning_rate": Option("base learning rate", NOT_NEGATIVE),
    "weight_decay": Option("decoupled weight decay", NOT_NEGATIVE),
    "epoch_start_ema": Option(
        "epoch from which weights are averaged; until then they are copied", FROM_ZERO, default=20
    ),
    "update_ema_freq": Option("epochs between updates of the averaged weights", STEPS, default=10),
    "train_split": Option("share of the data trained on; the rest validates", positive(1), default=1),
    # reinforcement learning
    "n_train_itr": Option("iterations", STEPS),
    "n_critic_warmup_itr": Option("first iterations that train the critic only", FROM_ZERO),
    "n_steps": Option("chunk steps S collected per environment and iteration", whole(1, 10**7)),
    "gamma": Option("discount per chunk step", SHARE),
    "gae_lambda": Option("lambda of generalised advantage estimation", SHARE, default=0.95),
    "batch_size": Option("rows of a minibatch; in DPPO a row is one denoising step of one chunk", ROWS),
    "update_epochs": Option("passes over an iteration's data", STEPS),
    "reward_scale_running": Option("divide rewards by the running deviation of returns", FLAG, default=False),
    "reward_scale_const": Option("and multiply them with this", number(), default=1),
    "target_kl": Option(
        "stop an iteration's update when the approximate KL divergence exceeds this", positive(null=True)
    ),
    "ent_coef": Option("weight of the entropy bonus", number(), default=0),
    "vf_coef": Option("weight of the value loss", NOT_NEGATIVE, default=0),
    "max_grad_norm": Option("clip the actor's gradient to this norm", positive(null=True)),
    "use_bc_loss": Option("add a behaviour-cloning loss on the base policy's own samples", FLAG, default=False),
    "bc_loss_coeff": Option("its weight", NOT_NEGATIVE, default=0),
    "repeat_samples": Option(
        "show every sample ten times an epoch, five times with images (ReinFlow)", FLAG, default=False
    ),
    "lr_schedule": Option(
        "fixed, or adaptive_kl: learning rates follow the KL divergence, which stops nothing (ReinFlow)",
        one_of("fixed", "adaptive_kl"),
        default="fixed",
    ),
    "actor_update_freq": Option("iterations from one training of the actor to the next (ReinFlow)", STEPS, default=1),
    "actor_update_epoch": Option("steps of the actor along each gradient (ReinFlow)", COUNT, default=1),
    "clip_intermediate_actions": Option("clip the means of a flow's steps (ReinFlow)", FLAG, default=True),
    "account_for_initial_stochasticity": Option(
        "count the noise that a chain begins with in its log-probability (ReinFlow)", FLAG, default=True
    ),
    "max_noise_hold_ratio": Option(
        "share of the iterations in which the noise's upper bound stays (ReinFlow)", SHARE, default=0.35
    ),
    "max_noise_decay_ratio": Option(
        "where that bound ends: 0 at the lower one, 1 at its first value (ReinFlow)", SHARE, default=0.7
    ),
    "fast": Option("the compiled fast path; false: the plain one, same numbers, slower [ours]", FLAG, default=True),
    "precision": Option(
        "of wide products, mostly of backward passes: float32, or bfloat16 where the processor has it [ours]",
        one_of("float32", "bfloat16"),
        default="float32",
    ),
    "devices": Option("GPUs of this machine to which minibatches are dealt [ours]", whole(1, 1024), default=1),
    "replicas": Option("processes of a cluster that update together [ours]", whole(1, 10**4), default=1),
    "force_train": Option("train in every iteration, evaluations included", FLAG, default=False),
    "save_model_freq": Option("iterations (epochs) between checkpoints", STEPS),
    "stop_at": Option("end after this iteration (epoch) and go on another day; schedules stay [ours]", STEPS_OR_NONE),
    "val_freq": Option("iterations between evaluations (epochs between validations)", STEPS, default=100),
    "render.freq": Option("iterations between videos", STEPS, default=1),
    "render.num": Option("environments of which videos are made", FROM_ZERO, default=0),
    "eta_lr": Option("learning rate of a learned eta (model.learn_eta)", NOT_NEGATIVE),
    "eta_weight_decay": Option("its weight decay", NOT_NEGATIVE),
    "eta_update_interval": Option("updates of the actor between two of eta", STEPS, default=1),
    # algorithms on a replay buffer
    "replay_ratio": Option("how often each new transition is drawn for an update", positive()),
    "buffer_size": Option("rows kept: transitions, or steps of all environments (IDQL, QSM, DAWR, DACER)", STEPS),
    "scale_reward_factor": Option("factor on rewards", number()),
    "target_ema_rate": Option("share of the trained networks in a step of their targets", SHARE),
    "critic_tau": Option("share of the trained networks in a step of their targets (IDQL, QSM)", SHARE),
    "log_freq": Option("iterations between rows of the metrics", STEPS, default=1),
    "n_explore_steps": Option("first iterations, with random actions and without updates", FROM_ZERO),
    "n_eval_episode": Option("episodes of an evaluation", whole(1, 10**9)),
    "eta": Option("weight of the value against imitation (DQL)", number()),
    "q_grad_coeff": Option("factor on the critic's slope (QSM)", number()),
    "action_lr": Option("learning rate of actions (DIPO)", NOT_NEGATIVE),
    "action_gradient_steps": Option("steps that an action climbs (DIPO)", FROM_ZERO),
    "eval_deterministic": Option("evaluations without exploration noise (IDQL)", FLAG, default=False),
    "eval_sample_num": Option("samples among which a decision chooses (IDQL)", whole(1, 10**9)),
    "use_expectile_exploration": Option("choose by the value's expectile, not the best (IDQL)", FLAG),
    "beta": Option("inverse temperature of weights (DRWR, DAWR)", number()),
    "max_reward_weight": Option("largest weight (DRWR)", NOT_NEGATIVE),
    "max_adv_weight": Option("largest weight (DAWR)", NOT_NEGATIVE),
    "critic_update_ratio": Option("actor updates for each of the critic's (DAWR)", STEPS),
    "lr": Option("base learning rate (DRWR)", NOT_NEGATIVE),
    "init_temperature": Option("the temperature at the beginning (SAC, RLPD, Cal-QL, DACER)", positive()),
    "target_entropy": Option("entropy that the temperature aims at", number(null=True)),
    "temperature_lr": Option("learning rate of log alpha (DACER) [ours]", NOT_NEGATIVE),
    "temperature_interval": Option("critic steps between two updates of the temperature (DACER) [ours]", STEPS),
    "entropy_states": Option("states whose entropy is estimated then (DACER) [ours]", COUNT),
    "entropy_samples": Option("actions of each of them (DACER) [ours]", COUNT),
    "automatic_entropy_tuning": Option("learn the temperature (Cal-QL)", FLAG),
    "critic_replay_ratio": Option("rows drawn for the critic per step (SAC)", positive()),
    "actor_replay_ratio": Option("rows drawn for the actor per step (SAC)", positive()),
    "critic_num_update": Option("critic updates for each of the actor's (RLPD, IBRL)", COUNT),
    "update_freq": Option("iterations between updates (IBRL)", STEPS),
    "train_online": Option("collect in the environment too (Cal-QL, FQL)", FLAG),
    "num_update": Option("updates of an iteration, offline (Cal-QL) or always (DSRL, FQL)", FROM_ZERO),
    "noise_critic_num_update": Option(
        "updates of the noise critics in each iteration, after those of the critics (DSRL)", COUNT
    ),
    "n_episode_per_epoch": Option("episodes collected per iteration (Cal-QL)", FROM_ZERO),
    "n_random_actions": Option("random actions of the conservative term (Cal-QL)", COUNT),
    # images
    "augment": Option("shift the images of a rollout at random by up to 4 pixels", FLAG, default=False),
    "grad_accumulate": Option(
        "minibatches whose gradients are added up for a step of the optimizers", STEPS, default=1
    ),
    "logprob_batch_size": Option(
        "images that are looked at together between rollout and update; else no effect", whole(1, 10**9), default=1000
    ),
}
_SCHEDULE = {
    "first_cycle_steps": Option("iterations (epochs) of the first cosine cycle", STEPS),
    "warmup_steps": Option("iterations (epochs) of linear warm-up", FROM_ZERO),
    "min_lr": Option("learning rate at the cycle's ends", NOT_NEGATIVE),
}
_ROBOMIMIC = {
    "normalization_path": Option("statistics that normalise observations and actions"),
    "low_dim_keys": Option("parts of the state, in this order"),
    "clamp_obs": Option("clip the normalised state to [-1, 1]; default false"),
    "init_state": Option("simulator state that every episode begins with"),
    "render_hw": Option("height and width of videos; default 256 and 256"),
    "render_camera_name": Option("camera of videos; default agentview"),
}
_SHAPES = {
    "shape_meta.obs.rgb.shape": Option("[channels of all images, height, width]"),
    "shape_meta.obs.state.shape": Option("[O]"),
    "shape_meta.action.shape": Option("[A]"),
}


def _under(prefix: str, options: Mapping[str, Option]) -> dict[str, Option]:
    return {f"{prefix}{key}": option for key, option in options.items()}


OPTIONS: dict[str, Option] = {
    **_TOP,
    **_SHAPES,
    **_under("env.", _ENV),
    **_under("env.wrappers.robomimic_lowdim.", _ROBOMIMIC),
    **_under("env.wrappers.robomimic_image.", {**_ROBOMIMIC, **_SHAPES}),
    "env.wrappers.robomimic_image.image_keys": Option("cameras, in this order"),
    **_under("train.", _TRAIN),
    **_under("train.lr_scheduler.", _SCHEDULE),
}
for _which in ("actor", "critic", "eta"):
    OPTIONS |= _under(f"train.{_which}_lr_scheduler.", _SCHEDULE)
for _which in ("actor", "critic"):
    OPTIONS[f"train.{_which}_lr"] = Option(f"base learning rate of the {_which}", NOT_NEGATIVE)
    OPTIONS[f"train.{_which}_weight_decay"] = Option(f"decoupled weight decay of the {_which}", NOT_NEGATIVE)
OPTIONS |= dict.fromkeys(
    ("train.online_utd_ratio", "train.save_trajs", "env.use_image_obs", "env.wrappers.multi_step.verbose"),
    Option("accepted for the reference's command lines; has no effect here"),
)
KEYS: dict[str, str] = {key: option.meaning for key, option in OPTIONS.items()}
_POLICY = {
    **dict.fromkeys(("obs_dim", "action_dim"), COUNT),
    "horizon_steps": SPAN,
    **dict.fromkeys(("denoising_steps", "ddim_steps", "num_modes"), DENOISING),
    "ft_denoising_steps": whole(0, 10**4),
    "gamma_denoising": SHARE,
    **dict.fromkeys(("clip_ploss_coef", "clip_ploss_coef_base", "clip_vloss_coef"), number(0, null=True)),
    **dict.fromkeys(("denoised_clip_value", "randn_clip_value", "final_action_clip_value"), positive(null=True)),
}
#: Arguments of objects, wherever they stand.
_SIZES: dict[str, Kind] = {
    **dict.fromkeys(("mlp_dims", "cond_mlp_dims", "dim_mults"), whole(1, 10**6, null=True, many=True)),
    **dict.fromkeys(("time_dim", "cond_dim", "transformer_embed_dim", "transformer_num_heads", "depth"), COUNT),
    **dict.fromkeys(("dropout", "p_drop_emb", "p_drop_attn"), SHARE),
    "max_n_episodes": STEPS_OR_NONE,
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
#: Keyword arguments of an environment: anything goes.
OPEN = "env.specific."
#: Arguments that the reference's configurations pass to classes that ignore them.
IGNORED_ARGUMENTS = {"device", "residual_style", "input_dim", "mlp_dims", "action_dim", "rtol", "atol"}
MOST_NAMED = 6  # keys in one line
_HYDRA_ARGUMENTS = {"_target_", "_args_", "_partial_", "_recursive_", "_convert_"}


def unknown_key(key: str, known: Iterable[str]) -> str:
    """Returns the line about a key that is not there, with what was probably meant."""
    known = set(known) - {key}
    if key in KEYS:
        return f"'{key}' is not in this configuration, and nothing of it reads it"
    inside = sorted(other for other in known if other.startswith(f"{key}."))
    if inside:
        return f"'{key}' is a group of keys, not a value; it holds {_some(inside)}"
    leaf = key.rsplit(".", 1)[-1]
    same_leaf = sorted(other for other in known if other.rsplit(".", 1)[-1] == leaf)
    best = list(dict.fromkeys(same_leaf + near_words(key, known, cutoff=0.75)))[:3]
    hint = f"; did you mean {' or '.join(best)}?" if best else "; --help with this configuration lists them all"
    return f"unknown configuration key '{key}': nothing reads it{hint}"


def _some(keys: list[str], n: int = 5) -> str:
    return ", ".join(keys[:n]) + (", …" if len(keys) > n else "")


def check_keys(config: Mapping[str, Any], defaults: Mapping[str, Any], used: Collection[str] | None = None) -> None:
    """Raises UserError naming the keys of `config` that nothing reads, or the first whose value is of the wrong kind.

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
        if value is not None:
            check_kind(key, value, _kind_of(key, defaults.get(key)), HYDRA, defaults.get(key))
        known_here = key in KEYS or is_own(key, config) or (own_env and key.startswith("env."))
        if known_here or key.startswith((*objects, OPEN)):
            continue
        if not (value == {} and any(known.startswith(f"{key}.") for known in KEYS)):
            unknown.append(unknown_key(key, known))
    if not unknown and used is not None:
        unknown = [_not_read(key, config) for key in unread(config, used, (*objects, OPEN), defaults)]
    if unknown:
        more = f"; and {len(unknown) - MOST_NAMED} more" if len(unknown) > MOST_NAMED else ""
        raise UserError("; ".join(unknown[:MOST_NAMED]) + more)


def _not_read(key: str, config: Mapping[str, Any]) -> str:
    """Returns the line about a key that other configurations read and this one does not."""
    takers = [
        where
        for where, mapping in targets(config)
        if where and key in parameters_of(find_class(mapping["_target_"]))[0]
    ]
    hint = f"; did you mean {' or '.join(f'{where}.{key}' for where in takers)}?" if takers else ""
    return f"'{key}' does nothing here: nothing of this configuration reads it{hint}"


def _kind_of(key: str, default: Any) -> Kind:
    """Returns what a key may be; where nothing describes it, true or false, a number or a list as its default is."""
    kind = OPTIONS[key].kind if key in OPTIONS else ANY
    like = {bool: FLAG, int: number(), float: number(), list: LIST}
    return like.get(type(default), ANY) if kind is ANY else kind


def check_numbers(config: Mapping[str, Any]) -> None:
    """Raises UserError naming the first number of a plain, resolved configuration that is out of its range."""
    flat = flatten(config)
    kinds = {key: _SIZES[key.rpartition(".")[2]] for key in flat if "." in key and key.rpartition(".")[2] in _SIZES}
    kinds |= {key: option.kind for key, option in OPTIONS.items() if option.kind.type.endswith("number")}
    check_ranges(flat, kinds | {f"model.{key}": kind for key, kind in _POLICY.items()}, HYDRA, RELATIONS)


def complete(config: dict[str, Any]) -> None:
    """Gives the optional keys that a plain configuration reads and does not name their values.

    Optional keys without a value (`train.max_grad_norm`, say) stay away.
    """
    if not str(config.get("_target_")).startswith(PACKAGE):
        return
    for key, option in OPTIONS.items():
        *groups, last = key.split(".")
        if option.default is ABSENT or not is_read(key, config, ()):
            continue
        if groups and not isinstance(config.get(groups[0]), dict):
            continue
        node = config
        for group in groups:
            node = node.setdefault(group, {})
        node.setdefault(last, option.default)


def check_arguments(config: Mapping[str, Any]) -> None:
    """Raises UserError for an argument that the class of its `_target_` does not take. Imports those classes."""
    for where, mapping in targets(config):
        cls = _class_at(where, mapping["_target_"])
        if not where:
            continue
        accepted, anything = parameters_of(cls)
        for key, value in mapping.items():
            if key in accepted and key not in IGNORED_ARGUMENTS:
                _check_annotation(f"{where}.{key}", value, accepted[key].annotation)
            if anything or key in accepted or key in _HYDRA_ARGUMENTS or key in IGNORED_ARGUMENTS:
                continue
            hint = did_you_mean(str(key), accepted, f"{where}.{{}}") or f"; it takes {', '.join(sorted(accepted))}"
            raise UserError(
                f"unknown configuration key '{where}.{key}': {mapping['_target_']} has no such argument{hint}"
            )


def _class_at(where: str, target: str) -> type:
    """Returns the class of a `_target_`, if it can stand in that place. Raises UserError; nothing is built."""
    try:
        cls = find_class(target)
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
    own = where and cls.__module__.startswith((f"{PACKAGE}networks.", f"{PACKAGE}diffusion."))
    if not own and not all(hasattr(cls, name) for name in needed):
        raise UserError(f"{where}._target_={target} is no {what}; refused".removeprefix("."))
    return cls


def _check_annotation(key: str, value: Any, annotation: str) -> None:
    """Raises UserError if a plain value is not of the kind that the class says: true or false, a number, a whole
    one."""
    kind, _, rest = str(annotation).partition(" | ")
    kinds: dict[str, Kind] = {"bool": FLAG, "int": whole(), "float": number()}
    if kind in kinds and rest in ("", "None") and not (value is None and rest):
        check_kind(key, value, kinds[kind], HYDRA)


def _get(config: Mapping[str, Any], path: str, default: Any) -> Any:
    node: Any = config
    for part in path.split("."):
        if not isinstance(node, Mapping) or part not in node:
            return default
        node = node[part]
    return node
