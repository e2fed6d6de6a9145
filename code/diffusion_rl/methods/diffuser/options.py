"""The planners' options: `--dataset NAME --config NAME --<any hyper-parameter> VALUE`.

The hyper-parameters of an experiment stand in cfg/planning/<config>.yaml; those of a preset (`--preset`) and those
that a data set changes come next, and those that it changes in the preset; then the command line, then texts that begin
with "f:", whose {names} are replaced by the values so far. Nothing is executed in any of it: values are numbers, texts
or Python literals.
"""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

from diffusion_rl.config import schema
from diffusion_rl.config.compose import CONFIG_ROOT
from diffusion_rl.config.overrides import PYTHON, comments, help_rows, override, pairs, split_help
from diffusion_rl.config.yaml_files import read_yaml
from diffusion_rl.core.errors import UserError
from diffusion_rl.core.files import atomic_file
from diffusion_rl.core.places import INSTALLED, REPOSITORY, output_folder

FOLDER = CONFIG_ROOT / "planning"
SHIPPED = [FOLDER / f"{name}.yaml" for name in ("locomotion", "kuka", "maze2d")]
DEFERRED = "f:"


class Command(NamedTuple):
    """A script of scripts/: its experiment, and the defaults of --dataset and --config."""

    experiment: str
    dataset: str
    config: str = "config.locomotion"


GO_ON = "--resume True"  # how a user goes on with a training
COMMANDS = {
    "train": Command("diffusion", "hopper-medium-expert-v2"),
    "train_values": Command("values", "hopper-medium-expert-v2"),
    "plan_guided": Command("plan", "walker2d-medium-replay-v2"),
    "plan_unguided": Command("plan_unguided", "walker2d-medium-replay-v2"),
    "plan_maze2d": Command("plan", "maze2d-umaze-v1", "config.maze2d"),
    "train_kuka": Command("diffusion", "kuka", "config.kuka"),
    "train_kuka_classifier": Command("classifier", "kuka", "config.kuka"),
    "plan_kuka": Command("plan", "kuka", "config.kuka"),
}
#: What draws plans during a training (`pictures.Renderer`).
RENDERERS = ("utils.MuJoCoRenderer", "utils.Maze2dRenderer", "utils.LineRenderer")
#: What options may be; any other one is of the type of its default. Their meanings stand in cfg/planning/*.yaml.
KINDS = {
    # models
    "horizon": schema.HORIZON,
    "n_diffusion_steps": schema.DIFFUSION_STEPS,
    "dim": schema.whole(8, schema.WIDTH.most),
    "dim_mults": schema.whole(1, 1024, many=True),
    "hidden_dims": schema.whole(1, schema.WIDTH.most, many=True),
    "time_dim": schema.whole(4, schema.WIDTH.most),
    **dict.fromkeys(("action_weight", "loss_discount"), schema.number(0)),
    "loss_weights": schema.MAPPING_OR_NONE,
    "loss_type": schema.one_of("l1", "l2", "value_l1", "value_l2"),
    "diffusion_type": schema.one_of("states_actions", "actions_only"),
    "obs_embed": schema.one_of("mlp", "raw"),
    "obs_type": schema.one_of("state_features", "pixel"),
    "n_samples": schema.whole(1, 10_000),
    "image_dim": schema.whole(8, 1024),
    # data
    "preprocess_fns": dataclasses.replace(schema.LIST, null=True),
    "max_path_length": schema.whole(1, 10**9),
    "termination_penalty": schema.number(null=True),
    "discount": schema.SHARE,
    # training
    **dict.fromkeys(("n_train_steps", "n_steps_per_epoch", "n_saves", "save_freq"), schema.STEPS),
    "stop_at": dataclasses.replace(schema.STEPS, null=True),
    "batch_size": schema.BATCH,
    "gradient_accumulate_every": schema.whole(1, 65_536),
    **dict.fromkeys(("learning_rate", "lr_scale"), schema.RATE),
    **dict.fromkeys(("lr_decay_steps", "sample_freq", "n_reference", "max_render"), schema.FREQUENCY_OR_OFF),
    "ema_decay": schema.SHARE,
    "renderer": schema.one_of(*RENDERERS),
    "seed": dataclasses.replace(schema.SEED, null=True),
    "device": schema.DEVICE,
    "resume": schema.TEXT_OR_NONE,
    # folders
    **dict.fromkeys(("logbase", "prefix", "suffix"), schema.TEXT),
    **dict.fromkeys(("loadbase", "data_dir", "bucket", "urdf_dir"), schema.TEXT_OR_NONE),
    # planning
    "n_envs": schema.ENVS,
    "n_exec": schema.whole(1),
    **dict.fromkeys(("n_episodes", "n_plans"), schema.whole(1, 10**6)),
    "max_episode_length": schema.whole(1, 10**9),
    "n_guide_steps": schema.whole(0, 10_000),
    "t_stopgrad": schema.whole(0),
    "scale": schema.number(),
    "aggregate": schema.one_of("first", "mean", "median", "medoid"),
    "vis_freq": schema.STEPS,
    "replan_every": schema.FREQUENCY_OR_OFF,
}
#: Options of every training with their defaults, for configurations that were written before them.
TRAINING = {"resume": "False", "stop_at": None}
RELATIONS = (
    schema.at_most("n_exec", "horizon"),
    schema.Relation(
        ("n_envs", "batch_size"),
        lambda envs, samples: envs * samples <= schema.BATCH.most,
        f"at most {schema.BATCH.most} plans are made together",
    ),
    schema.multiple_of("dim", 8),
    schema.multiple_of("image_dim", 4),
    schema.multiple_of("time_dim", 2),
    schema.Relation(
        ("horizon", "dim_mults", "model"),
        lambda horizon, mults, model: "Unet" not in model or horizon % 2 ** (len(mults) - 1) == 0,
        "a U-Net halves the horizon between its levels: it must be a multiple of 2 ** (entries of dim_mults - 1)",
    ),
)


class MissingOption(UserError, AttributeError):
    """An experiment of a user's own configuration lacks an option that its command needs."""


class Options(SimpleNamespace):
    """The options of an experiment as attributes; `savepath` is its folder.

    Attributes that are no options:
        deferred: {option: its text before {names} were replaced}.
        given: names of the options that the command line or its preset sets.
    """

    __slots__ = ("deferred", "given")
    deferred: dict[str, str]
    given: frozenset[str]

    def __getattr__(self, name: str) -> Any:
        """Called for what is missing only."""
        raise MissingOption(f"--config {vars(self).get('config')}: this experiment needs the option {name}")

    def as_dict(self) -> dict[str, Any]:
        return dict(vars(self))

    def save(self) -> None:
        """Makes the folder; `args.json` with every option and `diff.txt` with what is not committed."""
        folder = Path(self.savepath)
        facts = {**self.as_dict(), "commit": _git("rev-parse", "HEAD").strip()}
        _write(folder / "args.json", json.dumps(facts, indent=4, sort_keys=True))
        _write(folder / "diff.txt", _git("diff"))


def going_on(options: Options) -> Options:
    """Returns the options of `scripts/resume_training.py`: those of a training that goes on with its latest checkpoint,
    unless they name another one."""
    if options.resume in (None, "False"):
        options.resume = "latest"
    return options


def _write(path: Path, text: str) -> None:
    with atomic_file(path) as file:
        file.write(text.encode())


def _git(*arguments: str) -> str:
    """Returns what git says of this checkout; nothing where there is none."""
    if INSTALLED:
        return ""
    try:
        ended = subprocess.run(["git", "-C", str(REPOSITORY), *arguments], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return ended.stdout


def parse_command(name: str, arguments: Sequence[str]) -> Options:
    """Parses the options of a script of scripts/, by its name in `COMMANDS`. Raises UserError as `parse` does."""
    return parse(COMMANDS[name].experiment, arguments, *COMMANDS[name][1:], save=False)


def help_text(script: str, arguments: Sequence[str]) -> str:
    """Returns the options of a script with their values under the other arguments, and their meanings."""
    name = "train" if script == "resume_training" else script
    options = parse_command(name, split_help(arguments)[1]).as_dict()
    presets = ", ".join(read_config(options["config"]).get("presets", {})) or "none"
    first = {key: options.pop(key) for key in ("dataset", "config")} | {"preset": None}
    meaning = comments(*SHIPPED) | {
        "dataset": "the data set",
        "config": "config.<file of cfg/planning>, or a YAML file",
        "preset": f"values for several options together: {presets}",
        "exp_name": "the experiment's folder; by default it is made of options",
        "savepath": "where this goes (no option)",
    }
    usage = f"usage: python scripts/{script}.py [--option value ...]"
    return f"{usage}\n\nOptions with their values:\n{help_rows(first | options, meaning, schema.FLAGS)}"


def parse(
    experiment: str, arguments: Sequence[str], dataset: str, config: str = "config.locomotion", save: bool = True
) -> Options:
    """Parses the options of an experiment ("diffusion", "values", "plan", …).

    Args:
        dataset, config: defaults of the two flags.
        save: make the experiment's folder and write its options there.

    Raises:
        UserError: an unknown flag, a flag given twice or without a value, a value of another type or out of its range,
            a name that leads out of `logbase`, an unknown configuration.
    """
    flags = pairs(arguments)
    dataset, config = flags.pop("dataset", dataset), flags.pop("config", config)
    settings = read_config(config)
    _check_shape(settings, experiment, config)
    preset, name = _preset(settings, flags.pop("preset", None), config), flags.pop("exp_name", None)
    values = settings[experiment]["options"] | preset.get(experiment, {})
    values = (TRAINING if "n_train_steps" in values else {}) | values
    own, changed = (chosen.get("overrides", {}).get(dataset, {}).get(experiment, {}) for chosen in (settings, preset))
    values |= own | changed
    values |= {key: tuple(values[key]) for key in ("dim_mults",) if key in values}  # YAML has lists only
    values["logbase"] = output_folder(values["logbase"])
    override(values, flags, KINDS, PYTHON, experiment, ("dataset", "config", "preset", "exp_name"))
    if values.get("diffusion_type") == "actions_only" and values.get("prefix") == "diffusion/defaults":
        values["prefix"] = "diffusion/actions"  # the two kinds of model never share a folder
    deferred = {key: value for key, value in values.items() if _is_deferred(value)}
    values |= {key: expand(value, values) for key, value in deferred.items()}
    if "loadbase" in values and values["loadbase"] is None:
        values["loadbase"] = values["logbase"]
    _check_values(values)
    values["exp_name"] = name or experiment_name(settings[experiment]["watch"], values)
    parts = {"dataset": dataset, **{key: values.get(key, "") for key in ("prefix", "exp_name", "suffix")}}
    for key, part in parts.items():
        schema.require_inside(part, schema.FLAGS(key, part))
    folder = Path(values["logbase"]) / dataset / values["exp_name"] / values.get("suffix", "")
    options = Options(**values, dataset=dataset, config=config, savepath=str(folder))
    options.deferred, options.given = deferred, frozenset([*flags, *preset.get(experiment, {}), *changed])
    if save:
        options.save()
    return options


def _preset(settings: Mapping[str, Any], wanted: str | None, config: str) -> Mapping[str, Any]:
    presets = settings.get("presets", {})
    if wanted is not None and wanted not in presets:
        raise UserError(f"--preset {wanted}: --config {config} has {', '.join(presets) or 'none'}")
    return presets.get(wanted, {})


def read_config(config: str) -> dict[str, Any]:
    """Reads cfg/planning/<name>.yaml for "config.<name>", or the YAML file of that path."""
    path = Path(config) if _is_own(config) else FOLDER / f"{config.rpartition('.')[2]}.yaml"
    if not path.is_file():
        known = ", ".join(f"config.{path.stem}" for path in sorted(SHIPPED))
        raise UserError(f"--config {config}: no such configuration; there are {known}, or give a YAML file")
    settings = read_yaml(path)
    if not isinstance(settings, dict) or not all(isinstance(key, str) for key in settings):
        raise UserError(f"--config {config}: a mapping of experiments to their options is needed")
    return settings


def _is_own(config: str) -> bool:
    """Returns whether a configuration is a file of the user's own."""
    return config.endswith((".yaml", ".yml"))


def _check_shape(settings: Mapping[str, Any], experiment: str, config: str) -> None:
    """Raises UserError unless an experiment, the presets and what data sets change are what a user's own file needs."""
    if experiment not in settings:
        known = [key for key in settings if key not in ("overrides", "presets") and not key.startswith(".")]
        raise UserError(f"--config {config} has no experiment {experiment!r}: it has {', '.join(known) or 'none'}")
    own = settings[experiment]
    watch = own.get("watch") if isinstance(own, dict) else None
    if not isinstance(watch, list) or not all(
        isinstance(pair, list) and len(pair) == 2 and all(isinstance(part, str) for part in pair) for pair in watch
    ):
        raise UserError(f"--config {config}: {experiment} needs watch, a list of [option, label]")
    if not _is_options(own.get("options")) or "logbase" not in own["options"]:
        raise UserError(f"--config {config}: {experiment} needs options, a mapping, with logbase among them")
    presets = settings.get("presets", {})
    preset_overrides = [preset.get("overrides", {}) for preset in presets.values()] if _nested(presets) else [None]
    for what, groups in (("presets", [presets]), ("overrides", [settings.get("overrides", {}), *preset_overrides])):
        changed = [change for group in groups if isinstance(group, dict) for change in group.values()]
        if not all(map(_nested, groups)) or not all(map(_nested, changed)):
            raise UserError(f"--config {config}: {what} must be mappings of experiments to options")
    if _is_own(config):
        _check_types(own["options"], f"--config {config}: {experiment}")


def _check_types(options: Mapping[str, Any], where: str) -> None:
    """Raises UserError for an option of a user's own file that is of another type than in the files of `FOLDER`."""
    usual: dict[str, Any] = {}
    for own in (own for path in SHIPPED for own in read_yaml(path).values() if isinstance(own, dict)):
        usual |= own.get("options", {})
    for key, value in options.items():
        kind = KINDS.get(key) or schema.kind_like(usual.get(key))
        if value is not None and not kind.fits(value):
            raise UserError(f"{where}: {key}: {schema.shown(value)} must be like {usual.get(key)!r}: {kind.cure}")


def _nested(node: Any) -> bool:
    """Returns whether it is a mapping of texts to mappings."""
    return _is_options(node) and all(isinstance(value, dict) for value in node.values())


def _is_options(node: Any) -> bool:
    return isinstance(node, dict) and all(isinstance(key, str) for key in node)


def _check_values(values: Mapping[str, Any]) -> None:
    """Raises UserError for a value that is not allowed, or values that do not go together."""
    schema.check_ranges(values, KINDS, schema.FLAGS, RELATIONS)
    weights = values.get("loss_weights")
    if weights is not None:
        if not all(schema.whole(0).holds(key) for key in weights):
            raise UserError(f"--loss_weights {schema.shown(weights)}: write {{index of an observation: weight}}")
        schema.check_ranges(weights, dict.fromkeys(weights, schema.number(0)), "--loss_weights {{{}: {}}}".format)


def _is_deferred(value: Any) -> bool:
    return isinstance(value, str) and value.startswith(DEFERRED)


def expand(template: str, values: Mapping[str, Any]) -> str:
    """Fills "f:…{name}…" with the values of the names; nothing but names may stand between the braces."""

    def value(match: re.Match[str]) -> str:
        if match[1] not in values:
            raise UserError(f"{template}: there is no option {match[1]}")
        return str(values[match[1]])

    text = re.sub(r"\{(\w+)\}", value, template.removeprefix(DEFERRED))
    if "{" in text or "}" in text:
        raise UserError(f"{template}: only names of options can stand between braces")
    return text


def alike(template: str, values: Mapping[str, Any], fixed: Collection[str]) -> re.Pattern[str]:
    """Returns what matches a deferred text with any numbers for the names that are not `fixed`, which are groups."""
    pattern, seen = "", set[str]()
    for text, name in re.findall(r"([^{]*)(?:\{(\w+)\})?", template.removeprefix(DEFERRED)):
        pattern += re.escape(text)
        if name:
            free = f"(?P={name})" if name in seen else f"(?P<{name}>[0-9.]+(?:e-?[0-9]+)?)"
            pattern += re.escape(str(values[name])) if name in fixed else free
            seen.add(name)
    return re.compile(pattern)


def names_in(template: str) -> list[str]:
    """Lists the names of options in a deferred text."""
    return re.findall(r"\{(\w+)\}", template)


def experiment_name(watch: Sequence[Sequence[str]], values: Mapping[str, Any]) -> str:
    """Joins labels and values of the options that there are: "diffusion/defaults_H32_T20"."""
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
