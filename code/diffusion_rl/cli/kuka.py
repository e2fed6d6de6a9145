"""Commands of the Kuka stacking task: training of the model and of the classifier that guides it, and episodes."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from diffusion_rl.cli.diffuser import ANOTHER_SUFFIX, beside, score_line, seed_of, train_model
from diffusion_rl.core.errors import UserError
from diffusion_rl.core.files import atomic_file, write_json
from diffusion_rl.core.noise import NoiseSource
from diffusion_rl.core.threads import configure_threads
from diffusion_rl.data.kuka import StackingDataset, read_trajectories
from diffusion_rl.envs.kuka import KukaStacking
from diffusion_rl.interop.diffuser_checkpoint import stacking_weights
from diffusion_rl.interop.torch_names import load_state_dict
from diffusion_rl.methods.diffuser.files import Description, Experiment, load_experiment, require_compatible
from diffusion_rl.methods.diffuser.kuka import MaskedDiffusion, StackClassification, StackingPlanner, StackingTrainer
from diffusion_rl.methods.diffuser.kuka_episodes import StackingTraining, run_episode
from diffusion_rl.methods.diffuser.options import Options, parse_command
from diffusion_rl.tasks.kuka_stacking import BEST_RETURN, TASKS, draw_task
from diffusion_rl.training.checkpoint import require_finite
from diffusion_rl.training.locks import locked


def train(arguments: Sequence[str]) -> None:
    """Trains the diffusion model of states (`scripts/train_kuka.py`)."""
    _train(parse_command("train_kuka", arguments))


def train_classifier(arguments: Sequence[str]) -> None:
    """Trains the classifier that guides plans (`scripts/train_kuka_classifier.py`)."""
    _train(parse_command("train_kuka_classifier", arguments))


def _train(options: Options) -> None:
    configure_threads()
    dataset = StackingDataset(read_trajectories(options.data_dir), options.horizon)
    print(f"{len(dataset.path_lengths)} trajectories, {len(dataset)} windows of {options.horizon} states")
    options.sample_freq = options.n_reference = 0  # there are no pictures of these
    train_model(options, dataset, describe(options, dataset), StackingTrainer, StackingTraining)


def describe(options: Options, dataset: StackingDataset) -> Description:
    """Returns the model that the options of an experiment ask for."""
    data = {"loader": "datasets.StackingDataset", "env": options.dataset, "horizon": options.horizon}
    sizes = {"horizon": options.horizon, "observation_dim": dataset.observation_dim, "action_dim": 0}
    diffusion: dict[str, Any] = {"class": options.diffusion, **sizes, "n_timesteps": options.n_diffusion_steps}
    model: dict[str, Any] = {"class": options.model}
    if options.model == "models.StackClassifier":
        model |= {"observation_dim": dataset.observation_dim, "hidden_dims": options.hidden_dims}
        model |= {"out_dim": dataset.labels.shape[1], "time_dim": options.time_dim}
    else:
        model |= {"horizon": options.horizon, "transition_dim": dataset.observation_dim}
        model |= {"dim": options.dim, "dim_mults": list(options.dim_mults)}
        diffusion |= {key: getattr(options, key) for key in ("loss_type", "clip_denoised", "predict_epsilon")}
    return Description(data | {"normalizer": dataset.normalizer}, model, diffusion)


def plan(arguments: Sequence[str]) -> None:
    """Runs episodes of stacking blocks, in PyBullet (`scripts/plan_kuka.py`)."""
    options = parse_command("plan_kuka", arguments)
    if options.task not in TASKS:
        raise UserError(f"--task {options.task}: choose one of {', '.join(TASKS)}")
    configure_threads()
    env = KukaStacking(options.urdf_dir)
    experiment, classifier = _load(options, MaskedDiffusion, "diffusion"), None
    epochs = {"epoch_diffusion": experiment.epoch}
    if options.task != "unconditional":
        guiding = _load(options, StackClassification, "classifier")
        require_compatible(experiment, guiding)
        classifier, epochs = guiding.model.model, epochs | {"epoch_classifier": guiding.epoch}
    planner = StackingPlanner(experiment.model, experiment.normalizers["observations"], classifier)
    folder, rng = Path(options.savepath), NoiseSource(seed_of(options))
    with contextlib.closing(env), locked(folder, ANOTHER_SUFFIX):
        options.save()
        scores = list[float]()
        for i in range(options.n_episodes):
            episode = run_episode(planner, env, draw_task(options.task, rng), rng, options.n_plans)
            total, own = episode.count.total, beside(folder, i)
            scores.append(total / BEST_RETURN)
            facts = {"return": total, "score": scores[-1], "step": len(episode.states) - 1, "term": False, **epochs}
            write_json(own / "rollout.json", facts)
            with atomic_file(own / "states.npy") as file:
                np.save(file, episode.states)
            print(f"episode {i} | return {total:.2f} | {score_line(np.array(scores), folder)}", flush=True)


def _load(options: Options, kind: type, part: str) -> Experiment:
    """Returns a trained model in its experiment's folder, or in a file of the PyTorch code (`--diffusion_loadpath
    x.pt`)."""
    path, epoch = getattr(options, f"{part}_loadpath"), getattr(options, f"{part}_epoch")
    if path.endswith(".pt"):
        return _original(options, Path(path))
    experiment = load_experiment(options.loadbase, options.dataset, path, epoch=epoch)
    if not isinstance(experiment.model, kind):
        raise UserError(
            f"{experiment.folder} holds no model of this kind ({part}): train one with python scripts/train_kuka.py"
        )
    return experiment


def _original(options: Options, path: Path) -> Experiment:
    """Returns the PyTorch code's model, whose normalizer is not in its file but made from the data."""
    dataset = StackingDataset(read_trajectories(options.data_dir), options.horizon)
    standard = parse_command("train_kuka", [])
    for key in ("horizon", "n_diffusion_steps", "dim", "dim_mults"):
        setattr(standard, key, getattr(options, key))
    model = describe(standard, dataset).build()
    weights = stacking_weights(path, model.n_timesteps)
    require_finite(weights, path)
    load_state_dict(model, weights)
    return Experiment(model, dataset.normalizers, dataset.normalizer, 0, path, options.dataset)
