"""The planners' command lines: `--dataset NAME --config NAME --<any hyper-parameter> VALUE`.

The hyper-parameters of an experiment stand in cfg/planning/<config>.yaml; those of a preset (`--preset`) and those
that a data set changes come next, and those that it changes in the preset; then the command line, then texts that begin
with "f:", whose {names} are replaced by the values so far. Nothing is executed in any of it: values are numbers, texts
or Python literals.
"""

from __future__ import annotations

import ast
import difflib
import json
import re
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import yaml

from diffusion_rl.configs import CONFIG_ROOT, REPOSITORY
from diffusion_rl.core.errors import UserError
from diffusion_rl.interop.files import atomic_file

TUPLES = ("dim_mults",)  # YAML has lists only
REAL = ("loss_discount", "action_weight", "termination_penalty")  # may be a fraction although the default is whole
DEFERRED = "f:"


class Options(SimpleNamespace):
    """The options of an experiment as attributes; `savepath` is its folder."""

    def as_dict(self) -> dict[str, Any]:
        return dict(vars(self))

    def save(self) -> None:
        """Make the folder; `args.json` with every option and `diff.txt` with what is not committed."""
        folder = Path(self.savepath)
        facts = {**self.as_dict(), "commit": _git("rev-parse", "HEAD").strip()}
        _write(folder / "args.json", json.dumps(facts, indent=4, sort_keys=True))
        _write(folder / "diff.txt", _git("diff"))


def _write(path: Path, text: str) -> None:
    with atomic_file(path) as file:
        file.write(text.encode())


def _git(*arguments: str) -> str:
    """What git says of this checkout; nothing where there is none."""
    try:
        ended = subprocess.run(["git", "-C", str(REPOSITORY), *arguments], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return ended.stdout


def parse(
    experiment: str, arguments: Sequence[str], dataset: str, config: str = "config.locomotion", save: bool = True
) -> Options:
    """The options of an experiment ("diffusion", "values", "plan", …).

    Args:
        dataset, config: defaults of the two flags.
        save: make the experiment's folder and write its options there.

    Raises:
        UserError: an unknown flag, a flag without a value, a value of another type, an unknown configuration.
    """
    given = pairs(arguments)
    dataset, config = given.pop("dataset", dataset), given.pop("config", config)
    settings = read_config(config)
    if experiment not in settings:
        raise UserError(
            f"--config {config} has no experiment {experiment!r}: it has {', '.join(_experiments(settings))}"
        )
    wanted, presets = given.pop("preset", None), settings.get("presets", {})
    if wanted is not None and wanted not in presets:
        raise UserError(f"--preset {wanted}: --config {config} has {', '.join(presets) or 'none'}")
    preset = presets.get(wanted, {})
    values = settings[experiment]["options"] | preset.get(experiment, {})
    for overrides in (settings.get("overrides", {}), preset.get("overrides", {})):
        values |= overrides.get(dataset, {}).get(experiment, {})
    values |= {key: tuple(values[key]) for key in TUPLES if key in values}
    name = given.pop("exp_name", None)
    for key, text in given.items():
        if key not in values:
            near = difflib.get_close_matches(key, [*values, "dataset", "config"], n=1)
            raise UserError(f"--{key} is no option of {experiment}" + (f": did you mean --{near[0]}?" if near else ""))
        values[key] = coerce(key, text, values[key])
    if values.get("diffusion_type") == "actions_only" and values.get("prefix") == "diffusion/defaults":
        values["prefix"] = "diffusion/actions"  # the two kinds of model never share a folder
    values |= {key: expand(value, values) for key, value in values.items() if _is_deferred(value)}
    if "loadbase" in values and values["loadbase"] is None:
        values["loadbase"] = values["logbase"]
    values["exp_name"] = name or experiment_name(settings[experiment]["watch"], values)
    folder = Path(values["logbase"]) / dataset / values["exp_name"] / values.get("suffix", "")
    options = Options(**values, dataset=dataset, config=config, savepath=str(folder))
    if save:
        options.save()
    return options


def pairs(arguments: Sequence[str]) -> dict[str, str]:
    """`--key value …` as a dictionary; any number of dashes (or none) may stand before a key."""
    if len(arguments) % 2:
        raise UserError(f"{arguments[-1]} has no value: options are pairs, --key value")
    return {key.lstrip("-"): value for key, value in zip(arguments[::2], arguments[1::2], strict=True)}


def read_config(config: str) -> dict[str, Any]:
    """cfg/planning/<name>.yaml for "config.<name>", or the YAML file of that path."""
    path = Path(config) if config.endswith((".yaml", ".yml")) else _folder() / f"{config.rpartition('.')[2]}.yaml"
    if not path.is_file():
        known = ", ".join(f"config.{p.stem}" for p in sorted(_folder().glob("*.yaml")))
        raise UserError(f"--config {config}: no such configuration; there are {known}, or give a YAML file")
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not YAML: {' '.join(str(error).split())}") from error


def _folder() -> Path:
    return CONFIG_ROOT / "planning"


def _experiments(settings: Mapping[str, Any]) -> list[str]:
    return [key for key in settings if key not in ("overrides", "presets") and not key.startswith(".")]


def coerce(key: str, text: str, default: Any) -> Any:
    """The text of a flag as a value of its default's type ("None" for none of it, whatever the type)."""
    if text == "None":
        return None
    if text == "latest" or isinstance(default, str):
        return text
    if isinstance(default, bool | list | tuple | dict) or default is None:
        return _literal(key, text, default)
    if isinstance(default, int) and key in REAL:
        return _number(key, text)
    try:
        return type(default)(text)
    except ValueError:
        kind = "a whole number" if isinstance(default, int) else "a number"
        raise UserError(f"--{key} {text}: {kind} is needed here") from None


def _number(key: str, text: str) -> int | float:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    raise UserError(f"--{key} {text}: a number is needed here")


def _literal(key: str, text: str, default: Any) -> Any:
    """A Python literal; where nothing is known of the type, any other text is a string."""
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        if default is None:
            return text
        example = {bool: "True or False"}.get(type(default), repr(default))
        raise UserError(f"--{key} {text}: write {example}") from None
    if isinstance(default, list | tuple):
        items = value if isinstance(value, list | tuple) else [value]
        return type(default)(items)
    return value


def _is_deferred(value: Any) -> bool:
    return isinstance(value, str) and value.startswith(DEFERRED)


def expand(template: str, values: Mapping[str, Any]) -> str:
    """ "f:…{name}…" with the values of the names; nothing but names may stand between the braces."""

    def value(match: re.Match[str]) -> str:
        if match[1] not in values:
            raise UserError(f"{template}: there is no option {match[1]}")
        return str(values[match[1]])

    text = re.sub(r"\{(\w+)\}", value, template.removeprefix(DEFERRED))
    if "{" in text or "}" in text:
        raise UserError(f"{template}: only names of options can stand between braces")
    return text


def experiment_name(watch: Sequence[Sequence[str]], values: Mapping[str, Any]) -> str:
    """Labels with the values of the options that there are: "diffusion/defaults_H32_T20"."""
    parts = []
    for key, label in watch:
        if key in values:
            value = values[key]
            parts.append(
                label + ("_".join(f"{k}-{v}" for k, v in value.items()) if isinstance(value, dict) else str(value))
            )
    name = "_".join(parts)
    for old, new in (("/_", "/"), ("(", ""), (")", ""), (", ", "-")):
        name = name.replace(old, new)
    return name
