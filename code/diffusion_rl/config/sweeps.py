"""Multirun (`-m`): several configurations at once, a run folder for every job, failures that stop no other."""

from __future__ import annotations

import copy
import itertools
import re
from argparse import Namespace
from collections.abc import Iterator, Sequence

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.types import RunMode
from omegaconf import DictConfig

from diffusion_rl.core.errors import UserError

IN_THE_FOLDER = ("seed", "name", "logdir", "log_dir")  # keys that set a run's folder apart by themselves


class JobFailed(UserError):
    """A job of a multirun failed; the line that says why has been printed where it happened."""


def configurations(options: Namespace) -> Iterator[Namespace]:
    """Yields the options of each configuration: with `-m`, folder and name may list several, separated by commas."""
    if not options.multirun:
        yield options
        return
    folders = (options.config_dir or "").split(",")
    names = (options.config_name or "").split(",")
    for folder, name in itertools.product(folders, names):
        one = copy.copy(options)
        one.config_dir, one.config_name = folder or None, name or None
        yield one


def swept_keys(options: Namespace) -> list[str]:
    """Returns the keys that `-m` varies.

    Raises UserError if one folder is prescribed for all jobs of a sweep.
    """
    if not options.multirun:
        return []
    overrides = OverridesParser.create().parse_overrides(options.overrides)
    swept = [override.key_or_group for override in overrides if override.is_sweep_override()]
    for override in overrides:
        value = str(override.value())
        if swept and override.key_or_group == "logdir" and "logdir" not in swept and "$" not in value:
            raise UserError(f"logdir={value} is one folder for all jobs of the sweep: leave it out or give log_dir=…")
    return swept


def in_multirun() -> bool:
    """Returns whether this is a job of a multirun."""
    return HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN


def job_label(swept: Sequence[str]) -> str:
    """Returns which job of a multirun this is, for people: "job 1 (seed=1)"."""
    values = [f"{key}={value}" for key, value in _swept_values(swept)]
    return f"job {HydraConfig.get().job.num} ({' '.join(values)})"


def name_job(config: DictConfig, swept: Sequence[str]) -> None:
    """Appends what tells this job apart, except its seed, to `name`: "…,train.gamma=0.9".

    The run folder, going on and figures go by the name, and all jobs of a multirun share one date; so jobs that differ
    in anything but the seed get folders of their own and are never averaged with each other.
    """
    parts = [
        re.sub(r"[^\w.=+-]+", "-", f"{key}={value}") for key, value in _swept_values(swept) if key not in IN_THE_FOLDER
    ]
    if parts and "name" in config:
        config.name = ",".join([str(config.name), *parts])


def _swept_values(swept: Sequence[str]) -> list[tuple[str, str]]:
    """Returns this job's values of the keys that the multirun varies."""
    pairs = (override.lstrip("+~").partition("=") for override in HydraConfig.get().overrides.task)
    return [(key, value) for key, _, value in pairs if key in swept]
