"""Figures from run folders. `python script/make_figures.py --help` lists them."""

from __future__ import annotations

import argparse
import shlex
import sys

from diffusion_rl.core.errors import UserError
from diffusion_rl.reports import figures


def add_learning_curve(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser("learning_curve", help="return against environment steps, seeds as intervals")
    command.add_argument("run_folder", nargs="+", help="log/<suite>-<stage>/<name>/<date>_<seed>")
    command.add_argument("--output", default="figure/learning_curve.png", help="the PNG; a CSV goes beside it")
    command.add_argument("--x", default="env_steps", help="env_steps, itr, epoch or any other column of the metrics")
    command.add_argument("--y", default="episode_return", help="any column of the metrics")
    command.add_argument("--label", action="append", help="legend text: once for each name, or once for each run")
    command.add_argument("--title")
    command.set_defaults(draw=draw_learning_curve)


def draw_learning_curve(args: argparse.Namespace, command: str) -> None:
    path = figures.learning_curve(
        args.run_folder, args.output, x=args.x, y=args.y, labels=args.label, title=args.title, command=command
    )
    print(f"{path}\n{path.with_suffix('.csv')}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="figure")
    for add in (add_learning_curve,):
        add(commands)
    args = parser.parse_args()
    try:
        args.draw(args, shlex.join(["python", "script/make_figures.py", *sys.argv[1:]]))
    except UserError as error:
        sys.exit(_report(error))


def _report(error: UserError) -> int:
    print(f"error: {error}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    main()
