"""Rung 8: learning curves of the authors' PyTorch code and of this repository, or of two precisions, over seeds.

    python -m parity_tests.r8_curves --upstream PATH --upstream-python PYTHON [--cases hopper …] [--jobs 2]
    python -m parity_tests.r8_curves                      # verdicts, table and figure from the runs that are there

Runs what `curves/protocol.yaml` says and is not in `curves/<case>.csv` yet: both command lines as they are, from one
policy file, one configuration, one file of data bounds; MuJoCo 2.1.0 there, its bodies in MuJoCo 3 here. A run that is
killed begins again, the ones before it are kept. PYTHON has the simulators of 2021 (benchmarks/README.md).

Two curves are equivalent when the 90% interval (Welch) of the difference of their means lies within the margin, which
is two one-sided tests at 5% (Schuirmann 1987), for the mean over all iterations and for the last third of them.
"""

from __future__ import annotations

import argparse
import csv
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from queue import Queue
from typing import Any

import numpy as np
import yaml
from scipy import stats

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT / "code") not in sys.path:
    sys.path.insert(0, str(ROOT / "code"))

from diffusion_rl.core.files import write_bytes  # noqa: E402
from diffusion_rl.reports.metrics import read_rows  # noqa: E402
from diffusion_rl.reports.runs import mean_and_interval  # noqa: E402
from diffusion_rl.reports.style import COLOURS, csv_text, write_figure  # noqa: E402

RUNS = ROOT / "parity_tests" / "curves"
FIGURE = ROOT / "figure" / "parity" / "curves.png"
TABLE = ROOT / "figure" / "parity" / "curves.md"
COMMAND = "python -m parity_tests.r8_curves"
SIDES = {"pytorch": "PyTorch, the authors' code", "tensorflow": "this repository"}
LABELS = {**SIDES, "float32": "this repository, float32", "bfloat16": "this repository, bfloat16"}
COLUMNS = ["side", "seed", "iteration", "episode_return"]
THEIR_LINE = re.compile(r"(\d+): step +\d+ \| loss.*\| reward +(-?[\d.]+|nan) \|")  # a line of the reference's log
WINDOWS = {"all iterations": 0.0, "last third": 2 / 3}  # from which part of the iterations on

Curves = dict[str, dict[int, np.ndarray]]  # side -> seed -> [iterations]


@dataclass(frozen=True)
class Case:
    """A comparison as the protocol fixes it.

    Args:
        title: of its panel and row.
        config: folder and name of the configuration, the same on both sides.
        task: of the data bounds, a folder of `data/gym`.
        policy: file there that both sides start from; empty to start from random weights.
        overrides: keys and values behind both commands.
        iterations, seeds: how many.
        margin: largest difference of mean returns that counts as none.
        sides: what is compared, the first with the second, and the keys and values behind each command; what is not
            named `pytorch` is this repository.
    """

    title: str
    config: str
    task: str
    iterations: int
    margin: float
    seeds: int = 10
    policy: str = ""
    overrides: list[str] = field(default_factory=list)
    sides: dict[str, list[str]] = field(default_factory=lambda: {side: [] for side in SIDES})


@dataclass(frozen=True)
class Verdict:
    """The difference of two means (the second side minus the first) by its 90% interval, and the margin."""

    theirs: float
    ours: float
    low: float
    high: float
    margin: float

    @property
    def word(self) -> str:
        """Returns "equivalent", "different" (the interval is beyond the margin) or "open" (more seeds are needed)."""
        if -self.margin < self.low and self.high < self.margin:
            return "equivalent"
        return "different" if self.low > self.margin or self.high < -self.margin else "open"


def protocol(path: Path = RUNS / "protocol.yaml") -> dict[str, Case]:
    """Returns the cases that the protocol fixes, by name."""
    described = yaml.safe_load(path.read_text())
    common = described["overrides"]
    return {
        name: Case(**{**case, "overrides": [*common, *case.get("overrides", ())]})
        for name, case in described["cases"].items()
    }


def rows_of(path: Path) -> csv.DictReader[str]:
    """Returns the rows of a CSV file by its columns' names, without the comments."""
    return csv.DictReader(line for line in path.read_text().splitlines() if not line.startswith("#"))


def read_curves(name: str, case: Case) -> Curves:
    """Returns the runs of a case by side; none if there is no file yet."""
    path = RUNS / f"{name}.csv"
    curves: dict[str, dict[int, dict[int, float]]] = {side: {} for side in case.sides}
    if path.exists():
        for row in rows_of(path):
            run = curves[row["side"]].setdefault(int(row["seed"]), {})
            run[int(row["iteration"])] = float(row["episode_return"])
    return {
        side: {seed: np.array([run[i] for i in sorted(run)]) for seed, run in sorted(runs.items())}
        for side, runs in curves.items()
    }


def write_curves(path: Path, curves: Curves, title: str) -> None:
    """Writes the runs of a case, a line for each iteration, whole or not at all."""
    rows: list[Sequence[Any]] = [COLUMNS]
    for side, runs in curves.items():
        rows += [(side, seed, i, f"{value:.4f}") for seed, run in sorted(runs.items()) for i, value in enumerate(run)]
    write_bytes(
        path, csv_text(rows, COMMAND, f"{title}: mean return of the episodes of each training iteration").encode()
    )


def missing(case: Case, curves: Curves) -> list[tuple[str, int]]:
    """Returns side and seed of the runs that the protocol asks for and that are not there, seed by seed."""
    return [(side, seed) for seed in range(case.seeds) for side in case.sides if seed not in curves[side]]


def equivalence(theirs: np.ndarray, ours: np.ndarray, margin: float) -> Verdict:
    """Returns the verdict over two samples, [seeds] each, by Welch's interval of the difference of means."""
    low, high = stats.ttest_ind(ours, theirs, equal_var=False).confidence_interval(0.9)
    return Verdict(float(theirs.mean()), float(ours.mean()), float(low), float(high), margin)


def verdicts(case: Case, curves: Curves) -> dict[str, Verdict]:
    """Returns the verdict of each window of iterations over the seeds that the protocol asks for.

    Raises ValueError if one side has fewer than two runs.
    """
    sides = {side: np.stack(list(runs.values())[: case.seeds]) for side, runs in curves.items() if len(runs) > 1}
    if len(sides) < len(case.sides):
        raise ValueError(f"{case.title}: both sides need two runs at least")
    begins = {name: int(case.iterations * part) for name, part in WINDOWS.items()}
    return {
        name: equivalence(*(sides[side][:, begin:].mean(axis=1) for side in case.sides), case.margin)
        for name, begin in begins.items()
    }


# ---------- running ----------


def command(case: Case, side: str, seed: int, folder: Path, policy: Path | None, python: str) -> list[str]:
    """Returns the command of one run."""
    config = Path(case.config)
    words = [python, "script/run.py", f"--config-name={config.name}", f"--config-dir={config.parent}", f"seed={seed}"]
    words += [f"logdir={folder / 'run'}", f"train.n_train_itr={case.iterations}", "wandb=null"]
    words += [*case.overrides, *case.sides[side]]
    words += [f"normalization_path={ROOT / 'data' / 'gym' / case.task / 'normalization.npz'}"]
    words += [f"base_policy_path={policy}"] if policy else []
    return [*words, "device=cpu"] if side == "pytorch" else words


def run_once(case: Case, side: str, seed: int, options: argparse.Namespace, core: int) -> np.ndarray:
    """Trains once on one core; returns the mean returns, [iterations]. Raises RuntimeError if it fails."""
    with tempfile.TemporaryDirectory() as name:
        folder, policy = Path(name), None
        if case.policy:
            policy = folder / "policy.pt"
            source = ROOT / "data" / "gym" / case.task / case.policy
            convert = [sys.executable, "script/convert_checkpoint.py", str(source), str(policy)]
            subprocess.run(convert, cwd=ROOT, check=True, capture_output=True)
        python = options.upstream_python if side == "pytorch" else sys.executable
        env = dict(os.environ)
        if side == "pytorch":
            env |= {"PYTHONPATH": ".", "PYTHONDONTWRITEBYTECODE": "1", "D4RL_SUPPRESS_IMPORT_ERROR": "1"}
            env |= {"DPPO_DATA_DIR": str(ROOT / "data"), "DPPO_LOG_DIR": name, "DPPO_WANDB_ENTITY": "none"}
        done = subprocess.run(
            ["taskset", "-c", str(core), *command(case, side, seed, folder, policy, python)],
            cwd=options.upstream if side == "pytorch" else ROOT,
            env=env,
            capture_output=True,
            text=True,
        )
        if side == "pytorch":
            lines = THEIR_LINE.findall(done.stdout + done.stderr)
            found = {int(i): float(value) for i, value in lines}
        else:
            file = folder / "run" / "metrics.jsonl"
            rows = read_rows(file) if file.exists() else []
            found = {int(row["itr"]): float(row["episode_return"]) for row in rows if row["kind"] == "train"}
        if done.returncode or len(found) != case.iterations:
            raise RuntimeError(f"{side}, seed {seed}: {len(found)} iterations\n{(done.stdout + done.stderr)[-2000:]}")
        return np.array([found[i] for i in sorted(found)])


def fill(names: Sequence[str], cases: Mapping[str, Case], options: argparse.Namespace) -> None:
    """Makes the runs that are missing, side by side in turn, and writes each as it ends."""
    cores: Queue[int] = Queue()
    for core in sorted(os.sched_getaffinity(0))[: options.jobs]:
        cores.put(core)
    for name in names:
        case = cases[name]
        jobs = missing(case, read_curves(name, case))

        def one(job: tuple[str, int], case: Case = case) -> tuple[tuple[str, int], np.ndarray]:
            core = cores.get()
            try:
                return job, run_once(case, *job, options, core)
            finally:
                cores.put(core)

        with ThreadPoolExecutor(options.jobs) as pool:
            for (side, seed), curve in pool.map(one, jobs):
                there = read_curves(name, case)
                there[side][seed] = curve
                write_curves(RUNS / f"{name}.csv", there, case.title)
                print(f"{name}, {side}, seed {seed}: {curve[0]:.1f} -> {curve[-1]:.1f}", flush=True)


# ---------- showing ----------


def with_runs(cases: Mapping[str, Case]) -> dict[str, Curves]:
    """Returns the curves of the cases that have two runs a side at least."""
    curves = {name: read_curves(name, case) for name, case in cases.items()}
    return {name: sides for name, sides in curves.items() if all(len(runs) > 1 for runs in sides.values())}


def table(cases: Mapping[str, Case]) -> str:
    """Returns the verdicts as a Markdown table."""
    lines = [
        "| case | seeds | window | first | second | difference, 90% interval | margin | verdict |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, curves in with_runs(cases).items():
        case = cases[name]
        count = " / ".join(f"{side} {min(case.seeds, len(runs))}" for side, runs in curves.items())
        for window, v in verdicts(case, curves).items():
            word = f"unfinished, {case.seeds} seeds are wanted" if missing(case, curves) else v.word
            means, interval = f"{v.theirs:.1f} | {v.ours:.1f}", f"{v.low:+.1f} to {v.high:+.1f}"
            lines.append(f"| {case.title} | {count} | {window} | {means} | {interval} | {v.margin:g} | {word} |")
    return "\n".join(lines)


def report(cases: Mapping[str, Case]) -> str:
    """Writes the figure and the table of all cases that have runs; returns the table."""
    drawn, verdict_table = with_runs(cases), table(cases)
    numbers: list[Sequence[Any]] = [["case", "side", "iteration", "mean", "low", "high"]]
    for name, curves in drawn.items():
        for side, runs in curves.items():
            bands = zip(*mean_and_interval(np.stack(list(runs.values()))), strict=True)
            numbers += [(name, side, i, *(f"{value:.4f}" for value in point)) for i, point in enumerate(bands)]
    caption = "line: mean over seeds; band: its 95% interval (Student's t) in each iteration"
    columns = min(3, max(1, len(drawn)))
    size = (4.0 * columns, 3.0 * -(-len(drawn) // columns) + 0.5)

    def draw(figure: Any) -> None:
        _draw(figure, cases, drawn, columns)

    write_figure(draw, size, FIGURE, csv_text(numbers, COMMAND), COMMAND, [caption])
    about = "Difference: the second side minus the first. What was run: `parity_tests/curves/protocol.yaml`."
    text = f"# Learning curves of both frameworks\n\n{verdict_table}\n\n{about}\n"
    text += f"Made by `{COMMAND}`.\n\n![Curves](curves.png)\n"
    write_bytes(TABLE, text.encode())
    return verdict_table


def _draw(figure: Any, cases: Mapping[str, Case], drawn: Mapping[str, Curves], columns: int) -> None:
    panels = iter(figure.subplots(-(-len(drawn) // columns), columns, squeeze=False).flat)
    for (name, curves), panel in zip(drawn.items(), panels, strict=False):
        for (side, runs), colour in zip(curves.items(), (COLOURS[1], COLOURS[0]), strict=False):
            mean, low, high = mean_and_interval(np.stack(list(runs.values())))
            panel.plot(mean, color=colour, label=f"{LABELS[side]}, {len(runs)} seeds")
            panel.fill_between(range(len(mean)), low, high, color=colour, alpha=0.2, linewidth=0)
        panel.set(title=cases[name].title, xlabel="iteration", ylabel="return")
        panel.legend(fontsize="x-small")
    for panel in panels:
        panel.set_axis_off()


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs what is missing where a checkout is given, then reports."""
    cases = protocol()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--upstream", type=Path, metavar="PATH", help="checkout of the authors' DPPO")
    parser.add_argument("--upstream-python", metavar="PYTHON", help="interpreter that has the reference's simulators")
    parser.add_argument("--cases", nargs="+", choices=[*cases], default=[*cases], metavar="CASE", help=f"of {[*cases]}")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one core each")
    options = parser.parse_args(arguments)
    if (options.upstream is None) != (options.upstream_python is None):
        parser.error("--upstream and --upstream-python are given together")
    if options.upstream:
        options.upstream = options.upstream.resolve()
        fill(options.cases, cases, options)
    print(report(cases) if with_runs(cases) else "no case has two runs a side yet")
    return 0


if __name__ == "__main__":
    sys.exit(main())
