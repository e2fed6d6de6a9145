"""VAE + Diffusion RL: from the YAML of an experiment to data, networks, environments, training and evaluation."""

from __future__ import annotations

import functools
import os
import re
import string
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from diffusion_rl.cli.experiments import META_KEYS, flat_variant, gpu_number, read_spec
from diffusion_rl.config import checks
from diffusion_rl.config.arguments import Arguments
from diffusion_rl.config.checks import Relation, at_most, check_ranges, multiple, number, positive, shown, whole
from diffusion_rl.config.compose import CONFIG_ROOT
from diffusion_rl.config.keys import unknown_key
from diffusion_rl.config.names import require_inside
from diffusion_rl.core.errors import UserError
from diffusion_rl.training import signals

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
KINDS = {bool: "true or false", int: "whole number", float: "number", str: "text"}
NULLABLE = ("latent_clip",)  # though their defaults are not null
FORMAT_LIMIT = 1000  # characters of job_name, and of a value in it
RANGES = {
    "seed": checks.SEED,
    # data
    "n_agents": whole(1, 1000),
    "horizon": whole(1, 10_000),
    "act_steps": whole(1, 10_000),
    "history_horizon": whole(0, 10_000),
    "max_path_length": whole(1, 10**9),
    "termination_penalty": number(),
    "discount": checks.SHARE,
    "returns_scale": positive(),
    # networks
    **dict.fromkeys(
        ("vae_latent_dim", "vae_hidden_dim", "trajectory_latent_dim", "trajectory_hidden_dim", "trajectory_heads"),
        checks.WIDTH,
    ),
    "backbone_hidden_dim": checks.WIDTH,
    "value_hidden_dim": checks.WIDTH,
    "time_embed_dim": whole(16, checks.WIDTH.most),
    "trajectory_layers": whole(1, 1000),
    "backbone_layers": whole(1, 1000),
    # diffusion
    "n_diffusion_steps": checks.DIFFUSION_STEPS,
    "n_ddim_steps": checks.DIFFUSION_STEPS,
    "ft_denoising_steps": whole(1, checks.DIFFUSION_STEPS.most, null=True),
    "latent_clip": positive(null=True),
    "condition_dropout": checks.SHARE,
    "condition_guidance_w": number(),
    "test_ret": number(),
    "sample_noise_scale": number(0),
    # training
    "vae_pretrain_steps": checks.FREQUENCY_OR_OFF,
    "n_train_steps": checks.STEPS,
    "n_steps_per_epoch": checks.STEPS,
    "batch_size": checks.BATCH,
    "gradient_accumulate_every": whole(1, 2**16),
    **dict.fromkeys(
        ("learning_rate", "vae_learning_rate", "q_lr", "rl_learning_rate", "value_learning_rate", "clip_grad_norm"),
        positive(1e38),
    ),
    **dict.fromkeys(("vae_kl_weight", "vae_weight", "bc_weight", "policy_weight"), number(0)),
    **dict.fromkeys(("ema_decay", "target_update_tau", "gae_lambda", "gamma_denoising"), checks.SHARE),
    "step_start_ema": checks.FREQUENCY_OR_OFF,
    "update_ema_every": checks.FREQUENCY,
    "rl_warmup_steps": checks.FREQUENCY_OR_OFF,
    "rl_collect_freq": checks.FREQUENCY,
    "rl_collect_steps": whole(1, 10**6),
    "rl_num_envs": checks.ENVS,
    "rl_update_freq": checks.FREQUENCY,
    "rl_batch_size": checks.BATCH,
    "replay_buffer_size": whole(1, 10**9),
    **dict.fromkeys(("policy_gradient_weight", "value_function_weight", "entropy_weight"), number(0)),
    **dict.fromkeys(("offline_rl_weight", "online_rl_weight"), number(0)),
    "reward_scale": positive(),
    "target_kl": number(0, null=True),
    "clip_ploss_coef": positive(),
    "clip_ploss_coef_base": positive(),
    "clip_ploss_coef_rate": positive(),
    "randn_clip_value": positive(),
    "min_sampling_denoising_std": number(0),
    "min_logprob_denoising_std": positive(),
    # writing
    "log_freq": checks.FREQUENCY,
    "save_freq": checks.FREQUENCY,
    "stop_at": whole(1, checks.STEPS.most, null=True),
    "eval_freq": checks.FREQUENCY_OR_OFF,
    "num_eval": whole(1, 10**6),
    "num_envs": checks.ENVS,
}
RELATIONS = (
    multiple("eval_freq", "save_freq"),
    at_most("act_steps", "horizon"),
    at_most("ft_denoising_steps", "n_diffusion_steps"),
    Relation(("time_embed_dim",), lambda width: width % 8 == 0, "time_embed_dim must be a multiple of 8"),
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
    Relation(
        ("stop_at", "rl_collect_freq"),
        lambda stop, every: stop is None or stop % every == 0,
        "stop_at must be a multiple of rl_collect_freq",
    ),
    multiple("rl_warmup_steps", "rl_collect_freq"),
    Relation(
        ("rl_collect_steps", "rl_num_envs", "rl_batch_size", "replay_buffer_size"),
        lambda steps, envs, batch, most: batch <= steps * envs <= most,
        "a collection has rl_collect_steps * rl_num_envs decisions: it must hold rl_batch_size and fit into "
        "replay_buffer_size",
    ),
)
spelling = "{}: {}".format
EVALUATION_KEYS = (
    "num_eval",
    "num_envs",
    "use_ddim_sample",
    "n_ddim_steps",
    "condition_guidance_w",
    "test_ret",
    "sample_noise_scale",
)


def options(arguments: Sequence[str]) -> Mapping[str, Any]:
    """`-e FILE [-g GPU]`: the experiment, with the GPU chosen before TensorFlow starts."""
    parser = Arguments(description="One experiment of VAE + Diffusion RL.")
    parser.add_argument("-e", "--experiment", required=True, help="YAML: a variant, or a specification with constants")
    parser.add_argument("-g", "--gpu", default="0", help="number of the GPU")
    given = parser.parse_args(list(arguments))
    os.environ["CUDA_VISIBLE_DEVICES"] = gpu_number(given.gpu)
    return flat_variant(read_spec(Path(given.experiment)), given.experiment)


def settings(variant: Mapping[str, Any]) -> dict[str, Any]:
    """Every key with its value: the defaults under the variant's.

    Raises:
        UserError: an unknown key, a class name that is not registered, a number out of its range, or a name that leads
            out of `logbase`.
    """
    defaults = default_settings()
    cfg = dict(defaults)
    for key, value in variant.items():
        if key not in defaults and key not in META_KEYS:
            raise UserError(unknown_key(key, defaults))
        cfg[key] = _checked(key, value, defaults.get(key))
    cfg |= asked_by_classes(cfg)
    check_numbers(cfg)
    cfg["exp_name"] = str(cfg.get("exp_name") or "vae_diffusion_rl")
    job = job_name(str(cfg["job_name"]), cfg)
    for key, name in (("exp_name", cfg["exp_name"]), ("job_name", job)):
        require_inside(name, spelling(key, name))
    cfg["logdir"] = str(Path(cfg["logbase"]) / cfg["exp_name"] / job / str(cfg["seed"]))
    cfg["name"], cfg["env_name"] = job.replace("/", "_"), cfg["dataset"]
    return cfg


@functools.cache
def default_settings() -> Mapping[str, Any]:
    """Every key with its default."""
    return MappingProxyType(read_spec(CONFIG_ROOT / "planning" / "vae_diffusion_rl.yaml"))


def asked_by_classes(cfg: Mapping[str, Any]) -> dict[str, Any]:
    """What the named classes ask for beyond the keys. Raises UserError for a name that is not registered."""
    asked: dict[str, Any] = {}
    for kind, classes in REGISTRY.items():
        if cfg[kind] not in classes:
            raise UserError(f"{kind} {shown(repr(cfg[kind]))} is unknown: choose one of {', '.join(classes)}")
        asked |= classes[cfg[kind]]
    return asked


def check_numbers(cfg: Mapping[str, Any]) -> None:
    """Raises UserError for a number out of its range, or numbers that do not go together."""
    relations = (*RELATIONS, *(ONLINE if cfg["online_training"] else ()))
    if cfg["use_ddim_sample"] or cfg["use_behavior_cloning"] or cfg["offline_rl"]:
        relations += DDIM
    check_ranges(cfg, RANGES, spelling, relations)


def _checked(key: str, value: Any, default: Any) -> Any:
    """The value, if it is of its default's kind; 1e6 is a whole number as well. Raises UserError."""
    if value is None and (default is None or key in NULLABLE):
        return value
    if default is None:
        wanted = {"data_dir": str, "wandb": dict}.get(key)
        if wanted is not None and not isinstance(value, wanted):
            raise UserError(f"{key}: {shown(value)} is no {'text' if wanted is str else 'mapping'}")
        return value
    if type(default) is int and isinstance(value, float) and value.is_integer():
        return int(value)
    kinds = (int, float) if type(default) is float else type(default)
    if not isinstance(value, kinds) or (isinstance(value, bool) and type(default) is not bool):
        raise UserError(f"{key}: {shown(repr(value))} is no {KINDS[type(default)]}")
    return value


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


def load_data(cfg: Mapping[str, Any]) -> Any:
    """The data of an experiment, `data.agent_windows.AgentEpisodes`."""
    from diffusion_rl.data.agent_windows import AgentEpisodes

    kind, name = cfg["env_type"], str(cfg["dataset"])
    if kind == "toy":
        from diffusion_rl.generate.toy_agents import toy_data

        return toy_data(int(cfg["n_agents"]), name.startswith("toy-discrete"))
    if kind == "d4rl":
        from diffusion_rl.data.locate import find_episodes

        return AgentEpisodes(find_episodes(name, cfg["data_dir"]), 1)
    from diffusion_rl.data.sources import agents

    return agents.load(kind, name, cfg["data_dir"], int(cfg["max_path_length"]), bool(cfg["discrete_action"]))


def build(cfg: Mapping[str, Any], sizes: Any) -> Any:
    """The networks of an experiment, drawn from its seed."""
    from diffusion_rl.core.noise import NoiseSource, initial_weights
    from diffusion_rl.methods.vae_latent.model import LatentDiffusionRL

    with initial_weights(NoiseSource(int(cfg["seed"]))):
        return LatentDiffusionRL(cfg, sizes)


def environment(cfg: Mapping[str, Any], sizes: Any, normalizer: Any, n_envs: int, seed: int) -> Any:
    """`n_envs` environments as the policy sees them."""
    from diffusion_rl.envs.agents import make_agent_env
    from diffusion_rl.methods.vae_latent.history import AgentHistoryEnv

    venv = make_agent_env(
        cfg["env_type"],
        str(cfg["dataset"]),
        n_envs,
        n_agents=sizes.n_agents,
        obs_dim=sizes.obs_dim,
        action_dim=sizes.action_dim,
        act_steps=int(cfg["act_steps"]),
        max_path_length=int(cfg["max_path_length"]),
        seed=seed,
    )
    padding = bool(cfg["use_zero_padding"])
    return AgentHistoryEnv(venv, normalizer, sizes.n_agents, int(cfg["history_horizon"]), sizes.discrete, padding)


def train(arguments: Sequence[str]) -> None:
    """`train.py`: one experiment from its YAML."""
    cfg = settings(options(arguments))
    _start_tensorflow()
    training = training_of(cfg)
    try:
        training.run()
    finally:
        for venv in (training.venv, training.eval_venv):
            if venv is not None:
                venv.close()


def training_of(cfg: dict[str, Any]) -> Any:
    """The loop of an experiment."""
    from diffusion_rl.data.agent_windows import AgentNormalizer, VAESequenceDataset
    from diffusion_rl.methods.vae_latent.model import Sizes
    from diffusion_rl.methods.vae_latent.training import VAEDiffusionTraining

    data = load_data(cfg)
    sizes = Sizes(
        data.n_agents,
        data.obs_dim,
        data.action_dim,
        int(cfg["horizon"]),
        int(cfg["history_horizon"]) + 1,
        data.discrete,
    )
    shared = bool(cfg["agent_share_parameters"])
    normalizer = AgentNormalizer.fit(data, cfg["normalizer"], shared)
    dataset = VAESequenceDataset(
        data,
        normalizer,
        sizes.horizon,
        int(cfg["history_horizon"]),
        **{key: cfg[key] for key in ("use_padding", "use_zero_padding", "max_path_length", "discount")},
        **{key: cfg[key] for key in ("returns_scale", "termination_penalty", "act_steps")},
    )
    algorithm, venv, eval_venv = build(cfg, sizes), None, None
    if cfg["online_training"]:
        venv = environment(cfg, sizes, normalizer, int(cfg["rl_num_envs"]), int(cfg["seed"]))
    if cfg["eval_freq"]:
        eval_venv = environment(cfg, sizes, normalizer, int(cfg["num_envs"]), int(cfg["seed"]))
    return VAEDiffusionTraining(cfg, algorithm, dataset, venv, eval_venv, {"sizes": sizes._asdict()})


def evaluate(arguments: Sequence[str]) -> None:
    """`script/evaluate_experiment.py`: checkpoints of a finished run, `log_dir` and `load_steps` of the YAML."""
    given = dict(options(arguments))
    known = (*EVALUATION_KEYS, "dataset", "log_dir", "load_steps", "overwrite", "evaluator", *META_KEYS)
    for key in given:
        if key not in known:
            raise UserError(unknown_key(key, known))
    if missing := [key for key in ("log_dir", "load_steps") if given.get(key) is None]:
        raise UserError(f"an evaluation needs {missing[0]}")
    steps = given["load_steps"] if isinstance(given["load_steps"], list) else [given["load_steps"]]
    check_ranges(given | {"load_steps": steps}, RANGES | {"load_steps": whole(0, many=True)}, spelling)
    for key, default in {**default_settings(), "log_dir": "logs", "overwrite": False}.items():
        if key in given:
            _checked(key, given[key], default)
    folder, overwrite = Path(given["log_dir"]), bool(given.get("overwrite", False))
    if not folder.is_dir():
        raise UserError(f"log_dir: {folder}: no such folder")
    _start_tensorflow()
    for step in map(int, steps):
        path = folder / "checkpoint" / f"state_{step}.safetensors"
        if not path.is_file():
            print(f"{path}: no such checkpoint, skipped", flush=True)
            continue
        evaluate_checkpoint(path, {k: given[k] for k in (*EVALUATION_KEYS, "dataset") if k in given}, overwrite)


def evaluate_checkpoint(path: Path, changes: Mapping[str, Any], overwrite: bool) -> Path:
    """Evaluate a checkpoint as its training would, except for `changes`; returns the path of the JSON.

    Raises:
        UserError: the checkpoint's facts are wrong, or its environment is a user's own ("module:Env"), whose module is
            imported only where `changes` name it.
    """
    from diffusion_rl.data.agent_windows import AgentNormalizer
    from diffusion_rl.methods.vae_latent.evaluation import (
        decoder,
        evaluate_policy,
        evaluating_actor,
        result_path,
        write_result,
    )
    from diffusion_rl.methods.vae_latent.model import LatentDiffusionRL, Sizes
    from diffusion_rl.methods.vae_latent.training import load_weights
    from diffusion_rl.training.checkpoint import load_checkpoint, require_finite, require_kind

    checkpoint = load_checkpoint(path)
    require_kind(checkpoint, LatentDiffusionRL.KIND, path)
    require_finite(checkpoint.select("model."), path)
    recorded, numbers = recorded_facts(checkpoint, path)
    if ":" in recorded["dataset"] and changes.get("dataset") != recorded["dataset"]:
        own = shown(recorded["dataset"])
        raise UserError(
            f"{path} was trained in {own}, whose module is imported only if you name it: add dataset: {own} to the "
            "evaluation"
        )
    cfg, sizes = {**recorded, **changes}, Sizes(**numbers)
    check_numbers(cfg)
    step, folder = int(checkpoint.metadata["itr"]), path.parent.parent
    result = result_path(folder, step, cfg)
    if result.is_file() and not overwrite:
        print(f"{result} exists, skipped (overwrite: true makes it anew)", flush=True)
        return result
    dims = (cfg["normalizer"], sizes.obs_dim, sizes.action_dim, sizes.discrete, bool(cfg["agent_share_parameters"]))
    normalizer = AgentNormalizer.of(checkpoint.select("normalizer."), *dims)
    algorithm = build(cfg, sizes)
    load_weights(algorithm, checkpoint)
    venv = environment(cfg, sizes, normalizer, int(cfg["num_envs"]), int(cfg["seed"]))
    try:
        found = evaluate_policy(decoder(algorithm), venv, cfg, evaluating_actor(algorithm, cfg))
    finally:
        venv.close()
    write_result(folder, step, found, cfg)
    print(f"{result}: mean return {found.returns.mean():.3f} of {len(found.returns)} episodes", flush=True)
    return result


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
        defaults = default_settings()
        cfg = {key: _checked(key, config.get(key, default), default) for key, default in defaults.items()}
        cfg |= asked_by_classes(cfg)
        check_numbers(cfg)
        limits = dict.fromkeys(DIMENSIONS, whole(1, checkpoint.largest_dimension))
        limits |= dict.fromkeys(LAYERS, whole(1, len(checkpoint.tensors)))
        check_ranges({**cfg, **sizes}, limits, spelling)
        if missing := set(Sizes._fields) - set(Sizes._field_defaults) - set(sizes):
            raise UserError(f"sizes lack {', '.join(sorted(missing))}")
        int(checkpoint.metadata["itr"])
        if sizes.keys() - set(Sizes._fields):
            raise UserError("sizes have facts that are not known")
    except (UserError, LookupError, TypeError, ValueError) as error:
        raise UserError(f"{path}: its facts are damaged ({error}): use another checkpoint") from error
    return cfg, sizes


def _start_tensorflow() -> None:
    with signals.held():
        from diffusion_rl.core.threads import configure_threads, silence_compiler

        configure_threads()
        silence_compiler()
