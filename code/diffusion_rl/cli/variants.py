"""A variant of an experiment in the words of its script, and the folder it writes to as far as that is known."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from diffusion_rl.config.compose import REPOSITORY, compose_job, mending
from diffusion_rl.config.overrides import META_KEYS
from diffusion_rl.core.errors import UserError
from diffusion_rl.methods.diffuser.options import COMMANDS, parse_command
from diffusion_rl.methods.vae_latent.options import default_settings, settings

HYDRA_OPTIONS = ("config_name", "config_dir")


def flat(node: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields the values of nested mappings with their dotted keys."""
    for key, value in node.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def as_flags(variant: Mapping[str, Any]) -> list[str]:
    """Writes the values of a variant as `--key value`."""
    values = {k: v for k, v in variant.items() if k not in META_KEYS}
    return [part for key, value in flat(values) for part in (f"--{key}", str(value))]


def as_overrides(variant: Mapping[str, Any]) -> list[str]:
    """Writes the values of a variant as Hydra's `key=value`, but for the configuration itself."""
    values = {k: v for k, v in variant.items() if k not in (*META_KEYS, *HYDRA_OPTIONS)}
    return [f"{key}={_hydra(value)}" for key, value in flat(values)]


def _hydra(value: Any) -> str:
    """Returns a value in Hydra's grammar, for which JSON's lists and numbers will do."""
    if isinstance(value, list):
        return f"[{','.join(map(_hydra, value))}]"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def folder_of(variant: Mapping[str, Any], style: str) -> str | None:
    """Returns the folder of an experiment's run; None where the script is not known.

    Folders of script/run.py have the time in their names: name and seed, which also tell them apart, stand for it.
    """
    with contextlib.suppress(UserError):  # its own process will say what is wrong
        return _folder_of(variant, style)
    return None


def _folder_of(variant: Mapping[str, Any], style: str) -> str | None:
    script = Path(str(variant["script_path"])).resolve()
    if style == "file" and script == REPOSITORY / "train.py":
        return str(settings(variant)["logdir"])
    if style == "flags" and script.parent == REPOSITORY / "scripts" and script.stem in COMMANDS:
        return str(_planner_options(variant, script).savepath)
    if style == "hydra" and script == REPOSITORY / "script" / "run.py" and "logdir" not in variant:
        config = _composed(variant)
        return f"{config.get('log_dir')}/{config.get('suite')}/{config.get('name')}/*_{config.get('seed')}"
    return None


def append_to_name(variant: dict[str, Any], style: str, text: str) -> None:
    """Makes the name of a run (and with it its folder) end in `text`."""
    if style == "file":
        variant["job_name"] = f"{variant.get('job_name') or default_settings()['job_name']}{text}"
    elif style == "flags":
        script = Path(str(variant["script_path"]))
        variant["prefix"] = f"{_planner_options(variant, script).prefix.rstrip('/')}{text}"
    else:
        variant["name"] = f"{_composed(variant).get('name')}{text}"


def _planner_options(variant: Mapping[str, Any], script: Path) -> Any:
    return parse_command(script.stem, as_flags(variant))


def _composed(variant: Mapping[str, Any]) -> Any:
    """Returns what the names of script/run.py are made of. Raises UserError where the configuration cannot be
    composed."""
    with mending():
        config = compose_job(str(variant.get("config_name")), as_overrides(variant), folder=variant.get("config_dir"))
        return {key: config.get(key) for key in ("name", "seed", "suite", "log_dir")}
