"""The planners' command lines: `--dataset NAME --config NAME --<any hyper-parameter> VALUE`.

The hyper-parameters of an experiment stand in cfg/planning/<config>.yaml; those of a preset (`--preset`) and those
that a data set changes come next, and those that it changes in the preset; then the command line, then texts that begin
with "f:", whose {names} are replaced by the values so far. Nothing is executed in any of it: values are numbers, texts
or Python literals.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import json
import re
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from diffusion_rl.config.checks import (
    BATCH,
    DIFFUSION_STEPS,
    ENVS,
    FREQUENCY,
    FREQUENCY_OR_OFF,
    HORIZON,
    SEED,
    SHARE,
    STEPS,
    WIDTH,
    Relation,
    at_most,
    check_ranges,
    number,
    positive,
    shown,
    whole,
)
from diffusion_rl.config.compose import CONFIG_ROOT, REPOSITORY
from diffusion_rl.config.names import require_device, require_inside
from diffusion_rl.config.yaml_files import read_yaml
from diffusion_rl.core.errors import UserError
from diffusion_rl.core.files import atomic_file

TUPLES = ("dim_mults",)  # YAML has lists only
REAL = ("loss_discount", "action_weight", "termination_penalty")  # may be a fraction although the default is whole
TEXTS = ("data_dir", "bucket", "loadbase", "urdf_dir")  # whose default may be none
NONE_IS_ALLOWED = ("termination_penalty", "preprocess_fns", "resume")
DEFERRED = "f:"
GO_ON = "--resume True"  # how a user goes on with a training
RANGES = {
    # models
    "horizon": HORIZON,
    "n_diffusion_steps": DIFFUSION_STEPS,
    "dim": whole(8, WIDTH.most),
    "dim_mults": whole(1, 1024, many=True),
    "hidden_dims": whole(1, WIDTH.most, many=True),
    "time_dim": whole(4, WIDTH.most),
    "action_weight": number(0),
    "loss_discount": number(0),
    # data
    "max_path_length": whole(1, 10**9),
    "termination_penalty": number(null=True),
    "discount": SHARE,
    # training
    "n_train_steps": STEPS,
    "n_steps_per_epoch": STEPS,
    "stop_at": dataclasses.replace(STEPS, null=True),
    "batch_size": BATCH,
    "gradient_accumulate_every": whole(1, 65_536),
    "learning_rate": positive(1e38),
    "lr_scale": positive(1e38),
    "lr_decay_steps": FREQUENCY_OR_OFF,
    "ema_decay": SHARE,
    "n_saves": STEPS,
    "save_freq": FREQUENCY,
    "sample_freq": FREQUENCY_OR_OFF,
    "n_reference": FREQUENCY_OR_OFF,
    "n_samples": FREQUENCY_OR_OFF,
    "seed": dataclasses.replace(SEED, null=True),
    # planning
    "n_envs": ENVS,
    "n_exec": whole(1),
    "n_episodes": whole(1, 10**6),
    "n_plans": whole(1, 10**6),
    "max_episode_length": whole(1, 10**9),
    "n_guide_steps": whole(0, 10_000),
    "t_stopgrad": whole(0),
    "scale": number(),
    "vis_freq": FREQUENCY,
    "max_render": FREQUENCY_OR_OFF,
    "replan_every": FREQUENCY_OR_OFF,
}
RELATIONS = (
    at_most("n_exec", "horizon"),
    Relation(
        ("n_envs", "batch_size"),
        lambda envs, samples: envs * samples <= BATCH.most,
        f"at most {BATCH.most} plans are made together",
    ),
    Relation(("dim",), lambda dim: dim % 8 == 0, "dim must be a multiple of 8"),
    Relation(("time_dim",), lambda dim: dim % 2 == 0, "time_dim must be even"),
    Relation(
        ("horizon", "dim_mults", "model"),
        lambda horizon, mults, model: "Unet" not in model or horizon % 2 ** (len(mults) - 1) == 0,
        "a U-Net halves the horizon between its levels: it must be a multiple of 2 ** (entries of dim_mults - 1)",
    ),
)
CHOICES = {
    "loss_type": ("l1", "l2", "value_l1", "value_l2"),
    "aggregate": ("first", "mean", "median", "medoid"),
    "diffusion_type": ("states_actions", "actions_only"),
    "obs_embed": ("mlp", "raw"),
}
spelling = "--{} {}".format


class MissingOption(UserError, AttributeError):
    """An experiment of a user's own configuration lacks an option that its command needs."""


class Options(SimpleNamespace):
    """The options of an experiment as attributes; `savepath` is its folder."""

    def __getattr__(self, name: str) -> Any:
        """Called for what is missing only."""
        raise MissingOption(f"--config {vars(self).get('config')}: this experiment needs the option {name}")

    def as_dict(self) -> dict[str, Any]:
        return dict(vars(self))

    def save(self) -> None:
        """Make the folder; `args.json` with every option and `diff.txt` with what is not committed."""
        folder = Path(self.savepath)
        facts = {**self.as_dict(), "commit": _git("rev-parse", "HEAD").strip()}
        _write(folder / "args.json", json.dumps(facts, indent=4, sort_keys=True))
        _write(folder / "diff.txt", _git("diff"))


def going_on(options: Options) -> Options:
    """The options of `scripts/resume_training.py`: those of a training that goes on with its latest checkpoint, unless
    they name another one."""
    if options.resume == "False":
        options.resume = "latest"
    return options


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
        UserError: an unknown flag, a flag given twice or without a value, a value of another type or out of its range,
            a name that leads out of `logbase`, an unknown configuration.
    """
    given = pairs(arguments)
    dataset, config = given.pop("dataset", dataset), given.pop("config", config)
    settings = read_config(config)
    if experiment not in settings:
        raise UserError(
            f"--config {config} has no experiment {experiment!r}: it has {', '.join(_experiments(settings)) or 'none'}"
        )
    _check_shape(settings, experiment, config)
    _check_types(settings, experiment, config)
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
    _check_values(values)
    values["exp_name"] = name or experiment_name(settings[experiment]["watch"], values)
    names = {key: values.get(key, "") for key in ("prefix", "exp_name", "suffix")}
    for key, part in {"dataset": dataset, **names}.items():
        require_inside(part, spelling(key, part))
    folder = Path(values["logbase"]) / dataset / values["exp_name"] / values.get("suffix", "")
    options = Options(**values, dataset=dataset, config=config, savepath=str(folder))
    if save:
        options.save()
    return options


def pairs(arguments: Sequence[str]) -> dict[str, str]:
    """`--key value …` as a dictionary; any number of dashes (or none) may stand before a key."""
    if len(arguments) % 2:
        raise UserError(f"{arguments[-1]} has no value: options are pairs, --key value")
    given: dict[str, str] = {}
    for flag, value in zip(arguments[::2], arguments[1::2], strict=True):
        key = flag.lstrip("-")
        if key in given:
            raise UserError(f"--{key} stands twice ({shown(given[key])} and {shown(value)}): give it once")
        given[key] = value
    return given


def read_config(config: str) -> dict[str, Any]:
    """cfg/planning/<name>.yaml for "config.<name>", or the YAML file of that path."""
    path = Path(config) if config.endswith((".yaml", ".yml")) else _folder() / f"{config.rpartition('.')[2]}.yaml"
    if not path.is_file():
        known = ", ".join(f"config.{p.stem}" for p in sorted(_folder().glob("*.yaml")))
        raise UserError(f"--config {config}: no such configuration; there are {known}, or give a YAML file")
    settings = read_yaml(path)
    if not isinstance(settings, dict) or not all(isinstance(key, str) for key in settings):
        raise UserError(f"--config {config}: a mapping of experiments to their options is needed")
    return settings


def _check_shape(settings: Mapping[str, Any], experiment: str, config: str) -> None:
    """Raises UserError unless an experiment, the presets and what data sets change are what a user's own file needs."""
    own = settings[experiment]
    watch = own.get("watch") if isinstance(own, dict) else None
    if not isinstance(watch, list) or not all(
        isinstance(pair, list) and len(pair) == 2 and all(isinstance(part, str) for part in pair) for pair in watch
    ):
        raise UserError(f"--config {config}: {experiment} needs watch, a list of [option, label]")
    if not _is_options(own.get("options")) or "logbase" not in own["options"]:
        raise UserError(f"--config {config}: {experiment} needs options, a mapping, with logbase among them")
    presets = settings.get("presets", {})
    preset_overrides = [each.get("overrides", {}) for each in presets.values()] if _nested(presets) else [None]
    for what, groups in (("presets", [presets]), ("overrides", [settings.get("overrides", {}), *preset_overrides])):
        changed = [group for each in groups if isinstance(each, dict) for group in each.values()]
        if not all(map(_nested, groups)) or not all(map(_nested, changed)):
            raise UserError(f"--config {config}: {what} must be mappings of experiments to options")


def _check_types(settings: Mapping[str, Any], experiment: str, config: str) -> None:
    """Raises UserError for an option of a user's own file that is of another type than in the files of `_folder`."""
    if not config.endswith((".yaml", ".yml")):
        return
    usual: dict[str, Any] = {}
    for path in sorted(_folder().glob("*.yaml")):
        usual |= {
            k: v for own in read_yaml(path).values() if isinstance(own, dict) for k, v in own.get("options", {}).items()
        }
    kinds = {bool: (bool,), int: (int, float), float: (int, float), str: (str,), list: (list,)}
    for key, value in settings[experiment]["options"].items():
        allowed = kinds.get(type(usual.get(key)), ())
        if (
            allowed
            and value is not None
            and (not isinstance(value, allowed) or isinstance(value, bool) != (bool in allowed))
        ):
            raise UserError(f"--config {config}: {experiment}: {key}: {shown(value)} must be like {usual[key]!r}")


def _nested(node: Any) -> bool:
    """Whether it is a mapping of texts to mappings."""
    return _is_options(node) and all(isinstance(value, dict) for value in node.values())


def _is_options(node: Any) -> bool:
    return isinstance(node, dict) and all(isinstance(key, str) for key in node)


def _check_values(values: Mapping[str, Any]) -> None:
    """Raises UserError for a number out of its range, or a text that is none of the choices."""
    check_ranges(values, RANGES, spelling, RELATIONS)
    for key, allowed in CHOICES.items():
        if key in values and values[key] not in allowed:
            raise UserError(f"{spelling(key, shown(values[key]))}: choose one of {', '.join(allowed)}")
    require_device(values.get("device"), spelling("device", shown(values.get("device"))))
    for key in ("logbase", "prefix", "suffix"):
        if key in values and not isinstance(values[key], str):
            raise UserError(f"{spelling(key, shown(values[key]))}: a text is needed here")
    weights = values.get("loss_weights")
    if weights is not None:
        if not isinstance(weights, dict) or not all(whole(0).holds(key) for key in weights):
            raise UserError(f"--loss_weights {shown(weights)}: write {{index of an observation: weight}}")
        check_ranges(weights, dict.fromkeys(weights, number(0)), "--loss_weights {{{}: {}}}".format)


def _folder() -> Path:
    return CONFIG_ROOT / "planning"


def _experiments(settings: Mapping[str, Any]) -> list[str]:
    return [key for key in settings if key not in ("overrides", "presets") and not key.startswith(".")]


def coerce(key: str, text: str, default: Any) -> Any:
    """The text of a flag as a value of its default's type; "None" where the default is none or none means something."""
    if text == "None" and (default is None or key in NONE_IS_ALLOWED):
        return None
    if isinstance(default, str) or key in TEXTS:
        return text
    if isinstance(default, bool):
        return _literal(key, text, {"True": True, "False": False, "1": True, "0": False}.get(text), "True or False")
    if isinstance(default, int) and key not in REAL:
        return _number(key, text, (int,), "a whole number")
    if isinstance(default, int | float):
        return _number(key, text, (int, float) if isinstance(default, int) else (float,), "a number")
    value = _evaluated(text)
    if isinstance(default, list | tuple):
        items = list(value) if isinstance(value, list | tuple) else [value]
        return type(default)(_literal(key, text, None if value is None else items, repr(default)))
    return text if value is None else value


def _number(key: str, text: str, kinds: tuple[type, ...], needed: str) -> Any:
    for kind in kinds:
        try:
            return kind(text)
        except ValueError:
            continue
    raise UserError(f"{spelling(key, shown(text))}: {needed} is needed here")


def _literal(key: str, text: str, value: Any, example: str) -> Any:
    if value is None:
        raise UserError(f"{spelling(key, shown(text))}: write {example}")
    return value


def _evaluated(text: str) -> Any:
    """The value of a Python literal; None where it is none."""
    try:
        return ast.literal_eval(text)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return None


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
