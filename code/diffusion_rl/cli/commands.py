"""The planners' commands that need no TensorFlow: results of plans as text and as a table."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Sequence
from typing import Any

from diffusion_rl.cli.status import exit_status
from diffusion_rl.core.errors import UserError
from diffusion_rl.core.files import read_json
from diffusion_rl.methods.diffuser.options import pairs
from diffusion_rl.reports import plan_results
from diffusion_rl.training import signals

Command = Callable[[Sequence[str]], int | None]


def run(command: str | Command) -> int:
    """Run a command with the arguments of this process, which ends with the returned status.

    Args:
        command: a function, or "module:function" of this folder, which is imported (TensorFlow with it) where a signal
            is one line already.
    """
    status = exit_status(lambda: (_function(command) if isinstance(command, str) else command)(sys.argv[1:]))
    signals.ignore()  # what is left is the end of the interpreter
    return status


def _function(command: str) -> Command:
    module, _, name = command.partition(":")
    with signals.held():
        return getattr(importlib.import_module(f"diffusion_rl.cli.{module}"), name)


def read_results(arguments: Sequence[str]) -> None:
    """`[--dataset NAME] [--logbase DIR]`: scores of the plans below a folder (logs/pretrained)."""
    options = _known(arguments, {"dataset": None, "logbase": "logs/pretrained"})
    dataset = options["dataset"]
    found = plan_results.experiments(options["logbase"], [dataset] if dataset else plan_results.DATASETS)
    if not found:
        raise UserError(f"no results of plans below {options['logbase']}: plan first, or name another --logbase")
    for experiment in found:
        print(experiment)


def table(arguments: Sequence[str]) -> None:
    """`[--logbase DIR] [--labels FILE]`: a LaTeX table of the published scores.

    --logbase: Diffuser's column from the plans below a folder, the guided ones where there are some. --labels: a JSON
    file with other words for the rows and columns, {"Dataset": "…", "hopper": "…"}.
    """
    options = _known(arguments, {"logbase": None, "labels": None})
    means, errors = plan_results.published()
    if options["logbase"]:
        own = plan_results.experiments(options["logbase"])
        if not own:
            raise UserError(f"no results of plans below {options['logbase']}: plan first, or name another --logbase")
        own.sort(key=lambda each: each.guided)  # the last of a data set counts
        means["Diffuser"] = {each.dataset: round(each.mean, 1) for each in own}
        errors["Diffuser"] = {each.dataset: round(each.error, 2) for each in own}
    labels = _labels(options["labels"]) if options["labels"] else None
    print(plan_results.latex_table(means, errors, labels=labels))


def _labels(path: str) -> dict[str, str]:
    try:
        return dict(read_json(path))
    except (ValueError, TypeError) as error:
        raise UserError(f"--labels {path}: {error}; a JSON object of words is needed") from error


def _known(arguments: Sequence[str], defaults: dict[str, Any]) -> dict[str, Any]:
    given = pairs(arguments)
    unknown = sorted(given.keys() - defaults.keys())
    if unknown:
        raise UserError(f"--{unknown[0]} is no option of this command: there are --{', --'.join(defaults)}")
    return defaults | given
