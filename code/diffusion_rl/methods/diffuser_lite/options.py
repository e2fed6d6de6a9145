"""DiffuserLite's options: `task=NAME mode=MODE key=value …` over cfg/planning/diffuserlite/<domain>.yaml."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from diffusion_rl.config.compose import CONFIG_ROOT
from diffusion_rl.config.instantiate import flatten
from diffusion_rl.config.overrides import YAML, assignments, help_rows, meanings, override, split_help
from diffusion_rl.config.schema import (
    BATCH,
    DEVICE,
    ENVS,
    FLAG,
    FREQUENCY,
    PAIRS,
    RATE,
    SEED,
    SHARE,
    STEPS,
    TEXT,
    TEXT_OR_NONE,
    WIDTH,
    Kind,
    Option,
    Relation,
    check,
    kind_like,
    multiple_of,
    number,
    one_of,
    positive,
    require_inside,
    shown,
    step_or,
    whole,
)
from diffusion_rl.config.yaml_files import read_yaml
from diffusion_rl.core.errors import UserError

FOLDER = CONFIG_ROOT / "planning" / "diffuserlite"
MODES = ("training", "prepare_dataset", "reflow", "inference", "benchmark")
TASKS = {"mujoco": ("hopper", "halfcheetah", "walker2d"), "kitchen": ("kitchen",), "antmaze": ("antmaze",)}
SAMPLING_STEPS = whole(1, 10_000)
PAIR_COUNT = whole(1, 10**9)
OPTIONS = {
    "task": Option("a file of cfg/planning/diffuserlite/task", TEXT),
    "pipeline_name": Option("folder of the checkpoints in results_dir", TEXT),
    "mode": Option("what is done", one_of("iql_training", *MODES)),
    "seed": Option("seed of every draw", SEED),
    "device": Option("cpu: leave GPUs alone", DEVICE),
    # environment
    "terminal_penalty": Option("last reward of a terminated episode; null: its own", number(null=True)),
    "noreaching_penalty": Option("last reward of an episode that took all its time; null: its own", number(null=True)),
    "discount": Option("discount of returns", SHARE),
    # network
    "emb_dim": Option("width of the embeddings of time and return", whole(8, WIDTH.most)),
    "d_model": Option("width of the transformers", whole(2, WIDTH.most)),
    "n_heads": Option("heads of their attention", WIDTH),
    "depth": Option("their blocks", whole(1, 1000)),
    "standard_residual": Option("true: the block of the DiT paper; the authors' weights need false", FLAG),
    "backbone": Option("rectified flow, or our reconstruction of the paper's variant D", one_of("flow", "diffusion")),
    "next_obs_loss_weight": Option("weight of the next observation in the loss", number(0)),
    "ema_rate": Option("decay of the averaged weights", SHARE),
    # training
    "learning_rate": Option("learning rate of the levels", RATE),
    "invdyn_learning_rate": Option("learning rate of inverse dynamics", RATE),
    "diffusion_gradient_steps": Option("training steps of the levels", STEPS),
    "invdyn_gradient_steps": Option("training steps of inverse dynamics", whole(0, STEPS.most)),
    "iql_gradient_steps": Option("training steps of the value", STEPS),
    "iql_hidden_dim": Option("width of the value's layers", WIDTH),
    "iql_batch_size": Option("rows of its minibatches", BATCH),
    "iql_target_updates": Option("steps of its target after each update", whole(1, 1000)),
    "mask_padding": Option("true: inverse dynamics do not learn from padding", FLAG),
    "batch_size": Option("rows of a minibatch", BATCH),
    "log_interval": Option("steps between rows of the log", FREQUENCY),
    "save_interval": Option("steps between checkpoints", FREQUENCY),
    "keep_every": Option(
        "keep the first of every so many steps' checkpoints and the latest; null: all",
        whole(1, FREQUENCY.most, null=True),
    ),
    "keep_states": Option("keep the whole state at every save, for resume=<step>", FLAG),
    "resume": Option("auto, never, or the step of a kept state", step_or("auto", "never")),
    "backup_dir": Option("folder that results are copied to", TEXT_OR_NONE),
    "restore_from": Option("folder that results are copied from first", TEXT_OR_NONE),
    "data_dir": Option("folder of the data; null: where D4RL's usually are", TEXT_OR_NONE),
    "results_dir": Option("folder of all results", TEXT),
    # reflow
    "reflow_backbone_ckpt": Option("step of the model that is made straight, or latest", step_or("latest")),
    "reflow_lr": Option("learning rate of the reflow", RATE),
    "cond_dataset_size": Option("pairs with a return", PAIR_COUNT),
    "uncond_dataset_size": Option("pairs without one", PAIR_COUNT),
    "pairs_dtype": Option("their type on disk", one_of("float32", "float16")),
    "dataset_prepare_batch_size": Option("pairs that are made together", BATCH),
    "dataset_prepare_sampling_steps": Option("sampling steps of a pair", SAMPLING_STEPS),
    "reflow_gradient_steps": Option("training steps of the reflow", STEPS),
    # inference
    "test_model": Option("R1: the trained model; R2: that of the reflow", one_of("R1", "R2")),
    "diffusion_ckpt": Option("step of R1; all: every one that is saved", step_or("latest", "all")),
    "reflow_ckpt": Option("step of R2; all: every one that is saved", step_or("latest", "all")),
    "invdyn_ckpt": Option("step of inverse dynamics", step_or("latest")),
    "num_envs": Option("environments stepped together", ENVS),
    "num_candidates": Option("plans of which the best is taken", whole(1, 100_000)),
    "num_episodes": Option("episodes in each environment", whole(1, 10**6)),
    "temperature": Option("scale of the noise that plans begin with", number(0)),
    "use_ema": Option("plan with the averaged weights", FLAG),
    "sampling_steps": Option("sampling steps; null: the authors' number", whole(1, SAMPLING_STEPS.most, null=True)),
    "published_accounting": Option("returns as the authors' script counts them", FLAG),
    "upstream_typo": Option(
        "antmaze-large-diverse asks for a return of 1 everywhere, as the authors' script does", FLAG
    ),
    "runtime": Option(
        "of a decision; auto: tflite on processors, else graph", one_of("auto", "graph", "xla", "tflite")
    ),
    # benchmark
    "benchmark_decisions": Option("decisions that are timed", whole(1, 10**9)),
    "benchmark_warm_up": Option("decisions before them", whole(0, 10**9)),
    # a task's own
    "task.env_name": Option("the environment's name", TEXT),
    "task.return_scale": Option("returns are divided by this; null: the authors' number", positive(null=True)),
    "task.diffusion_ckpt": Option("diffusion_ckpt of this task", step_or("latest", "all")),
    **{f"task.target_return_R{model}": Option(f"the return that R{model} asks for", number()) for model in (1, 2)},
    **{f"task.w_cfg_R{model}": Option(f"weight of R{model}'s guidance", number()) for model in (1, 2)},
}
RELATIONS = (
    Relation(("d_model", "n_heads"), lambda width, heads: width % heads == 0, "d_model must be a multiple of n_heads"),
    multiple_of("d_model", 2),
    multiple_of("emb_dim", 8),
    Relation(
        ("num_envs", "num_candidates"),
        lambda envs, candidates: envs * candidates <= BATCH.most,
        f"at most {BATCH.most} plans are made together",
    ),
)


class LiteOptions(SimpleNamespace):
    """The options as attributes; `task` is a dictionary; `kind` is the domain."""

    @property
    def env_name(self) -> str:
        return str(self.task["env_name"])

    @property
    def folder(self) -> Path:
        """Of checkpoints."""
        return Path(self.results_dir) / self.pipeline_name / self.env_name

    def of_task(self, name: str) -> Any:
        """A value of the task for the model that is tested: `<name>_R1` or `<name>_R2`."""
        return self.task[f"{name}_{self.test_model}"]


def parse(kind: str, arguments: Sequence[str]) -> LiteOptions:
    """The options of a domain ("mujoco", "kitchen", "antmaze").

    Raises:
        UserError: a key that does not exist (the nearest one is named) or stands twice, a value of another type or out
            of its range, a name that leads out of `results_dir`, an unknown task.
    """
    values = _values(kind, assignments(arguments))
    task = {key.removeprefix("task."): values.pop(key) for key in list(values) if key.startswith("task.")}
    return LiteOptions(**{**values, "task": task}, kind=kind)


def help_text(script: str, arguments: Sequence[str]) -> str:
    """The options of a pipeline with their values under the other arguments, and their meanings."""
    values = _values(script.rpartition("_")[2], assignments(split_help(arguments)[1]))
    usage = f"usage: python pipelines/{script}.py task=NAME mode=MODE [key=value ...]"
    return f"{usage}\n\nOptions with their values:\n{help_rows(values, meanings(OPTIONS))}"


def _values(kind: str, given: dict[str, str]) -> dict[str, Any]:
    """Every option of a domain with its value, flat; `task` is the name of the task."""
    values = read_yaml(FOLDER / f"{kind}.yaml")
    values["task"] = given.pop("task", values["task"])
    values |= flatten({"task": {"return_scale": None} | read_task(values["task"])})
    override(values, given, _kind_of, YAML, kind, ("task",))
    if values.get("task.diffusion_ckpt") is not None and "diffusion_ckpt" not in given:
        values["diffusion_ckpt"] = values["task.diffusion_ckpt"]
    modes = OPTIONS if kind != "mujoco" else {**OPTIONS, "mode": Option("", one_of(*MODES))}
    check(values, modes, PAIRS, RELATIONS)
    for key in ("pipeline_name", "task.env_name"):
        require_inside(values[key], PAIRS(key, values[key]))
    if not values["task.env_name"].startswith(TASKS[kind]):
        raise UserError(f"task.env_name={values['task.env_name']}: names begin with {', '.join(TASKS[kind])} here")
    return values


def _kind_of(key: str, default: Any) -> Kind:
    return OPTIONS[key].kind if key in OPTIONS else kind_like(default)


def read_task(name: str) -> dict[str, Any]:
    """task/<name>.yaml."""
    known = sorted(each.stem for each in (FOLDER / "task").glob("*.yaml"))
    if name not in known:
        raise UserError(f"task={shown(name)}: no such task; there are {', '.join(known)}")
    return read_yaml(FOLDER / "task" / f"{name}.yaml")
