"""Which folder a run of this repository's own scripts writes to, as far as that is known before it starts."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusion_rl.config.compose import REPOSITORY, compose_job, mending
from diffusion_rl.core.errors import UserError
from diffusion_rl.methods.diffuser.options import COMMANDS, parse_command
from diffusion_rl.methods.vae_latent.options import default_settings, settings


def folder_of(variant: Mapping[str, Any], style: str) -> str | None:
    """The folder of an experiment's run; None where the script is not known.

    Of script/run.py, whose folders have the time in their names, what else tells them apart: name and seed.
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
    """Make the name of a run (and with it its folder) end in `text`."""
    if style == "file":
        variant["job_name"] = f"{variant.get('job_name') or default_settings()['job_name']}{text}"
    elif style == "flags":
        script = Path(str(variant["script_path"]))
        variant["prefix"] = f"{_planner_options(variant, script).prefix.rstrip('/')}{text}"
    else:
        variant["name"] = f"{_composed(variant).get('name')}{text}"


def _planner_options(variant: Mapping[str, Any], script: Path) -> Any:
    from diffusion_rl.cli.experiments import flags

    return parse_command(script.stem, flags(variant))


def _composed(variant: Mapping[str, Any]) -> Any:
    """What the names of script/run.py are made of. Raises UserError where the configuration cannot be composed."""
    from diffusion_rl.cli.experiments import overrides

    with mending():
        config = compose_job(str(variant.get("config_name")), overrides(variant), folder=variant.get("config_dir"))
        return {key: config.get(key) for key in ("name", "seed", "suite", "log_dir")}
