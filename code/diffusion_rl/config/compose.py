"""The configuration files: where they are, composing them, and checking and completing what came out."""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from diffusion_rl.config.instantiate import first_line, flatten, plain, register_resolvers
from diffusion_rl.config.keys import KEYS, check_keys, check_numbers, complete, unknown_key
from diffusion_rl.config.reads import interpolated
from diffusion_rl.config.targets import translate
from diffusion_rl.config.yaml_files import read_yaml
from diffusion_rl.core.errors import UserError
from diffusion_rl.core.places import REPOSITORY, data_dir, here_or_shipped

HYDRAS_OWN = ("hydra.", "hydra_plugins.", "logging.", "colorlog.", "ext://sys.std")
CONFIG_ROOT = REPOSITORY / "cfg"
NO_SUITES = ("_base", "planning", "reproductions.yaml")  # in cfg/, but nothing that script/run.py runs
Config = DictConfig  # what loops receive: a mapping whose values are attributes, too


def shipped_configs() -> list[str]:
    """Returns names of all configurations of `script/run.py`, such as "gym/finetune/hopper-v2/ft_ppo_diffusion_mlp"."""
    files = (path.relative_to(CONFIG_ROOT) for path in CONFIG_ROOT.rglob("*.yaml"))
    return sorted(str(path.with_suffix("")) for path in files if path.parts[0] not in NO_SUITES)


def check_own_files(name: str, folder: Path, seen: set[Path] | None = None) -> None:
    """Reads a configuration of the user's own, and those that its defaults list names beside it, as a safe reader does.

    OmegaConf, which reads them then, knows no limits. Raises UserError for what is no YAML, or too large or too deep.
    """
    path, seen = folder / f"{name.removesuffix('.yaml')}.yaml", set() if seen is None else seen
    if path in seen or not path.is_file() or path.resolve().is_relative_to(CONFIG_ROOT.resolve()):
        return
    seen.add(path)
    content = read_yaml(path)
    if content is not None and not isinstance(content, dict):
        raise UserError(f"{path} is no configuration: a mapping of keys to values is needed")
    entries = (content or {}).get("defaults")
    for entry in entries if isinstance(entries, list) else ():
        for group, option in entry.items() if isinstance(entry, dict) else (("", entry),):
            for one in option if isinstance(option, list) else (option,):
                check_own_files(f"{str(group).split('@')[0]}/{one}".strip("/"), folder, seen)


def check_hydra(node: Mapping[str, Any]) -> None:
    """Raises UserError where a file sets Hydra or logging up with classes or functions that are not theirs.

    node: `hydra` of a configuration without overrides. Hydra would call them before anything else is looked at.
    """
    for key, value in flatten(OmegaConf.to_container(node, resolve=False)).items():
        leaf = key.rpartition(".")[2]
        values = value if isinstance(value, list) else [value]
        if leaf in ("_target_", "()", "class") and not all(str(one).startswith(HYDRAS_OWN) for one in values):
            raise UserError(f"hydra.{key}={str(value)[:80]}: a configuration file may not name this; refused")


def compose(name: str, overrides: Sequence[str] = (), *, folder: str | Path | None = None) -> DictConfig:
    """Returns the configuration `name`, resolved lazily, in `folder` or below cfg/, with its `hydra` node."""
    register_resolvers()
    GlobalHydra.instance().clear()
    overrides, place = list(overrides), here_or_shipped(folder or CONFIG_ROOT).resolve()
    if place != CONFIG_ROOT:
        overrides.append(f"hydra.searchpath=['file://{CONFIG_ROOT}']")
    with hydra.initialize_config_dir(str(place), version_base="1.3"):
        return hydra.compose(name.removesuffix(".yaml"), overrides, return_hydra_config=True)


def compose_job(name: str, overrides: Sequence[str] = (), *, folder: str | Path | None = None) -> DictConfig:
    """Returns the configuration `name` as a loop takes it: without Hydra's node, open for further keys.

    Raises:
        UserError: it cannot be composed.
    """
    with mending():
        config = compose(name, overrides, folder=folder)
    OmegaConf.set_struct(config, False)
    config.pop("hydra", None)
    return config


def prepare(config: DictConfig, defaults: Mapping[str, Any] | None = None) -> DictConfig:
    """Resolves `config`, checks its keys and class names, and fills in what follows from the rest.

    `defaults`: the flat configuration without overrides, for the types of values. Neither imports TensorFlow nor
    writes anything. Raises UserError.
    """
    with mending():
        _find_data(config)
        written = OmegaConf.to_container(config)
        used = interpolated(written)
        OmegaConf.resolve(config)
    missing = sorted(OmegaConf.missing_keys(config), key=lambda key: (key.count("."), key))
    if missing:
        raise UserError(f"{missing[0]} has no value: give {missing[0]}=… on the command line")
    values = plain(config)
    if "_target_" not in values:
        raise UserError("the configuration has no _target_: it names no loop to run")
    translate(values)
    check_keys(values, defaults or {}, used)
    check_numbers(values)
    complete(values)
    _name_own(values, written, defaults or {})
    _complete_wandb(values)
    return OmegaConf.create(values)


def plain_copy(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a configuration as mappings and lists of its own, interpolations resolved."""
    return plain(OmegaConf.create(plain(config)))


def merged(config: Mapping[str, Any], changes: Mapping[str, Any]) -> Config:
    """Returns a resolved copy of a configuration, with changes."""
    return OmegaConf.merge(plain_copy(config), changes)  # type: ignore[return-value]


def to_yaml(values: Mapping[str, Any]) -> str:
    """Returns plain values as the text of a YAML file."""
    return OmegaConf.to_yaml(OmegaConf.create(dict(values)))


def _find_data(config: DictConfig) -> None:
    """Keeps the default data directory where the program starts in a folder without data/."""
    if "DPPO_DATA_DIR" not in os.environ and config.get("data_dir") == "data" and not Path("data").exists():
        config.data_dir = str(data_dir())


def _name_own(config: dict[str, Any], written: Any, defaults: Mapping[str, Any]) -> None:
    """Names a run after the environment of the user's own ("module:Env-v0") that took the place of a task's.

    written: `config` before it was resolved; a name or folder that is a text there is somebody's choice and stays.
    """
    env, task = config.get("env"), config.get("env_name")
    own = str(env.get("name") if isinstance(env, Mapping) else env)
    if ":" in own and own != defaults.get("env.name") and task == defaults.get("env_name", task):
        name = own.rpartition(":")[2].replace("/", "_")
        for key in ("name", "logdir"):
            if "${" in str(written.get(key)):
                config[key] = str(config[key]).replace(str(task), name)
        config["env_name"] = name


def _complete_wandb(config: dict[str, Any]) -> None:
    """Makes `wandb.mode: disabled` null, as `wandb: null` is; otherwise entity, project and run get their defaults."""
    wandb = config.get("wandb")
    if not wandb or wandb.get("mode") == "disabled":
        config["wandb"] = None
        return
    env = config.get("env_name") or config.get("env")
    defaults = {
        "entity": os.environ.get("DPPO_WANDB_ENTITY") or None,
        "project": config.get("project") or f"{config.get('suite')}-{env}-{config.get('stage')}",
        "run": f"{time.strftime('%H-%M-%S')}_{config.get('name')}",
    }
    config["wandb"] = defaults | {key: value for key, value in wandb.items() if value not in (None, "")}


@contextlib.contextmanager
def mending(known: Iterable[str] = ()) -> Iterator[None]:
    """Makes errors of Hydra and OmegaConf, which come of what people write, UserErrors of one line.

    known: keys of the configuration, to suggest one in the place of an unknown one.
    """
    try:
        yield
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(config_line(error, known)) from error


def config_line(error: Exception, known: Iterable[str] = ()) -> str:
    """Returns the line about an error of Hydra or OmegaConf, with the keys that were probably meant."""
    text = first_line(error)
    if isinstance(error, OverrideParseException):
        return f"cannot read the argument {error.override}: {text}; put the value in quotes: \"key='value'\""
    unknown = re.search(r"Could not (?:override|delete from config\.) '([^']+)'", text)
    return unknown_key(unknown[1], {*KEYS, *known}) if unknown else text
