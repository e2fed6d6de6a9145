"""The planners' commands that need no TensorFlow: results of plans as text and as a table."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Sequence
from typing import Any

from diffusion_rl.cli.status import exit_status, show
from diffusion_rl.config.overrides import flags, help_rows, meanings, pairs, split_help
from diffusion_rl.config.schema import FLAGS, TEXT_OR_NONE, Option
from diffusion_rl.core import quiet
from diffusion_rl.core.errors import UserError
from diffusion_rl.core.files import read_json
from diffusion_rl.core.places import output_folder
from diffusion_rl.core.programs import script
from diffusion_rl.reports import plan_results
from diffusion_rl.training import signals

#: The method whose options the commands of a module have.
OPTIONS_OF = {"diffuser": "diffuser", "kuka": "diffuser", "diffuser_lite": "diffuser_lite"}
Command = Callable[[Sequence[str]], int | None]


def run(command: str | Command) -> int:
    """Runs a command with the arguments of this process, which ends with the returned status.

    Args:
        command: a function, or "module:function" of this folder, which is imported (TensorFlow with it) where a signal
            is one line already. Its help is printed without that.
    """
    status = exit_status(lambda: _started(command, sys.argv[1:]))
    signals.ignore()  # what is left is the end of the interpreter
    return status


def _started(command: str | Command, arguments: Sequence[str]) -> int | None:
    if not isinstance(command, str):
        return command(arguments)
    module, _, name = command.partition(":")
    if module in OPTIONS_OF and split_help(arguments)[0]:
        options = importlib.import_module(f"diffusion_rl.methods.{OPTIONS_OF[module]}.options")
        show(options.help_text(script().stem, arguments))
        return None
    with signals.held():
        if module in OPTIONS_OF:  # the others choose a GPU first
            quiet.import_tensorflow()
        function = getattr(importlib.import_module(f"diffusion_rl.cli.{module}"), name)
    return function(arguments)


def read_results(arguments: Sequence[str]) -> None:
    """Prints (`[--dataset NAME] [--logbase DIR]`) scores of plans below a folder (logs/pretrained, or else logs)."""
    options = _parse(
        arguments,
        dataset=Option("the data set; none: all of locomotion", TEXT_OR_NONE, default=None),
        logbase=Option("folder of the plans; none: logs/pretrained, or else logs", TEXT_OR_NONE, default=None),
    )
    if options is None:
        return
    datasets = [options["dataset"]] if options["dataset"] else plan_results.DATASETS
    folders = [options["logbase"]] if options["logbase"] else [output_folder("logs/pretrained"), output_folder("logs")]
    show("\n".join(map(str, _experiments(folders, datasets))))


def _experiments(
    folders: Sequence[str], datasets: Sequence[str] = plan_results.DATASETS
) -> list[plan_results.Experiment]:
    """Returns the results below the first of the folders that has some."""
    for folder in folders:
        if found := plan_results.experiments(folder, datasets):
            return found
        if folder != folders[-1]:
            print(f"no results of plans below {folder}: those below {folders[-1]}", file=sys.stderr)
    looked = f"<data set>/plans*/*/*/rollout.json of {', '.join(datasets)} below {' and '.join(folders)}"
    raise UserError(f"no results of plans: looked for {looked}; plan first, or name another --logbase")


def table(arguments: Sequence[str]) -> None:
    """Prints (`[--logbase DIR] [--labels FILE]`) a LaTeX table of the published scores.

    --logbase: Diffuser's column from the plans below a folder, the guided ones where there are some. --labels: a JSON
    file with other words for the rows and columns, {"Dataset": "…", "hopper": "…"}.
    """
    options = _parse(
        arguments,
        logbase=Option(
            "folder of plans, whose scores fill Diffuser's column; none: the published ones", TEXT_OR_NONE, default=None
        ),
        labels=Option('a JSON file of other words for rows and columns: {"Dataset": "…"}', TEXT_OR_NONE, default=None),
    )
    if options is None:
        return
    means, errors = plan_results.published()
    home_made: set[tuple[str, str]] = set()
    if options["logbase"]:
        own = sorted(
            _experiments([options["logbase"]]), key=lambda experiment: experiment.guided
        )  # the last one counts
        means["Diffuser"] = {experiment.dataset: round(experiment.mean, 1) for experiment in own}
        errors["Diffuser"] = {experiment.dataset: round(experiment.error, 2) for experiment in own}
        last = {experiment.dataset: experiment.home_made for experiment in own}
        home_made = {("Diffuser", dataset) for dataset, made in last.items() if made}
    labels = _labels(options["labels"]) if options["labels"] else None
    show(plan_results.latex_table(means, errors, labels=labels, home_made=home_made))


def _labels(path: str) -> dict[str, str]:
    try:
        return dict(read_json(path))
    except (ValueError, TypeError) as error:
        raise UserError(f"--labels {path}: {error}; a JSON object of words is needed") from error


def _parse(arguments: Sequence[str], **known: Option) -> dict[str, Any] | None:
    """Returns the options of a command; None where its help was asked for and printed."""
    wanted, rest = split_help(arguments)
    values = flags(pairs(rest), known, "this command")
    if wanted:
        show(f"usage: python {script()} [--option value ...]\n\n{help_rows(values, meanings(known), FLAGS)}")
    return None if wanted else values
