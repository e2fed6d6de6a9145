"""The papers' figures, run by run: what there is, what is missing, and what starts it (`cfg/reproductions.yaml`).

A run trains in `log/reproductions/<name>/<seed>`; its configuration and metrics are collected into
`figure/reproductions/runs/<name>/<seed>`, which the figures are drawn from.
"""

from __future__ import annotations

import argparse
import itertools
import shlex
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusion_rl.cli.experiments import Job, Pool
from diffusion_rl.cluster.launch import PLACES
from diffusion_rl.config.overrides import Arguments, read_spec
from diffusion_rl.core.errors import UserError
from diffusion_rl.core.files import read_bytes, write_bytes
from diffusion_rl.core.places import REPOSITORY, here_or_shipped, log_dir
from diffusion_rl.core.programs import GO_ON
from diffusion_rl.reports.metrics import read_rows, step_of
from diffusion_rl.reports.progress import duration

FIGURES = Path("figure/reproductions")
COLLECTED = ("config.yaml", "metrics.jsonl")
BUDGETS = ("small", "paper")
DRAWN_FROM_FILES = ("learning_curve", "compare", "plan_scores", "lite_losses", "lite_scores")
#: What a group says besides its lists.
FACTS = ("config", "more", "variant", "minutes", *BUDGETS)


@dataclass(frozen=True)
class Training:
    """One run of a figure.

    Args:
        name: of its folder, the same for all seeds.
        seed: of the run.
        command: that trains it, without its folder.
        iterations: of the budget.
        minutes: of an iteration on two cores.
    """

    name: str
    seed: int
    command: tuple[str, ...]
    iterations: int
    minutes: float

    @property
    def folder(self) -> Path:
        """Returns where it trains."""
        return log_dir() / "reproductions" / self.name / str(self.seed)

    @property
    def collected(self) -> Path:
        """Returns where its metrics are kept."""
        return FIGURES / "runs" / self.name / str(self.seed)

    def done(self) -> int:
        """Returns how many iterations are in its metrics, here or collected."""
        files = [folder / "metrics.jsonl" for folder in (self.folder, self.collected)]
        return max((iterations_of(file) for file in files if file.is_file()), default=0)

    def words(self) -> list[str]:
        """Returns the whole command, which goes on where an earlier one was stopped."""
        return ["python", *self.command, f"logdir={self.folder}", GO_ON]


def iterations_of(metrics: Path) -> int:
    """Returns how many iterations a run has finished."""
    return max((step_of(row) or 0 for row in read_rows(metrics)), default=-1) + 1


def trainings(figure: Mapping[str, Any], budget: str) -> list[Training]:
    """Returns all runs of a figure, seed by seed, so that each comparison is whole before the next seed begins."""
    return sorted((run for group in figure["groups"] for run in _group(group, budget)), key=lambda run: run.seed)


def _group(group: Mapping[str, Any], budget: str) -> Iterator[Training]:
    lists = {key: values for key, values in group.items() if key not in FACTS}
    for values in itertools.product(*lists.values()):
        named = dict(zip(lists, values, strict=True))
        config = Path(str(group["config"]).format(**named))
        words = ["script/run.py", f"--config-dir=cfg/{config.parent}", f"--config-name={config.name}"]
        words += [f"seed={named['seed']}", *shlex.split(group.get("more", ""))]
        words += [f"{key}={value}" for key, value in group[budget].items()]
        name = "_".join(config.parts[2:])
        if variant := group.get("variant"):  # which tells it in figures from runs of the same configuration
            words.append(f"name='{name},{variant}'")
            name = f"{name}_{variant}"
        yield Training(name, named["seed"], tuple(words), group[budget]["train.n_train_itr"], float(group["minutes"]))


# ---------- what the command does ----------


def table(runs: Sequence[Training]) -> str:
    """Returns what there is and what is missing, a line for each name."""
    lines = [f"{'run':48} {'iterations':>10}  by seed"]
    for name, same in itertools.groupby(sorted(runs, key=lambda run: (run.name, run.seed)), key=lambda run: run.name):
        seeds = list(same)
        done = ", ".join(f"{run.seed}: {min(run.done(), run.iterations)}" for run in seeds)
        lines.append(f"{name:48} {seeds[0].iterations:>10}  {done}")
    missing = missing_of(runs)
    minutes = sum((run.iterations - run.done()) * run.minutes for run in missing)
    lines.append(
        f"{len(runs) - len(missing)} of {len(runs)} runs done; about {duration(60 * minutes)} of two cores missing"
    )
    if missing:
        lines.append(f"the next: {shlex.join(missing[0].words())}")
    return "\n".join(lines)


def missing_of(runs: Sequence[Training]) -> list[Training]:
    """Returns the runs that are not at the end of their budget."""
    return [run for run in runs if run.done() < run.iterations]


def collect(runs: Sequence[Training]) -> list[Path]:
    """Copies configuration and metrics of the runs that are further here than what is kept; returns their folders."""
    copied = []
    for run in runs:
        here, kept = run.folder / "metrics.jsonl", run.collected / "metrics.jsonl"
        if here.is_file() and (not kept.is_file() or iterations_of(here) > iterations_of(kept)):
            for name in COLLECTED:
                write_bytes(run.collected / name, read_bytes(run.folder / name))
            copied.append(run.collected)
    return copied


def draw(name: str, figure: Mapping[str, Any], runs: Sequence[Training]) -> str:
    """Draws a figure from what is collected; returns what the drawing says."""
    folders = [str(run.collected) for run in runs if run.collected.is_dir()]
    if not folders:
        raise UserError(f"{name}: nothing is collected yet: --launch, then --collect")
    kind, *options = shlex.split(figure["draw"])
    words = ["script/make_figures.py", kind, *folders, *options, "--output", str(FIGURES / f"{name}.png"), "--table"]
    return run_script(words)


def run_script(words: Sequence[str]) -> str:
    """Runs a program of this repository; returns what it prints. Raises UserError with its last line if it fails."""
    script, *arguments = words
    ended = subprocess.run([sys.executable, str(REPOSITORY / script), *arguments], capture_output=True, text=True)
    if ended.returncode:
        raise UserError(f"{shlex.join(['python', *words])}: {(ended.stderr.strip() or 'it failed').splitlines()[-1]}")
    return ended.stdout.strip()


def drawn_again(folder: Path) -> Iterator[str]:
    """Draws every figure below a folder again that is drawn from files there; yields the commands, once each.

    The command is the one that its table (CSV) names. Figures from simulators or recordings are left as they are.
    """
    made = "# made by: python script/make_figures.py "
    heads = [line for file in sorted(folder.rglob("*.csv")) for line in file.read_text().splitlines()[:2]]
    for command in dict.fromkeys(line.removeprefix(made) for line in heads if line.startswith(made)):
        kind, *_ = words = shlex.split(command)
        if kind in DRAWN_FROM_FILES:
            run_script(["script/make_figures.py", *words])
            yield f"python script/make_figures.py {command}"


def launch(runs: Sequence[Training], workers: int, gpu: str, place: str) -> int:
    """Starts what is missing, some at a time; returns the exit status."""
    jobs = []
    for run in missing_of(runs):
        run.folder.parent.mkdir(parents=True, exist_ok=True)
        _, script, *words = run.words()
        stem = run.folder.parent / f"{run.name}-{run.seed}.job"
        jobs.append(Job(stem, [sys.executable, str(REPOSITORY / script), *words]))
    if not jobs:
        return 0
    return Pool(log_dir() / "reproductions", jobs, workers, gpu, place=place, again="--launch").run()


def main(arguments: Sequence[str]) -> int:
    """Lists the figures, or the runs of one, and does with them what the flags say; returns the exit status."""
    figures = read_spec(here_or_shipped("cfg/reproductions.yaml"))
    names = "\n".join(f"  {name:20} {figure['about']}" for name, figure in figures.items())
    raw = argparse.RawDescriptionHelpFormatter
    parser = Arguments(description=f"The papers' figures, run by run.\n\n{names}", formatter_class=raw)
    parser.add_argument(
        "figure", nargs="?", help="one of these; none with --draw: every figure that is drawn from files"
    )
    parser.add_argument(
        "--budget", choices=BUDGETS, default="small", help="small: hours on two cores; paper: published steps"
    )
    parser.add_argument("--launch", action="store_true", help="start what is missing; what was stopped goes on")
    parser.add_argument("--workers", type=int, default=1, help="runs at a time")
    parser.add_argument("--gpu", default="0", help="number of the GPU")
    parser.add_argument("--on", choices=PLACES, default="here", help="where runs go, as in run_experiment.py")
    parser.add_argument("--collect", action="store_true", help=f"keep configurations and metrics in {FIGURES}/runs")
    parser.add_argument("--draw", action="store_true", help="draw the figure from what is kept")
    options = parser.parse_args(list(arguments))
    if options.figure is None:
        print("\n".join(drawn_again(Path("figure"))) if options.draw else f"figures:\n{names}")
        return 0
    if options.figure not in figures:
        raise UserError(f"{options.figure}: the figures are {', '.join(figures)}")
    figure = figures[options.figure]
    runs = trainings(figure, options.budget)
    status = launch(runs, options.workers, options.gpu, options.on) if options.launch else 0
    for folder in collect(runs) if options.collect else ():
        print(folder)
    print(draw(options.figure, figure, runs) if options.draw else table(runs))
    return status
