"""DiffuserLite's options: `task=NAME mode=MODE key=value …` over cfg/planning/diffuserlite/<domain>.yaml."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from diffusion_rl.config import schema
from diffusion_rl.config.compose import CONFIG_ROOT
from diffusion_rl.config.instantiate import flatten
from diffusion_rl.config.overrides import YAML, assignments, comments, help_rows, override, split_help
from diffusion_rl.config.yaml_files import read_yaml
from diffusion_rl.core.errors import UserError
from diffusion_rl.core.places import output_folder
from diffusion_rl.tasks.registry import tasks_of

FOLDER = CONFIG_ROOT / "planning" / "diffuserlite"
MODES = ("training", "prepare_dataset", "reflow", "inference", "benchmark")
#: What options may be; any other one is of the type of its default. Their meanings stand in the YAML files.
KINDS = {
    "mode": schema.one_of("iql_training", *MODES),
    "seed": schema.SEED,
    "device": schema.DEVICE,
    **dict.fromkeys(("terminal_penalty", "noreaching_penalty"), schema.number(null=True)),
    "discount": schema.SHARE,
    # networks
    "emb_dim": schema.whole(8, schema.WIDTH.most),
    "d_model": schema.whole(2, schema.WIDTH.most),
    **dict.fromkeys(("n_heads", "iql_hidden_dim"), schema.WIDTH),
    "depth": schema.whole(1, 1000),
    "backbone": schema.one_of("flow", "diffusion"),
    # training
    "next_obs_loss_weight": schema.number(0),
    "ema_rate": schema.SHARE,
    **dict.fromkeys(("learning_rate", "invdyn_learning_rate", "reflow_lr"), schema.RATE),
    **dict.fromkeys(("diffusion_gradient_steps", "iql_gradient_steps", "reflow_gradient_steps"), schema.STEPS),
    "invdyn_gradient_steps": schema.whole(0, schema.STEPS.most),
    "iql_target_updates": schema.whole(1, 1000),
    **dict.fromkeys(("batch_size", "iql_batch_size", "dataset_prepare_batch_size"), schema.BATCH),
    **dict.fromkeys(("log_interval", "save_interval"), schema.STEPS),
    **dict.fromkeys(("keep_every", "stop_at"), schema.whole(1, schema.STEPS.most, null=True)),
    "resume": replace(schema.step_or("auto", "never"), pattern=".*[/.].*", hint=", a step or the path of a state"),
    **dict.fromkeys(("backup_dir", "restore_from", "data_dir"), schema.TEXT_OR_NONE),
    # reflow
    "reflow_backbone_ckpt": schema.step_or("latest"),
    **dict.fromkeys(("cond_dataset_size", "uncond_dataset_size"), schema.whole(1, 10**9)),
    "pairs_dtype": schema.one_of("float32", "float16"),
    "dataset_prepare_sampling_steps": schema.whole(1, 10_000),
    # inference and benchmark
    "test_model": schema.one_of("R1", "R2"),
    **dict.fromkeys(("diffusion_ckpt", "reflow_ckpt", "task.diffusion_ckpt"), schema.step_or("latest", "all")),
    "invdyn_ckpt": schema.step_or("latest"),
    "num_envs": schema.ENVS,
    "num_candidates": schema.whole(1, 100_000),
    "num_episodes": schema.whole(1, 10**6),
    "temperature": schema.number(0),
    "sampling_steps": schema.whole(1, 10_000, null=True),
    "runtime": schema.one_of("auto", "graph", "xla", "tflite"),
    "benchmark_decisions": schema.whole(1, 10**9),
    "benchmark_warm_up": schema.whole(0, 10**9),
    "task.return_scale": schema.positive(null=True),
    **{f"task.{key}_R{model}": schema.number() for key in ("target_return", "w_cfg") for model in (1, 2)},
}
RELATIONS = (
    schema.Relation(
        ("d_model", "n_heads"), lambda width, heads: width % heads == 0, "d_model must be a multiple of n_heads"
    ),
    schema.multiple_of("d_model", 2),
    schema.multiple_of("emb_dim", 8),
    schema.Relation(
        ("num_envs", "num_candidates"),
        lambda envs, candidates: envs * candidates <= schema.BATCH.most,
        f"at most {schema.BATCH.most} plans are made together",
    ),
)


class LiteOptions(SimpleNamespace):
    """The options as attributes; `task` is a dictionary; `kind` is the domain."""

    @property
    def env_name(self) -> str:
        return str(self.task["env_name"])

    @property
    def folder(self) -> Path:
        """Returns the folder of checkpoints."""
        return Path(self.results_dir) / self.pipeline_name / self.env_name

    def of_task(self, name: str) -> Any:
        """Returns a value of the task for the model that is tested: `<name>_R1` or `<name>_R2`."""
        return self.task[f"{name}_{self.test_model}"]


def parse(kind: str, arguments: Sequence[str]) -> LiteOptions:
    """Parses the options of a domain ("mujoco", "kitchen", "antmaze").

    Raises:
        UserError: a key that does not exist (the nearest one is named) or stands twice, a value of another type or out
            of its range, a name that leads out of `results_dir`, an unknown task.
    """
    values = _values(kind, assignments(arguments))
    task = {key.removeprefix("task."): values.pop(key) for key in list(values) if key.startswith("task.")}
    return LiteOptions(**{**values, "task": task}, kind=kind)


def help_text(script: str, arguments: Sequence[str]) -> str:
    """Returns the options of a pipeline with their values under the other arguments, and their meanings."""
    values = _values(script.rpartition("_")[2], assignments(split_help(arguments)[1]))
    meaning = comments(*(FOLDER / f"{name}.yaml" for name in ("mujoco", "kitchen", "antmaze")))
    meaning |= {f"task.{key}": text for key, text in comments(FOLDER / "task" / "hopper-medium-v2.yaml").items()}
    usage = f"usage: python pipelines/{script}.py task=NAME mode=MODE [key=value ...]"
    return f"{usage}\n\nOptions with their values:\n{help_rows(values, meaning)}"


def _values(kind: str, assigned: dict[str, str]) -> dict[str, Any]:
    """Returns every option of a domain with its value, flat; `task` is the name of the task."""
    values = read_yaml(FOLDER / f"{kind}.yaml")
    values["task"] = assigned.pop("task", values["task"])
    values |= flatten({"task": {"return_scale": None} | read_task(values["task"])})
    values["results_dir"] = output_folder(values["results_dir"])
    override(values, assigned, KINDS, YAML, kind, ("task",))
    if values.get("task.diffusion_ckpt") is not None and "diffusion_ckpt" not in assigned:
        values["diffusion_ckpt"] = values["task.diffusion_ckpt"]
    schema.check_ranges(
        values, KINDS if kind != "mujoco" else KINDS | {"mode": schema.one_of(*MODES)}, schema.PAIRS, RELATIONS
    )
    for key in ("pipeline_name", "task.env_name"):
        schema.require_inside(values[key], schema.PAIRS(key, values[key]))
    name, tasks = values["task.env_name"], tasks_of(domain=kind)
    if not any(task.covers(name) for task in tasks):
        raise UserError(f"task.env_name={name}: names begin with {', '.join(task.name for task in tasks)} here")
    return values


def read_task(name: str) -> dict[str, Any]:
    """Reads task/<name>.yaml."""
    known = sorted(path.stem for path in (FOLDER / "task").glob("*.yaml"))
    if name not in known:
        raise UserError(f"task={schema.shown(name)}: no such task; there are {', '.join(known)}")
    return read_yaml(FOLDER / "task" / f"{name}.yaml")
