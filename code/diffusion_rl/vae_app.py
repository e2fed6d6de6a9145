"""VAE + Diffusion RL: from the YAML of an experiment to data, networks, environments, training and evaluation."""

from __future__ import annotations

import argparse
import os
import string
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from diffusion_rl.config_keys import unknown_key
from diffusion_rl.configs import CONFIG_ROOT
from diffusion_rl.core.errors import UserError
from diffusion_rl.experiments import META_KEYS, flat_variant, read_spec

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
    parser = argparse.ArgumentParser(description="One experiment of VAE + Diffusion RL.")
    parser.add_argument("-e", "--experiment", required=True, help="YAML: a variant, or a specification with constants")
    parser.add_argument("-g", "--gpu", default="0", help="number of the GPU")
    given = parser.parse_args(list(arguments))
    os.environ["CUDA_VISIBLE_DEVICES"] = given.gpu
    return flat_variant(read_spec(Path(given.experiment)), given.experiment)


def settings(variant: Mapping[str, Any]) -> dict[str, Any]:
    """Every key with its value: the defaults under the variant's.

    Raises:
        UserError: an unknown key, or a class name that is not registered.
    """
    defaults = read_spec(CONFIG_ROOT / "planning" / "vae_diffusion_rl.yaml")
    cfg = dict(defaults)
    for key, value in variant.items():
        if key not in defaults and key not in META_KEYS:
            raise UserError(unknown_key(key, defaults))
        cfg[key] = _checked(key, value, defaults.get(key))
    for kind, classes in REGISTRY.items():
        if cfg[kind] not in classes:
            raise UserError(f"{kind} {cfg[kind]!r} is unknown: choose one of {', '.join(classes)}")
        cfg |= classes[cfg[kind]]
    cfg["exp_name"] = str(cfg.get("exp_name") or "vae_diffusion_rl")
    job = job_name(str(cfg["job_name"]), cfg)
    cfg["logdir"] = str(Path(cfg["logbase"]) / cfg["exp_name"] / job / str(cfg["seed"]))
    cfg["resume"] = "auto" if cfg["continue_training"] else "never"
    cfg["name"], cfg["env_name"] = job.replace("/", "_"), cfg["dataset"]
    return cfg


def _checked(key: str, value: Any, default: Any) -> Any:
    """The value, if it is of its default's kind; 1e6 is a whole number as well. Raises UserError."""
    if default is None or (value is None and key in NULLABLE):
        return value
    if type(default) is int and isinstance(value, float) and value.is_integer():
        return int(value)
    wanted = (int, float) if type(default) is float else type(default)
    if not isinstance(value, wanted) or (isinstance(value, bool) and type(default) is not bool):
        raise UserError(f"{key}: {value!r} is no {KINDS[type(default)]}")
    return value


def job_name(template: str, cfg: Mapping[str, Any]) -> str:
    """The text with {keys} replaced by values."""
    try:
        names = [name for _, name, _, _ in string.Formatter().parse(template) if name is not None]
        if bad := [name for name in names if name not in cfg]:
            raise UserError(f"job_name: {{{bad[0]}}} is no key of the experiment")
        return template.format(**cfg)
    except (ValueError, IndexError) as error:
        raise UserError(f"job_name {template!r} is no format string: {error}") from error


def load_data(cfg: Mapping[str, Any]) -> Any:
    """The data of an experiment, `data.agent_windows.AgentEpisodes`."""
    from diffusion_rl.data.agent_windows import AgentEpisodes

    kind, name = cfg["env_type"], str(cfg["dataset"])
    if kind == "toy":
        from diffusion_rl.loops.toy_agent_data import toy_data

        return toy_data(int(cfg["n_agents"]), name.startswith("toy-discrete"))
    if kind == "d4rl":
        from diffusion_rl.loops.planner_files import find_episodes

        return AgentEpisodes(find_episodes(name, cfg["data_dir"]), 1)
    from diffusion_rl.data.sources import agents

    return agents.load(kind, name, cfg["data_dir"], int(cfg["max_path_length"]), bool(cfg["discrete_action"]))


def build(cfg: Mapping[str, Any], sizes: Any) -> Any:
    """The networks of an experiment, drawn from its seed."""
    from diffusion_rl.algorithms.vae_diffusion_rl import LatentDiffusionRL
    from diffusion_rl.core.noise import NoiseSource, initial_weights

    with initial_weights(NoiseSource(int(cfg["seed"]))):
        return LatentDiffusionRL(cfg, sizes)


def environment(cfg: Mapping[str, Any], sizes: Any, normalizer: Any, n_envs: int, seed: int) -> Any:
    """`n_envs` environments as the policy sees them."""
    from diffusion_rl.envs.agents import make_agent_env
    from diffusion_rl.loops.agent_history import AgentHistoryEnv

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
    from diffusion_rl.algorithms.vae_diffusion_rl import Sizes
    from diffusion_rl.data.agent_windows import AgentNormalizer, VAESequenceDataset
    from diffusion_rl.loops.vae_training import VAEDiffusionTraining, check_schedule

    check_schedule(cfg)
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
    known = (*EVALUATION_KEYS, "log_dir", "load_steps", "overwrite", "evaluator", *META_KEYS)
    for key in given:
        if key not in known:
            raise UserError(unknown_key(key, known))
    if missing := [key for key in ("log_dir", "load_steps") if given.get(key) is None]:
        raise UserError(f"an evaluation needs {missing[0]}")
    _start_tensorflow()
    folder, overwrite = Path(given["log_dir"]), bool(given.get("overwrite", False))
    steps = given["load_steps"]
    steps = steps if isinstance(steps, list) else [steps]
    for step in steps:
        path = folder / "checkpoint" / f"state_{step}.safetensors"
        if not path.is_file():
            print(f"{path}: no such checkpoint, skipped", flush=True)
            continue
        evaluate_checkpoint(path, {k: given[k] for k in EVALUATION_KEYS if k in given}, overwrite)


def evaluate_checkpoint(path: Path, changes: Mapping[str, Any], overwrite: bool) -> Path:
    """Evaluate a checkpoint as its training would, except for `changes`; returns the path of the JSON."""
    from diffusion_rl.algorithms.vae_diffusion_rl import LatentDiffusionRL, Sizes
    from diffusion_rl.data.agent_windows import AgentNormalizer
    from diffusion_rl.loops.agent_evaluation import (
        decoder,
        evaluate_policy,
        evaluating_actor,
        result_path,
        write_result,
    )
    from diffusion_rl.loops.run_state import load_checkpoint, require_kind
    from diffusion_rl.loops.vae_training import load_weights

    checkpoint = load_checkpoint(path)
    require_kind(checkpoint, LatentDiffusionRL.KIND, path)
    cfg, sizes = {**checkpoint.metadata["config"], **changes}, Sizes(**checkpoint.metadata["sizes"])
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


def _start_tensorflow() -> None:
    from diffusion_rl.core.threads import configure_threads, silence_compiler

    configure_threads()
    silence_compiler()
