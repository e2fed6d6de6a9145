"""Which folder a run of this repository's own scripts writes to, as far as that is known before it starts."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusion_rl.config.compose import REPOSITORY
from diffusion_rl.core.errors import UserError

PLANNERS = {  # scripts/: experiment, data set, configuration
    "train.py": ("diffusion", "hopper-medium-expert-v2", "config.locomotion"),
    "train_values.py": ("values", "hopper-medium-expert-v2", "config.locomotion"),
    "plan_guided.py": ("plan", "walker2d-medium-replay-v2", "config.locomotion"),
    "plan_unguided.py": ("plan_unguided", "walker2d-medium-replay-v2", "config.locomotion"),
    "plan_maze2d.py": ("plan", "maze2d-umaze-v1", "config.maze2d"),
    "train_kuka.py": ("diffusion", "kuka", "config.kuka"),
    "train_kuka_classifier.py": ("classifier", "kuka", "config.kuka"),
    "plan_kuka.py": ("plan", "kuka", "config.kuka"),
}


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
        from diffusion_rl.cli.vae import settings

        return str(settings(variant)["logdir"])
    if style == "flags" and script.parent == REPOSITORY / "scripts" and script.name in PLANNERS:
        return str(_planner_options(variant, script.name).savepath)
    if style == "hydra" and script == REPOSITORY / "script" / "run.py" and "logdir" not in variant:
        config = _composed(variant)
        return f"{config.get('log_dir')}/{config.get('suite')}/{config.get('name')}/*_{config.get('seed')}"
    return None


def append_to_name(variant: dict[str, Any], style: str, text: str) -> None:
    """Make the name of a run (and with it its folder) end in `text`."""
    if style == "file":
        from diffusion_rl.cli.vae import default_settings

        variant["job_name"] = f"{variant.get('job_name') or default_settings()['job_name']}{text}"
    elif style == "flags":
        name = Path(str(variant["script_path"])).name
        variant["prefix"] = f"{_planner_options(variant, name).prefix.rstrip('/')}{text}"
    else:
        variant["name"] = f"{_composed(variant).get('name')}{text}"


def _planner_options(variant: Mapping[str, Any], script: str) -> Any:
    from diffusion_rl.cli.experiments import flags
    from diffusion_rl.methods.diffuser.options import parse

    experiment, dataset, config = PLANNERS[script]
    return parse(experiment, flags(variant), dataset, config, save=False)


def _composed(variant: Mapping[str, Any]) -> Any:
    """What the names of script/run.py are made of. Raises UserError where the configuration cannot be composed."""
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    from diffusion_rl.cli.experiments import overrides
    from diffusion_rl.config.compose import compose

    try:
        config = compose(str(variant["config_name"]), overrides(variant), folder=variant.get("config_dir"))
        return {key: config.get(key) for key in ("name", "seed", "suite", "log_dir")}
    except (HydraException, OmegaConfBaseException, LookupError, OSError) as error:
        raise UserError(str(error)) from error
