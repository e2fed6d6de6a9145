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

from diffusion_rl.config import schema
from diffusion_rl.config.compose import CONFIG_ROOT
from diffusion_rl.config.overrides import META_KEYS, as_whole, comments, help_rows, meanings
from diffusion_rl.config.yaml_files import read_yaml
from diffusion_rl.core.errors import UserError
from diffusion_rl.core.places import output_folder

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
#: What keys may be; any other one is of the type of its default. Their meanings stand beside their defaults.
KINDS = {
    "seed": schema.SEED,
    "wandb": schema.MAPPING_OR_NONE,
    # data
    "data_dir": schema.TEXT_OR_NONE,
    "n_agents": schema.whole(1, 1000),
    **dict.fromkeys(("horizon", "act_steps"), schema.whole(1, 10_000)),
    "history_horizon": schema.whole(0, 10_000),
    "max_path_length": schema.whole(1, 10**9),
    "termination_penalty": schema.number(),
    "discount": schema.SHARE,
    **dict.fromkeys(("returns_scale", "reward_scale"), schema.positive()),
    # networks
    **dict.fromkeys(("vae_latent_dim", "vae_hidden_dim", "backbone_hidden_dim", "value_hidden_dim"), schema.WIDTH),
    **dict.fromkeys(("trajectory_latent_dim", "trajectory_hidden_dim", "trajectory_heads"), schema.WIDTH),
    "time_embed_dim": schema.whole(16, schema.WIDTH.most),
    **dict.fromkeys(("trajectory_layers", "backbone_layers"), schema.whole(1, 1000)),
    # diffusion
    **dict.fromkeys(("n_diffusion_steps", "n_ddim_steps"), schema.DIFFUSION_STEPS),
    "ft_denoising_steps": schema.whole(1, schema.DIFFUSION_STEPS.most, null=True),
    "latent_clip": schema.positive(null=True),
    "condition_dropout": schema.SHARE,
    **dict.fromkeys(("condition_guidance_w", "test_ret"), schema.number()),
    **dict.fromkeys(("sample_noise_scale", "min_sampling_denoising_std"), schema.number(0)),
    # training
    **dict.fromkeys(("vae_pretrain_steps", "step_start_ema", "rl_warmup_steps", "eval_freq"), schema.FREQUENCY_OR_OFF),
    **dict.fromkeys(("n_train_steps", "n_steps_per_epoch", "update_ema_every", "log_freq", "save_freq"), schema.STEPS),
    **dict.fromkeys(("rl_collect_freq", "rl_update_freq"), schema.STEPS),
    "stop_at": schema.whole(1, schema.STEPS.most, null=True),
    **dict.fromkeys(("batch_size", "rl_batch_size"), schema.BATCH),
    "gradient_accumulate_every": schema.whole(1, 2**16),
    **dict.fromkeys(
        ("learning_rate", "vae_learning_rate", "q_lr", "rl_learning_rate", "value_learning_rate"), schema.RATE
    ),
    "clip_grad_norm": schema.RATE,
    **dict.fromkeys(
        ("vae_kl_weight", "vae_weight", "bc_weight", "policy_weight", "policy_gradient_weight"), schema.number(0)
    ),
    **dict.fromkeys(
        ("value_function_weight", "entropy_weight", "offline_rl_weight", "online_rl_weight"), schema.number(0)
    ),
    **dict.fromkeys(("ema_decay", "target_update_tau", "gae_lambda", "gamma_denoising"), schema.SHARE),
    **dict.fromkeys(("rl_collect_steps", "num_eval"), schema.whole(1, 10**6)),
    **dict.fromkeys(("rl_num_envs", "num_envs"), schema.ENVS),
    "replay_buffer_size": schema.whole(1, 10**9),
    "target_kl": schema.number(0, null=True),
    **dict.fromkeys(("clip_ploss_coef", "clip_ploss_coef_base", "clip_ploss_coef_rate"), schema.positive()),
    **dict.fromkeys(("randn_clip_value", "min_logprob_denoising_std"), schema.positive()),
}
RELATIONS = (
    schema.multiple("eval_freq", "save_freq"),
    schema.at_most("act_steps", "horizon"),
    schema.at_most("ft_denoising_steps", "n_diffusion_steps"),
    schema.multiple_of("time_embed_dim", 8),
    schema.Relation(
        ("trajectory_hidden_dim", "trajectory_heads", "trajectory_encoder"),
        lambda width, heads, kind: kind != "transformer" or width % heads == 0,
        "trajectory_hidden_dim must be a multiple of trajectory_heads",
    ),
    schema.Relation(
        ("backbone_hidden_dim", "backbone"),
        lambda width, kind: kind != "attention" or width % 4 == 0,
        "backbone_hidden_dim must be a multiple of 4, the heads of its attention",
    ),
)
DDIM = (schema.at_most("n_ddim_steps", "n_diffusion_steps"),)  # where it is used
ONLINE = (
    schema.multiple("save_freq", "rl_collect_freq"),
    schema.multiple("rl_warmup_steps", "rl_collect_freq"),
    schema.Relation(
        ("stop_at", "rl_collect_freq"),
        lambda stop, every: stop is None or stop % every == 0,
        "stop_at must be a multiple of rl_collect_freq",
    ),
    schema.Relation(
        ("rl_collect_steps", "rl_num_envs", "rl_batch_size", "replay_buffer_size"),
        lambda steps, envs, batch, most: batch <= steps * envs <= most,
        "a collection has rl_collect_steps * rl_num_envs decisions: it must hold rl_batch_size and fit into "
        "replay_buffer_size",
    ),
)
#: What an evaluation (`script/evaluate_experiment.py`) may change, and its own keys.
EVALUATION_KEYS = (
    *("num_eval", "num_envs", "use_ddim_sample", "n_ddim_steps", "condition_guidance_w", "test_ret"),
    *("sample_noise_scale", "dataset"),
)
EVALUATION = {
    "log_dir": schema.Option("folder of the run", schema.TEXT),
    "load_steps": schema.Option("steps of the checkpoints: a number or a list", schema.whole(0, many=True)),
    "overwrite": schema.Option("evaluate again what has a result", schema.FLAG, default=False),
}
DEFAULTS = CONFIG_ROOT / "planning" / "vae_diffusion_rl.yaml"


@functools.cache
def default_settings() -> Mapping[str, Any]:
    """Returns every key with its default."""
    return MappingProxyType(read_yaml(DEFAULTS))


def settings(variant: Mapping[str, Any]) -> dict[str, Any]:
    """Returns every key with its value: the defaults under the variant's.

    Raises:
        UserError: an unknown key, a class name that is not registered, a number out of its range, or a name that leads
            out of `logbase`.
    """
    cfg = {**default_settings(), "logbase": output_folder(default_settings()["logbase"])}
    cfg |= conform(variant, experiment_kinds(), "an experiment")
    cfg |= asked_by_classes(cfg)
    check_settings(cfg)
    cfg["exp_name"] = str(cfg.get("exp_name") or "vae_diffusion_rl")
    job = job_name(cfg["job_name"], cfg)
    for key, name in (("exp_name", cfg["exp_name"]), ("job_name", job)):
        schema.require_inside(name, schema.FILE(key, name))
    cfg["logdir"] = str(Path(cfg["logbase"]) / cfg["exp_name"] / job / str(cfg["seed"]))
    cfg["name"], cfg["env_name"] = job.replace("/", "_"), cfg["dataset"]
    return cfg


@functools.cache
def experiment_kinds() -> Mapping[str, schema.Kind]:
    """Returns what each key of an experiment may be."""
    return {key: KINDS.get(key) or schema.kind_like(default) for key, default in default_settings().items()}


def conform(values: Mapping[str, Any], kinds: Mapping[str, schema.Kind], what: str) -> dict[str, Any]:
    """Returns the values, each of its key's type; 1e6 is a whole number as well.

    what: owns the keys.

    Raises:
        UserError: an unknown key, or a value of another type.
    """
    conformed = dict(values)
    for key, value in values.items():
        if key in kinds:
            schema.check_kind(key, value, kinds[key], schema.FILE)
            conformed[key] = as_whole(value, kinds[key])
        elif key not in META_KEYS:
            raise schema.unknown_option(key, kinds, what, schema.FILE)
    return conformed


def evaluation_settings(variant: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the keys of an evaluation, `load_steps` as a list.

    Raises:
        UserError: an unknown or missing key, or a value that is not allowed.
    """
    kinds = {key: option.kind for key, option in EVALUATION.items()}
    kinds |= {key: experiment_kinds()[key] for key in (*EVALUATION_KEYS, "evaluator")}
    values = dict(variant)
    if isinstance(values.get("load_steps"), int | float):
        values["load_steps"] = [values["load_steps"]]
    values = {"overwrite": False} | conform(values, kinds, "an evaluation")
    if missing := [key for key in ("log_dir", "load_steps") if key not in values]:
        raise UserError(f"an evaluation needs {missing[0]}")
    schema.check_ranges(values, kinds, schema.FILE)
    if not Path(values["log_dir"]).is_dir():
        raise UserError(f"log_dir: {values['log_dir']}: no such folder")
    return values


def asked_by_classes(cfg: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what the named classes ask for beyond the keys. Raises UserError for a name that is not registered."""
    asked: dict[str, Any] = {}
    for kind, classes in REGISTRY.items():
        if cfg[kind] not in classes:
            raise UserError(f"{kind} {schema.shown(repr(cfg[kind]))} is unknown: choose one of {', '.join(classes)}")
        asked |= classes[cfg[kind]]
    return asked


def check_settings(cfg: Mapping[str, Any]) -> None:
    """Raises UserError for a value that is not allowed, or values that do not go together."""
    relations = (*RELATIONS, *(ONLINE if cfg["online_training"] else ()))
    if cfg["use_ddim_sample"] or cfg["use_behavior_cloning"] or cfg["offline_rl"]:
        relations += DDIM
    schema.check_ranges(cfg, KINDS, schema.FILE, relations)


def job_name(template: str, cfg: Mapping[str, Any]) -> str:
    """Returns the text with {keys} replaced by values; widths and precisions have two digits at most."""
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
    """Returns the keys of an experiment (or of an evaluation) with their defaults and meanings."""
    meaning, values = comments(DEFAULTS), dict(default_settings())
    if evaluation:
        meaning |= meanings(EVALUATION)
        values = dict.fromkeys((*EVALUATION, *EVALUATION_KEYS), "")
    return f"Keys of the file{'' if evaluation else ' and their defaults'}:\n{help_rows(values, meaning)}"


# ---------- what a checkpoint records ----------

# Facts that are a dimension of some tensor, and counts of layers that have tensors.
DIMENSIONS = (
    *("vae_latent_dim", "vae_hidden_dim", "trajectory_latent_dim", "trajectory_hidden_dim", "backbone_hidden_dim"),
    *("time_embed_dim", "value_hidden_dim", "obs_dim", "action_dim", "n_agents", "horizon", "steps"),
)
LAYERS = ("trajectory_layers", "backbone_layers")


def recorded_facts(checkpoint: Any, path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns settings and sizes that a checkpoint records, of the types and ranges that they have in an experiment.

    Raises:
        UserError: one is not, or declares more than the checkpoint's tensors hold.
    """
    from diffusion_rl.methods.vae_latent.model import Sizes

    try:
        config, sizes = dict(checkpoint.metadata["config"]), dict(checkpoint.metadata["sizes"])
        known = {key: config[key] for key in default_settings() if key in config}
        cfg = {**default_settings(), **conform(known, experiment_kinds(), "an experiment")}
        cfg |= asked_by_classes(cfg)
        check_settings(cfg)
        limits = dict.fromkeys(DIMENSIONS, schema.whole(1, checkpoint.largest_dimension))
        limits |= dict.fromkeys(LAYERS, schema.whole(1, len(checkpoint.tensors)))
        schema.check_ranges({**cfg, **sizes}, limits, schema.FILE)
        if missing := set(Sizes._fields) - set(Sizes._field_defaults) - set(sizes):
            raise UserError(f"sizes lack {', '.join(sorted(missing))}")
        int(checkpoint.metadata["itr"])
        if sizes.keys() - set(Sizes._fields):
            raise UserError("sizes have facts that are not known")
    except (UserError, LookupError, TypeError, ValueError) as error:
        raise UserError(f"{path}: its facts are damaged ({error}): use another checkpoint") from error
    return cfg, sizes
