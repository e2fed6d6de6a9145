"""DiffuserLite's command line: `task=NAME mode=MODE key=value …` over cfg/planning/diffuserlite/<domain>.yaml."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from diffusion_rl.config.checks import (
    BATCH,
    ENVS,
    FREQUENCY,
    SEED,
    SHARE,
    STEPS,
    WIDTH,
    Relation,
    check_ranges,
    number,
    positive,
    shown,
    whole,
)
from diffusion_rl.config.compose import CONFIG_ROOT
from diffusion_rl.config.names import require_device, require_inside
from diffusion_rl.config.yaml_files import parse_yaml, read_yaml
from diffusion_rl.core.errors import UserError

FOLDER = CONFIG_ROOT / "planning" / "diffuserlite"
MODES = ("training", "prepare_dataset", "reflow", "inference", "benchmark")
CHOICES = {
    "test_model": ("R1", "R2"),
    "backbone": ("flow", "diffusion"),
    "pairs_dtype": ("float32", "float16"),
    "runtime": ("auto", "graph", "xla", "tflite"),
}
TEXTS = ("device", "backup_dir", "restore_from", "data_dir")  # whose default may be none
LABELS = ("diffusion_ckpt", "reflow_ckpt", "invdyn_ckpt", "reflow_backbone_ckpt")  # a step or one of these words:
LABEL_WORDS = {"diffusion_ckpt": ("latest", "all"), "reflow_ckpt": ("latest", "all")}
NONE_IS_ALLOWED = ("terminal_penalty", "noreaching_penalty")
TASKS = {"mujoco": ("hopper", "halfcheetah", "walker2d"), "kitchen": ("kitchen",), "antmaze": ("antmaze",)}
SAMPLING_STEPS = whole(1, 10_000)
PAIRS = whole(1, 10**9)
RANGES = {
    "seed": SEED,
    "terminal_penalty": number(null=True),
    "noreaching_penalty": number(null=True),
    "discount": SHARE,
    "emb_dim": whole(8, WIDTH.most),
    "d_model": whole(2, WIDTH.most),
    "n_heads": WIDTH,
    "depth": whole(1, 1000),
    "next_obs_loss_weight": number(0),
    "ema_rate": SHARE,
    "learning_rate": positive(1e38),
    "invdyn_learning_rate": positive(1e38),
    "diffusion_gradient_steps": STEPS,
    "invdyn_gradient_steps": whole(0, STEPS.most),
    "iql_gradient_steps": STEPS,
    "iql_hidden_dim": WIDTH,
    "iql_batch_size": BATCH,
    "iql_target_updates": whole(1, 1000),
    "batch_size": BATCH,
    "log_interval": FREQUENCY,
    "save_interval": FREQUENCY,
    "keep_every": whole(1, FREQUENCY.most, null=True),
    "reflow_lr": positive(1e38),
    "cond_dataset_size": PAIRS,
    "uncond_dataset_size": PAIRS,
    "dataset_prepare_batch_size": BATCH,
    "dataset_prepare_sampling_steps": SAMPLING_STEPS,
    "reflow_gradient_steps": STEPS,
    "num_envs": ENVS,
    "num_candidates": whole(1, 100_000),
    "num_episodes": whole(1, 10**6),
    "temperature": number(0),
    "sampling_steps": whole(1, SAMPLING_STEPS.most, null=True),
    "benchmark_decisions": whole(1, 10**9),
    "benchmark_warm_up": whole(0, 10**9),
    "task.return_scale": positive(null=True),
    **{f"task.{key}_R{model}": number() for key in ("target_return", "w_cfg") for model in (1, 2)},
}
RELATIONS = (
    Relation(("d_model", "n_heads"), lambda width, heads: width % heads == 0, "d_model must be a multiple of n_heads"),
    Relation(("d_model",), lambda width: width % 2 == 0, "d_model must be even"),
    Relation(("emb_dim",), lambda width: width % 8 == 0, "emb_dim must be a multiple of 8"),
    Relation(
        ("num_envs", "num_candidates"),
        lambda envs, candidates: envs * candidates <= BATCH.most,
        f"at most {BATCH.most} plans are made together",
    ),
)
spelling = "{}={}".format


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
    values = read_yaml(FOLDER / f"{kind}.yaml")
    given: dict[str, Any] = {}
    for argument in arguments:
        key, equals, text = argument.partition("=")
        if not equals:
            raise UserError(f"{argument}: options are written key=value")
        if key in given:
            raise UserError(f"{key} stands twice ({shown(given[key])} and {shown(text)}): give it once")
        given[key] = text
    task = given.pop("task", values["task"])
    values["task"] = {"return_scale": None} | read_task(task)
    for key, text in given.items():
        owner, name = (values["task"], key[5:]) if key.startswith("task.") else (values, key)
        if name not in owner:
            near = difflib.get_close_matches(name, [*values, "task"], n=1)
            raise UserError(f"{key} is no option of {kind}" + (f": did you mean {near[0]}?" if near else ""))
        owner[name] = coerce(key, text, owner[name])
    if values["task"].get("diffusion_ckpt") is not None and "diffusion_ckpt" not in given:
        values["diffusion_ckpt"] = values["task"]["diffusion_ckpt"]
    _check(kind, values)
    return LiteOptions(**values, kind=kind)


def _check(kind: str, values: dict[str, Any]) -> None:
    """Raises UserError for a value that cannot work, whatever the mode."""
    check_ranges(values | {f"task.{k}": v for k, v in values["task"].items()}, RANGES, spelling, RELATIONS)
    modes = MODES if kind == "mujoco" else ("iql_training", *MODES)
    for key, allowed in {**CHOICES, "mode": modes}.items():
        if values[key] not in allowed:
            raise UserError(f"{spelling(key, shown(values[key]))}: choose one of {', '.join(allowed)}")
    words = dict.fromkeys(LABELS, ("latest",)) | LABEL_WORDS | {"resume": ("auto", "never")}
    for key, allowed in words.items():
        if values[key] not in allowed and not whole(0).holds(values[key]):
            raise UserError(f"{spelling(key, shown(values[key]))}: choose {', '.join(allowed)} or a step")
    require_device(values["device"], spelling("device", shown(values["device"])))
    for key, name in (("pipeline_name", values["pipeline_name"]), ("task.env_name", values["task"]["env_name"])):
        require_inside(name, spelling(key, shown(name)))
    prefixes = TASKS[kind]
    if not values["task"]["env_name"].startswith(prefixes):
        raise UserError(f"task.env_name={values['task']['env_name']}: names begin with {', '.join(prefixes)} here")


def read_task(name: str) -> dict[str, Any]:
    """task/<name>.yaml."""
    known = sorted(each.stem for each in (FOLDER / "task").glob("*.yaml"))
    if name not in known:
        raise UserError(f"task={shown(name)}: no such task; there are {', '.join(known)}")
    return read_yaml(FOLDER / "task" / f"{name}.yaml")


def coerce(key: str, text: str, default: Any) -> Any:
    """The text as a YAML value of its default's type; numbers stand for numbers, whole ones where the default is."""
    if key in TEXTS:
        return None if text in ("null", "~", "") else text
    if isinstance(default, str) and key not in LABELS and key != "resume":
        return text
    value = parse_yaml(text, f"{key}={shown(text)}")
    if default is None or isinstance(default, str):
        return value
    kinds: dict[type, tuple[type, ...]] = {bool: (bool,), int: (int,), float: (int, float)}
    wanted = kinds.get(type(default), (object,))
    if isinstance(value, float) and type(default) is int:
        if value.is_integer():
            return int(value)
        wanted = (int, float) if key in RANGES and not RANGES[key].whole else wanted
    if value is None or isinstance(value, bool) != isinstance(default, bool) or not isinstance(value, wanted):
        if value is None and key in NONE_IS_ALLOWED:
            return None
        names = {bool: "true or false", int: "a whole number", float: "a number"}
        raise UserError(f"{key}={shown(text)}: {names.get(type(default), 'another kind of value')} is needed here")
    return float(value) if isinstance(default, float) else value  # type: ignore[arg-type]
