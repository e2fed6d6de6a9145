"""The command line of the figures: `python script/make_figures.py --help`."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable, Sequence

from diffusion_rl.cli.status import exit_status
from diffusion_rl.config.overrides import Arguments
from diffusion_rl.reports import lite_figures
from diffusion_rl.reports.compare import compare
from diffusion_rl.reports.contact_sheet import contact_sheet
from diffusion_rl.reports.figures import learning_curve
from diffusion_rl.reports.plan_figure import bars_of, plan_scores

AddCommand = Callable[[argparse._SubParsersAction], None]


def main(more: Sequence[AddCommand] = ()) -> int:
    """Run the process's command line and return its exit status: 2 for what the user can mend.

    more: add the commands of figures that take more than run folders.
    """
    parser = Arguments(description="Figures from run folders, each with a CSV of the numbers drawn.")
    commands = parser.add_subparsers(required=True, metavar="figure")
    _add_learning_curve(commands)
    _add_compare(commands)
    _add_contact_sheet(commands)
    _add_plan_scores(commands)
    _add_lite(commands)
    for add_command in more:
        add_command(commands)

    def draw() -> int:
        args = parser.parse_args()
        return args.draw(args, shlex.join(["python", "script/make_figures.py", *sys.argv[1:]]))

    return exit_status(draw)


def _add_common(command: argparse.ArgumentParser, output: str) -> None:
    command.add_argument("run_folder", nargs="+", help="log/<suite>-<stage>/<name>/<date>_<seed>")
    command.add_argument("--output", default=output, help="the PNG; a CSV goes beside it")
    command.add_argument("--x", default="env_steps", help="env_steps, itr, epoch or any other column of the metrics")
    command.add_argument("--label", action="append", help="legend text: once for each name, or once for each run")


def _add_learning_curve(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser("learning_curve", help="returns (or losses) against steps, seeds as intervals")
    _add_common(command, "figure/learning_curve.png")
    command.add_argument("--y", help="any column of the metrics; default: episode_return, or loss where there is none")
    command.add_argument("--title")
    command.set_defaults(draw=_draw_learning_curve, x=None)


def _draw_learning_curve(args: argparse.Namespace, command: str) -> None:
    path = learning_curve(
        args.run_folder, args.output, x=args.x, y=args.y, labels=args.label, title=args.title, command=command
    )
    print(f"{path}\n{path.with_suffix('.csv')}")


def _add_compare(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser("compare", help="algorithms by task: interquartile means beside published curves")
    _add_common(command, "figure/compare.png")
    command.add_argument("--task", action="append", default=[], help="hopper, …; once for each panel; default: all")
    command.add_argument("--y", help="any column of the metrics; default: success_rate in robomimic, else the return")
    command.add_argument("--kind", choices=("eval", "train"), default="eval", help="which rows of the metrics")
    command.add_argument(
        "--published", choices=("same", "all", "none"), default="same", help="whose published curves are drawn too"
    )
    command.add_argument("--table", action="store_true", help="print the final values as Markdown and LaTeX")
    command.set_defaults(draw=_draw_compare)


def _draw_compare(args: argparse.Namespace, command: str) -> None:
    path, tables = compare(
        args.run_folder,
        args.output,
        tasks=args.task,
        x=args.x,
        y=args.y,
        kind=args.kind,
        labels=args.label,
        references=args.published,
        command=command,
    )
    print(f"{path}\n{path.with_suffix('.csv')}")
    if args.table:
        print(f"\n{tables}")


def _add_contact_sheet(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser("contact_sheet", help="videos at a glance: a row of pictures for each")
    command.add_argument("video", nargs="+", help="mp4 files, as a run's render/ holds them")
    command.add_argument("--output", default="figure/contact_sheet.png", help="the PNG")
    command.add_argument("--columns", type=int, default=6, help="pictures of each video")
    command.set_defaults(draw=_draw_contact_sheet)


def _draw_contact_sheet(args: argparse.Namespace, command: str) -> None:
    print(contact_sheet(args.video, args.output, args.columns, command))


def _add_plan_scores(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser("plan_scores", help="scores of planners, with standard errors, by data set")
    command.add_argument("logbase", help="folder that the plans were written to, as --logbase")
    command.add_argument("--output", default="figure/plan_scores.png", help="the PNG; a CSV goes beside it")
    command.add_argument("--label", action="append", default=[], help="EXPERIMENT=TEXT: draw this folder of plans only")
    command.add_argument("--also", action="append", default=[], help="TEXT:DATASET=MEAN,ERROR: scores from elsewhere")
    command.set_defaults(draw=_draw_plan_scores)


def _draw_plan_scores(args: argparse.Namespace, command: str) -> None:
    path = plan_scores(bars_of(args.logbase, args.label, args.also), args.output, command)
    print(f"{path}\n{path.with_suffix('.csv')}")


def _add_lite(commands: argparse._SubParsersAction) -> None:
    losses = commands.add_parser("lite_losses", help="DiffuserLite: losses against gradient steps")
    losses.add_argument("log", nargs="?", default="results/loss_log.json", help="a loss log (JSON)")
    losses.set_defaults(draw=_draw_lite_losses)
    scores = commands.add_parser("lite_scores", help="DiffuserLite: scores of a sweep over checkpoints")
    scores.add_argument(
        "results", nargs="+", help="inference_results_<model>.json of mode=inference diffusion_ckpt=all"
    )
    scores.set_defaults(draw=_draw_lite_scores)
    gather = commands.add_parser("lite_organize", help="DiffuserLite: move pictures of a results folder to figures/")
    gather.add_argument("folder", nargs="?", default="results")
    gather.set_defaults(draw=lambda args, command: print(*lite_figures.organize_figures(args.folder), sep="\n"))
    for each in (losses, scores):
        each.add_argument("--output", default="results/figures", help="folder of the PNG files")


def _draw_lite_losses(args: argparse.Namespace, command: str) -> None:
    found = lite_figures.by_name(lite_figures.read_rows(args.log, lite_figures.LOSSES))
    print(*lite_figures.plot_loss_curves(found, args.output, command), sep="\n")


def _draw_lite_scores(args: argparse.Namespace, command: str) -> None:
    rows = [row for path in args.results for row in lite_figures.read_rows(path, lite_figures.SCORES)]
    print(lite_figures.plot_scores(rows, args.output, command))
