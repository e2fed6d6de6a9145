"""The keys of an experiment of VAE + Diffusion RL (`train.py -e FILE.yaml`): kinds, ranges, relations, meanings.

Their defaults stand in cfg/planning/vae_diffusion_rl.yaml.
"""

from __future__ import annotations

import functools
import re
import string
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from diffusion_rl.config.compose import CONFIG_ROOT
from diffusion_rl.config.overrides import META_KEYS, as_whole, help_rows, meanings
from diffusion_rl.config.schema import (
    BATCH,
    DIFFUSION_STEPS,
    ENVS,
    FILE,
    FLAG,
    FREQUENCY,
    FREQUENCY_OR_OFF,
    MAPPING_OR_NONE,
    RATE,
    SEED,
    SHARE,
    STEPS,
    TEXT,
    TEXT_OR_NONE,
    WIDTH,
    Option,
    Relation,
    at_most,
    check,
    check_kind,
    check_ranges,
    multiple,
    multiple_of,
    number,
    positive,
    require_inside,
    shown,
    unknown_option,
    whole,
)
from diffusion_rl.config.yaml_files import read_yaml
from diffusion_rl.core.errors import UserError

# The class names of published experiments and what they ask for beyond the keys.
REGISTRY: dict[str, dict[str, dict[str, Any]]] = {
    "diffusion": {"models.DiffusionRL": {}, "models.OfflineDiffusionRL": {}},
    "model": {"models.DiffusionBackbone": {}},
    "loader": {"datasets.VAESequenceDataset": {}},
    "trainer": {
        "utils.Trainer": {},
        "utils.OfflineRLTrainer": {"offline_rl": True},
        "utils.OnlineRLTrainer": {"online_training": True},
    },
    "evaluator": {"utils.MADEvaluator": {}, "utils.VAEDiffusionEvaluator": {}},
}
FORMAT_LIMIT = 1000  # characters of job_name, and of a value in it
OPTIONS = {
    # what is run
    "seed": Option("seed of every draw", SEED),
    "job_name": Option("the run's folder, from {keys} of this list", TEXT),
    "logbase": Option("folder of all experiments", TEXT),
    "continue_training": Option("go on with the newest checkpoint of the run's folder", FLAG),
    "tensorboard": Option("write TensorBoard events", FLAG),
    "fast": Option("act with compiled networks; they are the same to rounding", FLAG),
    "wandb": Option("null: off; {mode: online}", MAPPING_OR_NONE),
    **{key: Option(f"one of {', '.join(REGISTRY[key])}", TEXT) for key in REGISTRY},
    # data
    "env_type": Option("toy, d4rl, mpe; of smac, smacv2, mamujoco, mahalfcheetah only the data", TEXT),
    "dataset": Option("toy, toy-discrete; a D4RL name; simple_spread-medium; 3m-Good; module:Environment", TEXT),
    "data_dir": Option("folder or file; null: where such data usually are", TEXT_OR_NONE),
    "n_agents": Option("agents of the toy task; otherwise the data say", whole(1, 1000)),
    "discrete_action": Option("actions are discrete; the toy task's follows from its name", FLAG),
    "horizon": Option("actions planned", whole(1, 10_000)),
    "act_steps": Option("actions of a plan that are executed", whole(1, 10_000)),
    "history_horizon": Option("rows of the past that are seen beside the present one", whole(0, 10_000)),
    "normalizer": Option("how data are scaled", TEXT),
    "agent_share_parameters": Option("agents share their networks and the scales of their data", FLAG),
    "use_padding": Option("windows may reach beyond the end of an episode", FLAG),
    "use_zero_padding": Option("what is beyond is zero; false: the first or last row again", FLAG),
    "max_path_length": Option("longest episode", whole(1, 10**9)),
    "termination_penalty": Option("added to the last reward of a terminated episode", number()),
    "discount": Option("discount of returns", SHARE),
    "returns_scale": Option("returns are divided by this", positive()),
    # networks
    "vae_latent_dim": Option("width of an action's latent", WIDTH),
    "vae_hidden_dim": Option("width of the VAE's layers", WIDTH),
    "trajectory_encoder": Option("encoder of the past: transformer, lstm or gru", TEXT),
    "trajectory_latent_dim": Option("width of its output", WIDTH),
    "trajectory_hidden_dim": Option("width of its layers", WIDTH),
    "trajectory_layers": Option("its layers", whole(1, 1000)),
    "trajectory_heads": Option("heads of its attention", WIDTH),
    "backbone": Option("the denoising network: attention or mlp", TEXT),
    "backbone_layers": Option("its layers", whole(1, 1000)),
    "backbone_hidden_dim": Option("width of its layers", WIDTH),
    "time_embed_dim": Option("width of the embedding of the denoising step", whole(16, WIDTH.most)),
    "value_hidden_dim": Option("width of the value's layers", WIDTH),
    "decentralized_execution": Option("false: agents see each other's pasts and latents", FLAG),
    # diffusion
    "n_diffusion_steps": Option("denoising steps of a sample", DIFFUSION_STEPS),
    "predict_epsilon": Option("the network predicts noise, not the clean latent", FLAG),
    "latent_clip": Option("bound on estimates of clean latents; null: none", positive(null=True)),
    "returns_condition": Option("the network is told the return", FLAG),
    "condition_dropout": Option("share of windows whose return is not told", SHARE),
    "condition_guidance_w": Option("weight of classifier-free guidance", number()),
    "test_ret": Option("the return asked for when acting, already divided by returns_scale", number()),
    "use_ddim_sample": Option("evaluate with DDIM", FLAG),
    "n_ddim_steps": Option("its denoising steps", DIFFUSION_STEPS),
    "sample_noise_scale": Option("scale of the noise in evaluations; MADiff: 0.5", number(0)),
    # stages 0 and 1: offline
    "vae_pretrain_steps": Option("steps of stage 0, in which the VAE learns alone", FREQUENCY_OR_OFF),
    "vae_learning_rate": Option("learning rate of the VAE", RATE),
    "vae_kl_weight": Option("weight of its KL divergence", number(0)),
    "vae_weight": Option("weight of its loss in stage 1", number(0)),
    "freeze_vae": Option("the VAE learns in stage 0 only", FLAG),
    "detach_latents": Option("false: the diffusion loss reaches the encoder", FLAG),
    "sample_latents": Option("denoise samples of the posterior instead of its means", FLAG),
    "use_behavior_cloning": Option("add a loss on the actions of samples", FLAG),
    "bc_weight": Option("its weight", number(0)),
    "n_train_steps": Option("training steps", STEPS),
    "n_steps_per_epoch": Option("accepted; the loop has no epochs", STEPS),
    "batch_size": Option("rows of a minibatch", BATCH),
    "gradient_accumulate_every": Option("minibatches of a training step", whole(1, 2**16)),
    "learning_rate": Option("learning rate of the diffusion model", RATE),
    "clip_grad_norm": Option("gradients are clipped to this norm", RATE),
    "ema_decay": Option("decay of the averaged weights", SHARE),
    "step_start_ema": Option("step from which weights are averaged; until then they are copied", FREQUENCY_OR_OFF),
    "update_ema_every": Option("steps between updates of the averaged weights", FREQUENCY),
    # stage 2: Q-learning on the data
    "offline_rl": Option("stage 2: Q-learning on the data", FLAG),
    "q_lr": Option("learning rate of the critics", RATE),
    "policy_weight": Option("weight of the critics' value in the policy's loss", number(0)),
    "target_update_tau": Option("share of the critics in a step of their targets", SHARE),
    # stage 3: online
    "online_training": Option("stage 3: DPPO on the denoising chain of the latents", FLAG),
    "rl_warmup_steps": Option("steps of stages 1 and 2 before it", FREQUENCY_OR_OFF),
    "rl_collect_freq": Option("steps between collections", FREQUENCY),
    "rl_collect_steps": Option("decisions of a collection in each environment", whole(1, 10**6)),
    "rl_num_envs": Option("environments that collect", ENVS),
    "rl_update_freq": Option("steps between updates of the policy; the others are offline steps", FREQUENCY),
    "rl_batch_size": Option("decisions of an update, each with all its fine-tuned denoising steps", BATCH),
    "rl_learning_rate": Option("learning rate of the policy", RATE),
    "value_learning_rate": Option("learning rate of the value", RATE),
    "replay_buffer_size": Option("decisions that a collection may hold", whole(1, 10**9)),
    "use_value_function": Option("false: normalised returns in place of advantages", FLAG),
    "policy_gradient_weight": Option("weight of the policy's loss", number(0)),
    "value_function_weight": Option("weight of the value's loss", number(0)),
    "entropy_weight": Option("weight of the entropy, which the noise schedule fixes", number(0)),
    "offline_rl_weight": Option("weight of the offline loss", number(0)),
    "online_rl_weight": Option("weight of the online loss", number(0)),
    "reward_scale": Option("factor on rewards", positive()),
    "reward_scale_running": Option("divide rewards by the running deviation of the return", FLAG),
    "gae_lambda": Option("lambda of generalised advantage estimation", SHARE),
    "target_kl": Option("no more updates on a collection once the policy has moved so far", number(0, null=True)),
    "ft_denoising_steps": Option(
        "the last denoising steps, which are fine-tuned; null: all", whole(1, DIFFUSION_STEPS.most, null=True)
    ),
    "gamma_denoising": Option("discount of a denoising step's advantage", SHARE),
    "clip_ploss_coef": Option("clipping of the policy's ratio in the last denoising step", positive()),
    "clip_ploss_coef_base": Option("clipping in the first one", positive()),
    "clip_ploss_coef_rate": Option("how it grows between them", positive()),
    "randn_clip_value": Option("bound of the noise of a denoising step", positive()),
    "min_sampling_denoising_std": Option("least deviation of a denoising step when acting", number(0)),
    "min_logprob_denoising_std": Option("least deviation in log-probabilities", positive()),
    # writing
    "log_freq": Option("steps between rows of the metrics", FREQUENCY),
    "save_freq": Option("steps between checkpoints", FREQUENCY),
    "eval_freq": Option("steps between evaluations, a multiple of save_freq; 0: none", FREQUENCY_OR_OFF),
    "num_eval": Option("episodes of an evaluation", whole(1, 10**6)),
    "num_envs": Option("environments that evaluate", ENVS),
}
RELATIONS = (
    multiple("eval_freq", "save_freq"),
    at_most("act_steps", "horizon"),
    at_most("ft_denoising_steps", "n_diffusion_steps"),
    multiple_of("time_embed_dim", 8),
    Relation(
        ("trajectory_hidden_dim", "trajectory_heads", "trajectory_encoder"),
        lambda width, heads, kind: kind != "transformer" or width % heads == 0,
        "trajectory_hidden_dim must be a multiple of trajectory_heads",
    ),
    Relation(
        ("backbone_hidden_dim", "backbone"),
        lambda width, kind: kind != "attention" or width % 4 == 0,
        "backbone_hidden_dim must be a multiple of 4, the heads of its attention",
    ),
)
DDIM = (at_most("n_ddim_steps", "n_diffusion_steps"),)  # where it is used
ONLINE = (
    multiple("save_freq", "rl_collect_freq"),
    multiple("rl_warmup_steps", "rl_collect_freq"),
    Relation(
        ("rl_collect_steps", "rl_num_envs", "rl_batch_size", "replay_buffer_size"),
        lambda steps, envs, batch, most: batch <= steps * envs <= most,
        "a collection has rl_collect_steps * rl_num_envs decisions: it must hold rl_batch_size and fit into "
        "replay_buffer_size",
    ),
)
#: Of an evaluation (`script/evaluate_experiment.py`): what it may change, and keys of its own.
EVALUATION_KEYS = (
    *("num_eval", "num_envs", "use_ddim_sample", "n_ddim_steps", "condition_guidance_w", "test_ret"),
    *("sample_noise_scale", "dataset"),
)
EVALUATION = {
    "log_dir": Option("folder of the run", TEXT),
    "load_steps": Option("steps of the checkpoints: a number or a list", whole(0, many=True)),
    "overwrite": Option("evaluate again what has a result", FLAG, default=False),
    "evaluator": OPTIONS["evaluator"],
    **{key: OPTIONS[key] for key in EVALUATION_KEYS},
}


@functools.cache
def default_settings() -> Mapping[str, Any]:
    """Every key with its default."""
    return MappingProxyType(read_yaml(CONFIG_ROOT / "planning" / "vae_diffusion_rl.yaml"))


def settings(variant: Mapping[str, Any]) -> dict[str, Any]:
    """Every key with its value: the defaults under the variant's.

    Raises:
        UserError: an unknown key, a class name that is not registered, a number out of its range, or a name that leads
            out of `logbase`.
    """
    cfg = {**default_settings(), **conform(variant, OPTIONS, "an experiment")}
    cfg |= asked_by_classes(cfg)
    check_settings(cfg)
    cfg["exp_name"] = str(cfg.get("exp_name") or "vae_diffusion_rl")
    job = job_name(cfg["job_name"], cfg)
    for key, name in (("exp_name", cfg["exp_name"]), ("job_name", job)):
        require_inside(name, FILE(key, name))
    cfg["logdir"] = str(Path(cfg["logbase"]) / cfg["exp_name"] / job / str(cfg["seed"]))
    cfg["resume"] = "auto" if cfg["continue_training"] else "never"
    cfg["name"], cfg["env_name"] = job.replace("/", "_"), cfg["dataset"]
    return cfg


def conform(given: Mapping[str, Any], options: Mapping[str, Option], what: str) -> dict[str, Any]:
    """The given values, each of its option's type; 1e6 is a whole number as well.

    what: owns the options.

    Raises:
        UserError: an unknown key, or a value of another type.
    """
    conformed = dict(given)
    for key, value in given.items():
        if key in options:
            check_kind(key, value, options[key].kind, FILE)
            conformed[key] = as_whole(value, options[key].kind)
        elif key not in META_KEYS:
            raise unknown_option(key, options, what, FILE)
    return conformed


def evaluation_settings(variant: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of an evaluation, `load_steps` as a list.

    Raises:
        UserError: an unknown or missing key, or a value that is not allowed.
    """
    given = dict(variant)
    if isinstance(given.get("load_steps"), int | float):
        given["load_steps"] = [given["load_steps"]]
    given = {"overwrite": False} | conform(given, EVALUATION, "an evaluation")
    if missing := [key for key in ("log_dir", "load_steps") if key not in given]:
        raise UserError(f"an evaluation needs {missing[0]}")
    check(given, EVALUATION, FILE)
    if not Path(given["log_dir"]).is_dir():
        raise UserError(f"log_dir: {given['log_dir']}: no such folder")
    return given


def asked_by_classes(cfg: Mapping[str, Any]) -> dict[str, Any]:
    """What the named classes ask for beyond the keys. Raises UserError for a name that is not registered."""
    asked: dict[str, Any] = {}
    for kind, classes in REGISTRY.items():
        if cfg[kind] not in classes:
            raise UserError(f"{kind} {shown(repr(cfg[kind]))} is unknown: choose one of {', '.join(classes)}")
        asked |= classes[cfg[kind]]
    return asked


def check_settings(cfg: Mapping[str, Any]) -> None:
    """Raise UserError for a value that is not allowed, or values that do not go together."""
    relations = (*RELATIONS, *(ONLINE if cfg["online_training"] else ()))
    if cfg["use_ddim_sample"] or cfg["use_behavior_cloning"] or cfg["offline_rl"]:
        relations += DDIM
    check(cfg, OPTIONS, FILE, relations)


def job_name(template: str, cfg: Mapping[str, Any]) -> str:
    """The text with {keys} replaced by values; widths and precisions have two digits at most."""
    try:
        if len(template) > FORMAT_LIMIT:
            raise UserError(f"job_name has {len(template)} characters: {FORMAT_LIMIT} are allowed")
        for _, name, spec, _ in string.Formatter().parse(template):
            if name is not None and name not in cfg:
                raise UserError(f"job_name: {{{name}}} is no key of the experiment")
            if re.search(r"[{}]|\d{3}", spec or ""):
                raise UserError(f"job_name: {{{name}:{spec}}}: a width has two digits at most, and no names in it")
            if name is not None and len(str(cfg[name])) > FORMAT_LIMIT:
                raise UserError(f"job_name: {name} is too long for a name")
        return template.format(**cfg)
    except (ValueError, IndexError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"job_name {template!r} is no format string: {error}") from error


def help_on_keys(evaluation: bool = False) -> str:
    """The keys of an experiment (or of an evaluation) with their defaults and meanings."""
    options = EVALUATION if evaluation else OPTIONS
    values = {key: "" if evaluation else default_settings()[key] for key in options}
    title = "Keys of the file:" if evaluation else "Keys of the file and their defaults:"
    return f"{title}\n{help_rows(values, meanings(options))}"


# ---------- what a checkpoint records ----------

# Facts that are a dimension of some tensor, and counts of layers that have tensors.
DIMENSIONS = (
    *("vae_latent_dim", "vae_hidden_dim", "trajectory_latent_dim", "trajectory_hidden_dim", "backbone_hidden_dim"),
    *("time_embed_dim", "value_hidden_dim", "obs_dim", "action_dim", "n_agents", "horizon", "steps"),
)
LAYERS = ("trajectory_layers", "backbone_layers")


def recorded_facts(checkpoint: Any, path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Settings and sizes that a checkpoint records, of the types and ranges that they have in an experiment.

    Raises:
        UserError: one is not, or declares more than the checkpoint's tensors hold.
    """
    from diffusion_rl.methods.vae_latent.model import Sizes

    try:
        config, sizes = dict(checkpoint.metadata["config"]), dict(checkpoint.metadata["sizes"])
        known = {key: config[key] for key in default_settings() if key in config}
        cfg = {**default_settings(), **conform(known, OPTIONS, "an experiment")}
        cfg |= asked_by_classes(cfg)
        check_settings(cfg)
        limits = dict.fromkeys(DIMENSIONS, whole(1, checkpoint.largest_dimension))
        limits |= dict.fromkeys(LAYERS, whole(1, len(checkpoint.tensors)))
        check_ranges({**cfg, **sizes}, limits, FILE)
        if missing := set(Sizes._fields) - set(Sizes._field_defaults) - set(sizes):
            raise UserError(f"sizes lack {', '.join(sorted(missing))}")
        int(checkpoint.metadata["itr"])
        if sizes.keys() - set(Sizes._fields):
            raise UserError("sizes have facts that are not known")
    except (UserError, LookupError, TypeError, ValueError) as error:
        raise UserError(f"{path}: its facts are damaged ({error}): use another checkpoint") from error
    return cfg, sizes
