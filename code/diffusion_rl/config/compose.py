"""The configuration files: where they are, and composing them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import hydra
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf

from diffusion_rl.config.instantiate import flatten, register_resolvers
from diffusion_rl.config.yaml_files import read_yaml
from diffusion_rl.core.errors import UserError

HYDRAS_OWN = ("hydra.", "hydra_plugins.", "logging.", "colorlog.", "ext://sys.std")
REPOSITORY = Path(__file__).resolve().parents[3]
CONFIG_ROOT = next((d for d in (REPOSITORY / "cfg", Path.cwd() / "cfg") if (d / "_base").is_dir()), REPOSITORY / "cfg")


def shipped_configs() -> list[str]:
    """Names of all configurations of `script/run.py`, such as "gym/finetune/hopper-v2/ft_ppo_diffusion_mlp"."""
    files = (path.relative_to(CONFIG_ROOT) for path in CONFIG_ROOT.rglob("*.yaml"))
    return sorted(str(path.with_suffix("")) for path in files if path.parts[0] not in ("_base", "planning"))


def check_own_files(name: str, folder: Path, seen: set[Path] | None = None) -> None:
    """Read a configuration of the user's own, and those that its defaults list names beside it, as a safe reader does.

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
    """Raise UserError where a file sets Hydra or logging up with classes or functions that are not theirs.

    node: `hydra` of a configuration without overrides. Hydra would call them before anything else is looked at.
    """
    for key, value in flatten(OmegaConf.to_container(node, resolve=False)).items():
        leaf = key.rpartition(".")[2]
        values = value if isinstance(value, list) else [value]
        if leaf in ("_target_", "()", "class") and not all(str(one).startswith(HYDRAS_OWN) for one in values):
            raise UserError(f"hydra.{key}={str(value)[:80]}: a configuration file may not name this; refused")


def compose(name: str, overrides: Sequence[str] = (), *, folder: str | Path | None = None) -> DictConfig:
    """The configuration `name`, resolved lazily, in `folder` or below cfg/, with its `hydra` node."""
    register_resolvers()
    GlobalHydra.instance().clear()
    overrides = list(overrides)
    if folder is not None and Path(folder).resolve() != CONFIG_ROOT:
        overrides.append(f"hydra.searchpath=['file://{CONFIG_ROOT}']")
    with hydra.initialize_config_dir(str(Path(folder or CONFIG_ROOT).resolve()), version_base="1.3"):
        return hydra.compose(name.removesuffix(".yaml"), overrides, return_hydra_config=True)
