"""DiffuserLite's command line: `task=NAME mode=MODE key=value …` over cfg/planning/diffuserlite/<domain>.yaml."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import yaml

from diffusion_rl.configs import CONFIG_ROOT
from diffusion_rl.core.errors import UserError

FOLDER = CONFIG_ROOT / "planning" / "diffuserlite"
MODES = ("training", "prepare_dataset", "reflow", "inference", "benchmark")
CHOICES = {
    "test_model": ("R1", "R2"),
    "backbone": ("flow", "diffusion"),
    "pairs_dtype": ("float32", "float16"),
    "runtime": ("auto", "graph", "xla", "tflite"),
}


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
        UserError: a key that does not exist (the nearest one is named), a value of another type, an unknown task.
    """
    values = read(FOLDER / f"{kind}.yaml")
    given: dict[str, Any] = {}
    for argument in arguments:
        key, equals, text = argument.partition("=")
        if not equals:
            raise UserError(f"{argument}: options are written key=value")
        given[key] = text
    task = given.pop("task", values["task"])
    values["task"] = {"return_scale": None} | read_task(task)
    for key, text in given.items():
        owner, name = (values["task"], key[5:]) if key.startswith("task.") else (values, key)
        if name not in owner:
            near = difflib.get_close_matches(name, [*values, "task"], n=1)
            raise UserError(f"{key} is no option of {kind}" + (f": did you mean {near[0]}?" if near else ""))
        owner[name] = coerce(key, text, owner[name])
    modes = MODES if kind == "mujoco" else ("iql_training", *MODES)
    for key, allowed in {**CHOICES, "mode": modes}.items():
        if values[key] not in allowed:
            raise UserError(f"{key}={values[key]}: choose one of {', '.join(allowed)}")
    if values["task"].get("diffusion_ckpt") is not None and "diffusion_ckpt" not in given:
        values["diffusion_ckpt"] = values["task"]["diffusion_ckpt"]
    return LiteOptions(**values, kind=kind)


def read(path: Path) -> dict[str, Any]:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def read_task(name: str) -> dict[str, Any]:
    """task/<name>.yaml."""
    path = FOLDER / "task" / f"{name}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(each.stem for each in path.parent.glob("*.yaml")))
        raise UserError(f"task={name}: no such task; there are {known}")
    return read(path)


def coerce(key: str, text: str, default: Any) -> Any:
    """The text as a YAML value of its default's type; numbers stand for numbers, whole ones where the default is."""
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"{key}={text} is not YAML: {' '.join(str(error).split())}") from error
    if isinstance(value, str):
        try:
            value = float(value)  # YAML 1.1 takes 1e-4 for a text
        except ValueError:
            value = text
    if default is None or value is None or isinstance(default, str):
        return value
    kinds: dict[type, tuple[type, ...]] = {bool: (bool,), int: (int,), float: (int, float)}
    wanted = kinds.get(type(default), (object,))
    if isinstance(value, bool) != isinstance(default, bool) or not isinstance(value, wanted):
        if isinstance(default, int) and isinstance(value, float) and value.is_integer() and value is not True:
            return int(value)
        names = {bool: "true or false", int: "a whole number", float: "a number"}
        raise UserError(f"{key}={text}: {names.get(type(default), 'another kind of value')} is needed here")
    return float(value) if isinstance(default, float) else value
