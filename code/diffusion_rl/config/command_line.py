"""The command line of script/run.py: Hydra's options and overrides, as people may write them, and its help."""

from __future__ import annotations

import os
import re
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import hydra
from omegaconf import DictConfig, OmegaConf

from diffusion_rl.config.compose import CONFIG_ROOT, check_hydra, check_own_files, compose, mending, shipped_configs
from diffusion_rl.config.instantiate import flatten
from diffusion_rl.config.keys import KEYS, OPEN, OPTIONS
from diffusion_rl.config.overrides import help_rows
from diffusion_rl.config.reads import PATHS
from diffusion_rl.config.schema import ABSENT, did_you_mean
from diffusion_rl.core.errors import UserError
from diffusion_rl.core.places import here_or_shipped
from diffusion_rl.core.programs import GO_ON

EXAMPLE = "python script/run.py --config-name=ft_ppo_diffusion_mlp --config-dir=cfg/gym/finetune/hopper-v2"
FULL_ERROR = "HYDRA_FULL_ERROR"  # 1: tracebacks, ours and Hydra's
USAGE = f"usage: python script/run.py --config-name=NAME --config-dir=DIR [key=value ...]   e.g. {EXAMPLE}"
HYDRA_FLAGS = {
    "--help": ["-h"],
    "--hydra-help": [],
    "--resolve": [],
    "--run": ["-r"],
    "--multirun": ["-m"],
    "--shell-completion": ["-sc"],
}
HYDRA_VALUES = {
    "--package": ["-p"],
    "--config-path": ["-cp"],
    "--config-name": ["-cn"],
    "--config-dir": ["-cd"],
    "--experimental-rerun": [],
}
INTERRUPTED = f"interrupted; {GO_ON} goes on from the last checkpoint"  # where a run cannot say more


def optional_wandb_keys(arguments: Sequence[str]) -> list[str]:
    """Adds Hydra's `++` to keys of `wandb`, which is null until asked for: `wandb.entity=me` alone asks for it."""
    return [f"++{argument}" if re.match(r"wandb\.\w+=", argument) else argument for argument in arguments]


def parse(arguments: Sequence[str]) -> Namespace:
    """Parses Hydra's own options; a folder of configurations that is not here is that of cfg/. Raises UserError for an
    unknown one."""
    parser = ArgumentParser(add_help=False, usage=USAGE)
    parser.add_argument("overrides", nargs="*")
    for long, short in HYDRA_FLAGS.items():
        parser.add_argument(long, *short, action="store_true")
    for long, short in HYDRA_VALUES.items():
        parser.add_argument(long, *short)
    parser.add_argument("--cfg", "-c", choices=["job", "hydra", "all"])
    parser.add_argument("--info", "-i", nargs="?", const="all")
    parser.add_argument("--version", action="version", version=f"Hydra {hydra.__version__}")

    def error(message: str) -> NoReturn:
        raise UserError(f"{message} (--help lists the options)")

    parser.error = error  # type: ignore[method-assign]
    options = parser.parse_intermixed_args(list(arguments))
    if options.config_dir:
        options.config_dir = str(here_or_shipped(options.config_dir))
    return options


def overrides_last(arguments: Sequence[str], options: Namespace, defaults: Mapping[str, Any]) -> list[str]:
    """Returns the command line for Hydra, whose parser refuses `a=1 -m b=2`: options first, then what they change.

    options: name the configuration. defaults: its flat values; an optional key that it does not name is added.
    """
    flags = [argument for argument in arguments if argument not in options.overrides]
    for flag, value in (("--config-dir", options.config_dir), ("--config-name", options.config_name)):
        flags += [f"{flag}={value}"] if value else []  # of an option given twice, the last counts
    return flags + [_added(_quoted(one, options.multirun), defaults) for one in options.overrides]


def _added(override: str, defaults: Mapping[str, Any]) -> str:
    """Returns an optional key, or argument of an object, with Hydra's `++` where the configuration does not name it."""
    key, equals, _ = override.partition("=")
    key = key.removeprefix("+")
    if not equals or not re.fullmatch(r"[\w.]+", key):
        return override
    parents = [key.rsplit(".", n)[0] for n in range(1, key.count(".") + 1)]
    is_argument = any(f"{parent}._target_" in defaults for parent in parents)
    named = key in defaults or any(known.startswith(f"{key}.") for known in defaults)
    if override.startswith("+") or (not named and (key in KEYS or is_argument or key.startswith(OPEN))):
        return f"++{override.lstrip('+')}"
    return override


def _quoted(override: str, multirun: bool) -> str:
    """Returns a path, or a value with an equals sign, in the quotes that Hydra's grammar wants around it."""
    key, equals, value = override.partition("=")
    is_path = key.endswith("_path") or key.lstrip("+") in PATHS
    if not equals or value[:1] in ("'", '"', "[", "{") or not (is_path or "=" in value):
        return override
    parts = value.split(",") if multirun else [value]
    return f"{key}={','.join(map(_in_quotes, parts))}"


def _in_quotes(value: str) -> str:
    if re.fullmatch(r"[\w\-/.%*@?|+:$~{}]*", value):  # may stand there as it is; braces: ${…}
        return value
    return "'" + re.sub(r"(\\*)('|$)", lambda m: m[1] * 2 + ("\\'" if m[2] else ""), value) + "'"


#: What every configuration of ours says (cfg/_base/run.yaml): a run's folder is made by its loop, not by Hydra.
_NO_HYDRA_FILES = {
    "hydra.run.dir": ".",
    "hydra.output_subdir": "null",
    "hydra.job_logging.handlers.file.delay": "true",
    "hydra.job_logging.root.handlers": "[console]",
}


def without_hydra_files(arguments: Sequence[str]) -> list[str]:
    """Adds to a command line what keeps Hydra from making folders and files, unless the command line says otherwise."""
    written = [argument.lstrip("+~").partition("=")[0] for argument in arguments]
    return [*arguments, *(f"++{key}={value}" for key, value in _NO_HYDRA_FILES.items() if key not in written)]


def check_names(options: Namespace) -> dict[str, Any]:
    """Returns the flat values of the configuration that the options name, without overrides.

    Raises UserError for a folder or name that does not exist, with the closest that do. Empty where Hydra is asked for
    something that needs no configuration.
    """
    if options.hydra_help or options.shell_completion or options.config_path or options.experimental_rerun:
        return {}
    folder, name = options.config_dir, options.config_name
    if not name:
        raise UserError(f"no --config-name given; {USAGE}")
    if folder is not None and not Path(folder).is_dir():
        known = {f"{CONFIG_ROOT.name}/{Path(config).parent}" for config in shipped_configs()}
        raise UserError(f"--config-dir={folder}: no such folder{did_you_mean(folder.rstrip('/'), known)}")
    places = [Path(folder)] if folder else []
    file_name = f"{name.removesuffix('.yaml')}.yaml"
    if not any((place / file_name).is_file() for place in [*places, CONFIG_ROOT]):
        raise UserError(f"--config-name={name}: no such configuration{_others(folder, name)}")
    return _defaults(options)


def _others(folder: str | None, name: str) -> str:
    if folder is None:
        places = sorted((not c.startswith("gym/"), Path(c)) for c in shipped_configs() if Path(c).name == name)
        folders = [f"{CONFIG_ROOT.name}/{place.parent}" for _, place in places]
        return f"; add --config-dir={folders[0]} (or {', '.join(folders[1:])})" if folders else "; add --config-dir=DIR"
    here = sorted(path.stem for path in Path(folder).glob("*.yaml"))
    close = did_you_mean(name, here)
    return f" in {folder}" + (close or f" (there are: {', '.join(here) or 'none'})")


def _defaults(options: Namespace) -> dict[str, Any]:
    folder = options.config_dir
    if folder and not (Path(folder) / f"{options.config_name.removesuffix('.yaml')}.yaml").is_file():
        folder = None
    if folder:
        check_own_files(options.config_name, Path(folder))
    with mending():
        config = compose(options.config_name, folder=folder)
        check_hydra(config.hydra)
        del config.hydra
        OmegaConf.resolve(config)
    return flatten(config)


def run_jobs(job: Callable[[DictConfig], Any], arguments: Sequence[str], known: Iterable[str]) -> None:
    """Lets Hydra compose the configuration of a command line, once or for each job of a multirun, and call `job`.

    known: keys of the configuration, to suggest one in the place of an unknown one.
    """
    before, argv = os.environ.get(FULL_ERROR), sys.argv
    sys.argv = [argv[0], *without_hydra_files(arguments)]
    os.environ[FULL_ERROR] = "1"  # Hydra then raises its errors; else it would print them and exit
    try:
        with mending(known):
            hydra.main(version_base="1.3", config_path=str(CONFIG_ROOT))(job)()
    finally:
        sys.argv = argv
        set_environment(FULL_ERROR, before)


def set_environment(name: str, value: str | None) -> None:
    """Sets a variable of the environment, or deletes it (None)."""
    if value is None:
        os.environ.pop(name, None)
    else:
        os.environ[name] = value


def help_text(options: Namespace) -> str:
    """Returns general help, or with a configuration's name its keys, values and meanings."""
    return _help_on_config(options) if options.config_name else _help()


def _help_on_config(options: Namespace) -> str:
    config = check_names(options)
    rows = help_rows(dict(sorted(config.items())), KEYS)
    defaults = {key: "" if option.default is ABSENT else option.default for key, option in sorted(OPTIONS.items())}
    others = help_rows({key: value for key, value in defaults.items() if key not in config}, KEYS)
    title = f"Keys of {options.config_name} and their values (key=value changes one):"
    return "\n".join([USAGE, "", title, rows, "", "Optional keys and their defaults (key=value adds one):", others])


def _help() -> str:
    folders: dict[str, list[str]] = {}
    for config in shipped_configs():
        folders.setdefault(f"{CONFIG_ROOT.name}/{Path(config).parent}", []).append(Path(config).name)
    lines = f"""{USAGE}

Trains, fine-tunes or evaluates the policy that a configuration describes.

  --config-dir=DIR --config-name=NAME   one of the configurations below, or your own
  --help with these two                 its keys, values and meanings
  key=value                             any of its keys, e.g. seed=1 train.n_train_itr=3 {GO_ON}
  key=value, +key=value                 an optional key it does not name, e.g. train.max_grad_norm=1 model.use_ddim=true
  wandb.mode=online                     log to Weights & Biases too (also wandb.entity=…, wandb.project=…)
  -m key=v1,v2                          one run per combination
  --cfg job --resolve                   print the configuration and stop
  --hydra-help                          Hydra's own options

Environment: DPPO_DATA_DIR and DPPO_LOG_DIR (default data and log), DPPO_WANDB_ENTITY, HYDRA_FULL_ERROR=1 (tracebacks).
Exit status: 0 done, 2 something to mend (one line says what), 130 interrupted.

Configurations (DIR: NAMEs):"""
    return "\n".join([lines, *(f"  {folder}: {', '.join(names)}" for folder, names in folders.items())])
