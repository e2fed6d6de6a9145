"""VAE + Diffusion RL: from the YAML of an experiment to data, networks, environments, training and evaluation."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from diffusion_rl.cli.experiments import flat_variant
from diffusion_rl.config.overrides import experiment_arguments, gpu_number, read_spec
from diffusion_rl.config.schema import shown
from diffusion_rl.core import quiet
from diffusion_rl.core.errors import UserError
from diffusion_rl.methods.vae_latent.options import (
    EVALUATION_KEYS,
    check_settings,
    evaluation_settings,
    help_on_keys,
    recorded_facts,
    settings,
)
from diffusion_rl.training import signals


def options(arguments: Sequence[str], evaluation: bool = False) -> Mapping[str, Any]:
    """Reads `-e FILE [-g GPU]`: the experiment, with the GPU chosen before TensorFlow starts."""
    what = "Checkpoints" if evaluation else "One experiment"
    parsed = experiment_arguments(f"{what} of VAE + Diffusion RL.", help_on_keys(evaluation)).parse_args(
        list(arguments)
    )
    os.environ["CUDA_VISIBLE_DEVICES"] = gpu_number(parsed.gpu)
    if evaluation and Path(parsed.experiment).is_dir():  # a run's folder: its last checkpoint
        states = Path(parsed.experiment).glob("checkpoint/state_*.safetensors")
        steps = sorted(int(path.stem.partition("_")[2]) for path in states)
        return {"log_dir": parsed.experiment, "load_steps": steps[-1:], "overwrite": True}
    return flat_variant(read_spec(Path(parsed.experiment)), parsed.experiment)


def load_data(cfg: Mapping[str, Any]) -> Any:
    """Returns the data of an experiment, `data.agent_windows.AgentEpisodes`."""
    from diffusion_rl.data.agent_windows import AgentEpisodes

    kind, name = cfg["env_type"], str(cfg["dataset"])
    if kind == "toy":
        from diffusion_rl.generate.agents import toy_data

        return toy_data(int(cfg["n_agents"]), name.startswith("toy-discrete"))
    if kind == "d4rl":
        from diffusion_rl.data.locate import find_episodes

        return AgentEpisodes(find_episodes(name, cfg["data_dir"]), 1)
    from diffusion_rl.data.sources import agents

    return agents.load(kind, name, cfg["data_dir"], int(cfg["max_path_length"]), bool(cfg["discrete_action"]))


def build(cfg: Mapping[str, Any], sizes: Any) -> Any:
    """Returns the networks of an experiment, drawn from its seed."""
    from diffusion_rl.core.noise import NoiseSource, initial_weights
    from diffusion_rl.methods.vae_latent.model import LatentDiffusionRL

    with initial_weights(NoiseSource(int(cfg["seed"]))):
        return LatentDiffusionRL(cfg, sizes)


def environment(cfg: Mapping[str, Any], sizes: Any, normalizer: Any, n_envs: int, seed: int) -> Any:
    """Makes `n_envs` environments as the policy sees them."""
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
    """Trains one experiment from its YAML (`train.py`)."""
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
    """Returns the loop of an experiment."""
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
    """Evaluates (`script/evaluate_experiment.py`) checkpoints of a finished run, `log_dir` and `load_steps` of the
    YAML, or the last one of a run whose folder takes the place of the YAML."""
    asked = evaluation_settings(options(arguments, evaluation=True))
    folder, changes = Path(asked["log_dir"]), {key: asked[key] for key in EVALUATION_KEYS if key in asked}
    _start_tensorflow()
    for step in map(int, asked["load_steps"]):
        path = folder / "checkpoint" / f"state_{step}.safetensors"
        if not path.is_file():
            print(f"{path}: no such checkpoint, skipped", flush=True)
            continue
        evaluate_checkpoint(path, changes, asked["overwrite"])


def evaluate_checkpoint(path: Path, changes: Mapping[str, Any], overwrite: bool) -> Path:
    """Evaluates a checkpoint as its training would, except for `changes`; returns the path of the JSON.

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
    check_settings(cfg)
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
        evaluation = evaluate_policy(decoder(algorithm), venv, cfg, evaluating_actor(algorithm, cfg))
    finally:
        venv.close()
    write_result(folder, step, evaluation, cfg)
    print(f"{result}: mean return {evaluation.returns.mean():.3f} of {len(evaluation.returns)} episodes", flush=True)
    return result


def _start_tensorflow() -> None:
    with signals.held():
        quiet.import_tensorflow()
        from diffusion_rl.core.threads import configure_threads, silence_compiler

        configure_threads()
        silence_compiler()
