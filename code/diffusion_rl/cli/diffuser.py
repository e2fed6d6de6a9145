"""The planners' commands: from options to data, models, training and plans."""

from __future__ import annotations

import contextlib
import functools
import secrets
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from diffusion_rl.core.errors import UserError
from diffusion_rl.core.files import write_json
from diffusion_rl.core.noise import NoiseSource, initial_weights
from diffusion_rl.core.threads import configure_threads
from diffusion_rl.data.locate import find_data, find_episodes
from diffusion_rl.data.trajectories import TrajectoryDataset
from diffusion_rl.diffusion.guidance import Guide
from diffusion_rl.envs import robomimic
from diffusion_rl.envs.interface import Observations
from diffusion_rl.envs.locomotion import LocomotionVectorEnv
from diffusion_rl.envs.make import make_vector_env
from diffusion_rl.envs.maze2d import Maze2D
from diffusion_rl.envs.video import film_plan
from diffusion_rl.methods.diffuser.action_only import aggregate
from diffusion_rl.methods.diffuser.files import (
    Description,
    Experiment,
    ExperimentFiles,
    dataset_of,
    load_experiment,
    only_model,
    recorded_seed,
    require_compatible,
)
from diffusion_rl.methods.diffuser.maze2d import follow_plan
from diffusion_rl.methods.diffuser.model import Decision, Diffuser, TrajectoryDiffusion, ValueDiffusion
from diffusion_rl.methods.diffuser.options import GO_ON, Options, going_on, names_in, parse_command
from diffusion_rl.methods.diffuser.pictures import Renderer
from diffusion_rl.methods.diffuser.planning import Episodes, run_episodes
from diffusion_rl.methods.diffuser.trainer import DiffuserTrainer
from diffusion_rl.methods.diffuser.training import DiffuserSettings, DiffuserTraining
from diffusion_rl.networks.temporal_unet import require_horizon
from diffusion_rl.reports.pictures import contact_sheet, save_maze, save_samples
from diffusion_rl.reports.progress import say
from diffusion_rl.tasks.registry import normalized_score, score, task_named
from diffusion_rl.training.continuation import Spelling, program
from diffusion_rl.training.locks import locked
from diffusion_rl.training.run_dir import RunDir

SPELLING = Spelling(GO_ON, "give another --logbase or --prefix", GO_ON)
PICTURES = 6  # frames of a plan in its picture
ANOTHER_SUFFIX = "give another --logbase or --suffix"


# ---------- training ----------


def train(arguments: Sequence[str]) -> None:
    """Trains a diffusion model of states and actions, or of actions alone (`scripts/train.py`)."""
    _train(parse_command("train", arguments))


def train_values(arguments: Sequence[str]) -> None:
    """Trains the value that guides plans (`scripts/train_values.py`)."""
    options = parse_command("train_values", arguments)
    if options.sample_freq:
        raise UserError(f"--sample_freq {options.sample_freq}: a value has no samples to draw: give 0")
    _train(options)


def continue_training(arguments: Sequence[str]) -> None:
    """Goes on with the latest checkpoint of the same experiment (`options.going_on` names the script)."""
    _train(going_on(parse_command("train", arguments)))


def _train(options: Options) -> None:
    configure_threads()
    options.home_made_data = find_data(options.dataset, options.data_dir).home_made
    episodes = find_episodes(options.dataset, options.data_dir)
    dataset = dataset_of(episodes, _dataset_description(options))
    train_model(options, dataset, describe(options, dataset))


def train_model(
    options: Options,
    dataset: TrajectoryDataset,
    description: Description,
    trainer_type: type[DiffuserTrainer] = DiffuserTrainer,
    training: type[DiffuserTraining] = DiffuserTraining,
) -> None:
    """Builds the described model and trains it as the options of an experiment ask for, in the experiment's folder."""
    options.seed = recorded_seed(options) if options.seed is None else options.seed
    rng, files = NoiseSource(seed_of(options)), ExperimentFiles(options, description)
    drawn = bool(options.sample_freq)
    renderer = Renderer(options.renderer, options.dataset, Path(options.savepath), say) if drawn else None
    try:
        with initial_weights(rng):
            model = description.build()
    except TypeError as error:
        raise UserError(f"--model {options.model} is no model for --diffusion {options.diffusion} ({error})") from error
    run = training(
        trainer_type(model, dataset, options.learning_rate * options.lr_scale, options.ema_decay),
        dataset,
        rng,
        DiffuserSettings.of(options),
        run_dir=RunDir(options.savepath, files.settings, files, replace(SPELLING, evaluate=_planning(options))),
        renderer=renderer,
        picture_rng=NoiseSource(options.seed + 1),
    )
    for line in run.report():
        print(line)
    run.check()
    run.run()


def _planning(options: Options) -> str:
    """Returns the command that plans with what these options train."""
    kind = str(options.prefix).partition("/")[0]
    script = {"kuka": "plan_kuka", "maze2d": "plan_maze2d"}.get(str(options.config).rpartition(".")[2])
    script = script or ("plan_guided" if kind == "values" else "plan_unguided")
    words = ["--dataset", options.dataset, "--config", options.config, "--logbase", options.logbase]
    words += ["--horizon", str(options.horizon), "--n_diffusion_steps", str(options.n_diffusion_steps)]
    return program(f"scripts/{script}.py", *map(str, words))


def seed_of(options: Options) -> int:
    """Returns the seed of the options, or one of the operating system's, which is printed."""
    if options.seed is None:
        options.seed = secrets.randbits(31)
        print(f"seed: {options.seed}")
    return int(options.seed)


def _dataset_description(options: Options) -> dict[str, Any]:
    """Returns what `dataset_of` needs to know."""
    facts: dict[str, Any] = {"loader": options.loader, "env": options.dataset}
    for key in ("horizon", "normalizer", "preprocess_fns", "use_padding", "max_path_length"):
        facts[key] = getattr(options, key)
    for key in ("termination_penalty", "discount", "normed"):
        if hasattr(options, key):
            facts[key] = getattr(options, key)
    return facts | ({"pictures": True} if getattr(options, "obs_type", "state_features") == "pixel" else {})


def describe(options: Options, dataset: TrajectoryDataset) -> Description:
    """Returns the model that the options of an experiment ask for, for this data."""
    sizes = {"observation_dim": dataset.observation_dim, "action_dim": dataset.action_dim}
    model: dict[str, Any] = {"class": options.model, "horizon": options.horizon, "dim_mults": list(options.dim_mults)}
    diffusion: dict[str, Any] = {"class": options.diffusion, "horizon": options.horizon, **sizes}
    diffusion |= {"n_timesteps": options.n_diffusion_steps, "loss_type": options.loss_type}
    kind = getattr(options, "diffusion_type", "states_actions")
    if kind not in ("states_actions", "actions_only"):
        raise UserError(f"--diffusion_type {kind}: choose states_actions or actions_only")
    if kind == "actions_only":
        model |= {"class": "models.ActionTemporalUnet", "transition_dim": dataset.action_dim}
        model |= {"observation_dim": dataset.observation_dim, "obs_embed": options.obs_embed}
        if dataset.images is not None:
            model |= {"image_shape": list(dataset.images.shape[1:]), "image_dim": options.image_dim}
        diffusion["class"] = "models.ActionDiffusion"
    elif dataset.images is not None:
        raise UserError("--obs_type pixel: pictures are not planned, only seen; add --diffusion_type actions_only")
    else:
        model["transition_dim"] = dataset.observation_dim + dataset.action_dim
    if options.model == "models.TemporalUnet":
        for index in getattr(options, "loss_weights", None) or {}:
            if int(index) >= dataset.observation_dim:
                raise UserError(f"--loss_weights: there is no observation {index}, they have {dataset.observation_dim}")
        model["attention"] = options.attention
        for key in ("clip_denoised", "predict_epsilon", "action_weight", "loss_weights", "loss_discount"):
            diffusion[key] = getattr(options, key)
    return Description(_dataset_description(options), model, diffusion)


# ---------- planning ----------


def _plan_options(command: str, arguments: Sequence[str]) -> Options:
    """Parses the options of a plan. Where they name no model explicitly and there is exactly one, that is taken."""
    options = parse_command(command, arguments)
    fixed = set(options.given)
    for key in ("diffusion_loadpath", "value_loadpath"):
        template = options.deferred.get(key, "")
        if template and key not in fixed:
            arguments = [*arguments, *only_model(options, key, fixed)]
            options = parse_command(command, arguments)
        fixed |= set(names_in(template))  # the value is of the same horizon and steps
    return options


def plan_guided(arguments: Sequence[str]) -> None:
    """Plans with the diffusion model, guided by the value (`scripts/plan_guided.py`)."""
    options = _plan_options("plan_guided", arguments)
    experiment = _trajectory_model(_load(options, options.diffusion_loadpath, options.diffusion_epoch))
    values = _load(options, options.value_loadpath, options.value_epoch)
    if not isinstance(values.model, ValueDiffusion):
        raise UserError(f"{values.folder} holds no value: train one with python scripts/train_values.py")
    Diffuser(experiment.model, experiment.normalizers, Guide(values.model.value))  # says what cannot be guided
    require_compatible(experiment, values)
    guide = Guide(
        values.model.value,
        scale=options.scale,
        n_guide_steps=options.n_guide_steps,
        t_stopgrad=options.t_stopgrad,
        scale_grad_by_std=options.scale_grad_by_std,
    )
    planner = Diffuser(experiment.model, experiment.normalizers, guide, options.batch_size)
    _plan(options, planner, {"epoch_diffusion": experiment.epoch, "epoch_value": values.epoch})


def plan_unguided(arguments: Sequence[str]) -> None:
    """Makes one plan of many samples without a value (`scripts/plan_unguided.py`)."""
    options = _plan_options("plan_unguided", arguments)
    experiment = _trajectory_model(_load(options, options.diffusion_loadpath, options.diffusion_epoch))
    planner = _unguided(experiment, options)
    _plan(options, planner, {"epoch_diffusion": experiment.epoch})


def plan_maze2d(arguments: Sequence[str]) -> None:
    """Plans from where the ball is to the goal, and follows the plan (`scripts/plan_maze2d.py`)."""
    configure_threads()
    options = _plan_options("plan_maze2d", arguments)
    where = options.logbase, options.dataset, options.diffusion_loadpath
    experiment = _trajectory_model(load_experiment(*where, epoch=options.diffusion_epoch).require_task(options.dataset))
    folder, rng = Path(options.savepath), NoiseSource(seed_of(options))
    planner = _unguided(experiment, options)
    env = Maze2D(options.dataset)
    normalized = functools.partial(normalized_score, options.dataset)

    def say(t: int, reward: float, total: float, observation: np.ndarray) -> None:
        if t % options.vis_freq == 0:
            where = f"position: {np.round(observation[:2], 2)} | goal: {env.target}"
            print(f"t: {t} | r: {reward:.2f} | R: {total:.2f} | score: {normalized(total):.4f} | {where}", flush=True)

    with locked(folder, ANOTHER_SUFFIX):
        options.save()
        scores, plans, ways, goals, titles = [], [], [], [], []
        for i in range(options.n_episodes):
            start, own = env.reset(rng), beside(folder, i)
            if options.conditional:
                env.draw_target(rng)
            episode = follow_plan(planner, env, rng, start, options.replan_every, say)
            scores.append(float(normalized(episode.episode_return)))
            facts = {"score": scores[-1], "return": episode.episode_return, "step": episode.step}
            plans.append(episode.plans.observations[0])
            ways.append(episode.observations)
            goals.append(env.target)
            titles.append(f"score {100 * scores[-1]:.0f}")
            save_maze(own / "0.png", env.cells != "#", plans[-1], env.target)
            save_maze(own / "rollout.png", env.cells != "#", episode.observations[None], env.target, titles[-1:])
            write_json(own / "rollout.json", {**facts, "term": False, "epoch_diffusion": experiment.epoch})
        if options.n_episodes > 1:
            first = np.stack([plan[0] for plan in plans])
            save_maze(folder / "plans.png", env.cells != "#", first, np.stack(goals), titles)
            save_maze(folder / "rollouts.png", env.cells != "#", np.stack(ways), np.stack(goals), titles)
        print(score_line(np.array(scores), folder))


def _trajectory_model(experiment: Experiment) -> Experiment:
    """Returns the experiment. Raises UserError where it holds something that makes no plans."""
    if not isinstance(experiment.model, TrajectoryDiffusion):
        raise UserError(f"{experiment.folder} holds no model of trajectories: train one with python scripts/train.py")
    return experiment


def _unguided(experiment: Experiment, options: Options) -> Diffuser:
    """Returns a planner without a value, whose horizon may be another than that of the training."""
    require_horizon(options.horizon, experiment.model.model.levels)
    horizon = None if experiment.model.horizon == options.horizon else options.horizon
    return Diffuser(experiment.model, experiment.normalizers, None, options.batch_size, horizon)


def _load(options: Options, loadpath: str, epoch: str) -> Experiment:
    configure_threads()
    experiment = load_experiment(options.loadbase, options.dataset, loadpath, epoch=epoch, data_dir=options.data_dir)
    options.home_made_data = getattr(options, "home_made_data", False) or experiment.home_made
    return experiment.require_task(options.dataset)


def _plan(options: Options, planner: Diffuser, epochs: dict[str, int]) -> None:
    folder, seed = Path(options.savepath), seed_of(options)
    model = planner.diffusion
    env = {"name": options.dataset, "n_envs": options.n_envs, "max_episode_steps": options.max_episode_length}
    env |= _cameras(options, model)
    venv = make_vector_env(env, obs_dim=model.observation_dim, action_dim=model.action_dim, act_steps=1, seed=seed)

    def say(t: int, rewards: np.ndarray, returns: np.ndarray, decision: Decision) -> None:
        if not options.verbose:
            return
        mean = float(np.mean(score(options.dataset, returns)))
        line = f"t: {t} | r: {rewards.mean():.2f} | R: {returns.mean():.2f} | score: {mean:.4f}"
        if planner.guide is not None:
            line += f" | values: {np.array2string(decision.values[0][:4], precision=2)} | scale: {options.scale}"
        print(line, flush=True)

    def show(t: int, observations: Observations, decision: Decision) -> None:
        if not options.render or t % options.vis_freq:
            return
        if decision.observations.shape[-1]:
            _film(venv, decision, folder / f"{t}_plan.mp4")
        else:
            seen, plan = observations.get("rgb"), aggregate(decision.actions[:1], options.aggregate)[0]
            save_samples(folder / f"{t}.png", decision.actions[0], plan, None if seen is None else seen[0])

    with contextlib.closing(venv), locked(folder, ANOTHER_SUFFIX):
        options.save()
        episodes = run_episodes(
            planner,
            venv,
            NoiseSource(seed),
            options.dataset,
            seed=seed,
            max_episode_length=options.max_episode_length,
            how=options.aggregate,
            n_exec=options.n_exec,
            clip_actions=options.clip_actions,
            video=str(folder / "rollout.mp4") if options.render else None,
            say=say,
            show=show,
        )
        _write(options, folder, episodes, epochs)


def _cameras(options: Options, model: Any) -> dict[str, Any]:
    """Returns what the `env` node says besides, for a task that is seen by cameras."""
    task, pictures = task_named(options.dataset), hasattr(model.model, "vision")
    if "obs_type" in options.given and (options.obs_type == "pixel") != pictures:
        raise UserError(f"--obs_type {options.obs_type}: {options.diffusion_loadpath} was trained on something else")
    if task is not None and task.simulator == "robomimic":
        return robomimic.env_node(task.name, pictures) | {"save_video": options.render}
    if pictures:
        raise UserError(f"{options.dataset}: there is no camera in it; models that see plan in robomimic's tasks")
    return {}


def _film(venv: Any, decision: Decision, path: Path) -> None:
    """Films the first environment's plan, and makes a picture of it with frames in a row."""
    if not isinstance(venv, LocomotionVectorEnv):
        raise UserError("--render True: plans can be filmed in the locomotion tasks only")
    film_plan(venv, 0, decision.observations[0, 0], decision.actions[0, 0], path)
    contact_sheet([path], path.with_name(path.name.replace("_plan.mp4", ".png")), PICTURES, "planned, simulated")


def _write(options: Options, folder: Path, episodes: Episodes, epochs: dict[str, int]) -> None:
    """Writes `rollout.json` of every environment (the others' in folders beside the first one's), statistics and
    times."""
    for i in range(len(episodes.returns)):
        facts = {"score": float(episodes.scores[i]), "return": float(episodes.returns[i])}
        facts |= {"step": int(episodes.steps[i]) - 1, "term": bool(episodes.terminated[i])}
        write_json(beside(folder, i) / "rollout.json", {**facts, **epochs})
    write_json(folder / "action_stats.json", episodes.action_statistics())
    sizes = {"batch_size": options.batch_size, "n_envs": options.n_envs}
    write_json(folder / "latency.json", {**sizes, **episodes.latency()})
    if getattr(options, "text_statistics", False):
        lines = "".join(f"{k}: {v}\n" for k, v in episodes.action_statistics().items())
        (folder / "std_mean_actions.txt").write_text(lines)
    print(score_line(episodes.scores, folder))
    for name, value in episodes.latency().items():
        print(f"{name.replace('_', ' ')}: {value:.2f}")


def beside(folder: Path, i: int) -> Path:
    """Returns where episode i goes: the first one to the folder, the others beside it."""
    return folder if i == 0 else folder.with_name(f"{folder.name}-{i}")


def score_line(scores: np.ndarray, folder: Path) -> str:
    """Reports mean and standard error of scores [episodes], in percent."""
    error = scores.std() / np.sqrt(len(scores))
    return f"score {100 * scores.mean():.1f} +/- {100 * error:.2f} over {len(scores)} episodes | {folder}"
