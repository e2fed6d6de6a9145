"""The command line of the figures: `python script/make_figures.py --help`."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from diffusion_rl.cli.status import exit_status
from diffusion_rl.config.overrides import Arguments
from diffusion_rl.core.places import output_folder
from diffusion_rl.core.programs import as_here
from diffusion_rl.reports import lite_figures
from diffusion_rl.reports.compare import compare
from diffusion_rl.reports.figures import learning_curve
from diffusion_rl.reports.pictures import animation, contact_sheet
from diffusion_rl.reports.plan_results import bars_of, plan_scores

AddCommand = Callable[[argparse._SubParsersAction], None]
OUTPUT = "the figure (.png, .pdf or .svg); a CSV goes beside it"


def main(more: Sequence[AddCommand] = ()) -> int:
    """Runs the process's command line and returns its exit status: 2 for what the user can mend.

    Args:
        more: add the commands of figures that take more than run folders. A command's `draw` takes its options and the
            whole command line, and returns what to print.
    """
    parser = Arguments(description="Figures from run folders, each with a CSV of the numbers drawn.")
    commands = parser.add_subparsers(required=True, metavar="figure")
    for add_command in (_learning_curve, _compare, _contact_sheet, _animation, _plan_scores, _lite, *more):
        add_command(commands)

    def draw() -> None:
        options = vars(parser.parse_args())
        command = as_here(f"python script/make_figures.py {shlex.join(sys.argv[1:])}")
        print(options.pop("draw")(**options, command=command))

    return exit_status(draw)


def with_table(path: Path) -> str:
    """Returns the lines that name a figure and its table."""
    return f"{path}\n{path.with_suffix('.csv')}"


def _add_common(command: argparse.ArgumentParser, output: str, x: str | None) -> None:
    command.add_argument(
        "run_folders", metavar="run_folder", nargs="+", help="log/<suite>-<stage>/<name>/<date>_<seed>"
    )
    command.add_argument("--output", default=output_folder(output), help=OUTPUT)
    command.add_argument("--x", default=x, help="env_steps, itr, epoch or any other column of the metrics")
    label = "legend text: once for each name, or once for each run"
    command.add_argument("--label", dest="labels", metavar="LABEL", action="append", help=label)


def _learning_curve(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser("learning_curve", help="returns (or losses) against steps, seeds as intervals")
    _add_common(command, "figure/learning_curve.png", None)
    command.add_argument("--y", help="any column of the metrics; default: episode_return, or loss where there is none")
    command.add_argument("--title")
    command.set_defaults(draw=lambda **options: with_table(learning_curve(**options)))


def _compare(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser("compare", help="algorithms by task: interquartile means beside published curves")
    _add_common(command, "figure/compare.png", "env_steps")
    tasks = "hopper, …; once for each panel; default: all"
    command.add_argument("--task", dest="tasks", metavar="TASK", action="append", default=[], help=tasks)
    command.add_argument("--y", help="any column of the metrics; default: success_rate in robomimic, else the return")
    command.add_argument("--kind", choices=("eval", "train"), default="eval", help="which rows of the metrics")
    published = {"choices": ("same", "all", "none"), "default": "same", "help": "whose published curves are drawn too"}
    command.add_argument("--published", dest="references", **published)
    command.add_argument("--table", action="store_true", help="print the final values as Markdown and LaTeX")

    def draw(table: bool, **options: Any) -> str:
        path, tables = compare(**options)
        return with_table(path) + (f"\n\n{tables}" if table else "")

    command.set_defaults(draw=draw)


def _contact_sheet(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser("contact_sheet", help="videos at a glance: a row of pictures for each")
    command.add_argument("videos", metavar="video", nargs="+", help="mp4 files, as a run's render/ holds them")
    command.add_argument("--output", default=output_folder("figure/contact_sheet.png"), help="the PNG")
    command.add_argument("--columns", type=int, default=6, help="pictures of each video")
    command.set_defaults(draw=contact_sheet)


def _animation(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser("animation", help="videos side by side, as a GIF")
    command.add_argument("videos", metavar="video", nargs="+", help="mp4 files, as a run's render/ holds them")
    command.add_argument("--output", default=output_folder("figure/animation.gif"), help="the GIF")
    command.add_argument("--every", type=int, default=3, help="show every n-th frame")
    command.add_argument("--height", type=int, default=180, help="pixels")
    command.set_defaults(draw=lambda command, **options: animation(**options))


def _plan_scores(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser("plan_scores", help="scores of planners, with standard errors, by data set")
    command.add_argument("logbase", help="folder that the plans were written to, as --logbase")
    command.add_argument("--output", default=output_folder("figure/plan_scores.png"), help=OUTPUT)
    command.add_argument("--label", action="append", default=[], help="EXPERIMENT=TEXT: draw this folder of plans only")
    command.add_argument("--also", action="append", default=[], help="TEXT:DATASET=MEAN,ERROR: scores from elsewhere")

    def draw(logbase: str, label: list[str], also: list[str], output: str, command: str) -> str:
        return with_table(plan_scores(bars_of(logbase, label, also), output, command))

    command.set_defaults(draw=draw)


def _lite(commands: argparse._SubParsersAction) -> None:
    losses = commands.add_parser("lite_losses", help="DiffuserLite: losses against gradient steps")
    losses.add_argument("log", nargs="?", default=output_folder("results/loss_log.json"), help="a loss log (JSON)")
    losses.set_defaults(draw=_lite_losses)
    scores = commands.add_parser("lite_scores", help="DiffuserLite: scores of a sweep over checkpoints")
    scores.add_argument(
        "results", nargs="+", help="inference_results_<model>.json of mode=inference diffusion_ckpt=all"
    )
    scores.set_defaults(draw=_lite_scores)
    for command in (losses, scores):
        command.add_argument("--output", default=output_folder("results/figures"), help="folder of the PNG files")
    organize = commands.add_parser("lite_organize", help="DiffuserLite: move pictures of a results folder to figures/")
    organize.add_argument("folder", nargs="?", default=output_folder("results"))
    organize.set_defaults(draw=lambda folder, command: "\n".join(map(str, lite_figures.organize_figures(folder))))


def _lite_losses(log: str, output: str, command: str) -> str:
    curves = lite_figures.by_name(lite_figures.read_rows(log, lite_figures.LOSSES))
    return "\n".join(map(str, lite_figures.plot_loss_curves(curves, output, command)))


def _lite_scores(results: list[str], output: str, command: str) -> Path:
    rows = [row for path in results for row in lite_figures.read_rows(path, lite_figures.SCORES)]
    return lite_figures.plot_scores(rows, output, command)
