"""Figures from run folders. Each PNG comes with a CSV of the numbers drawn and names the command that made it."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from diffusion_rl.config.yaml_files import read_yaml
from diffusion_rl.core.errors import UserError
from diffusion_rl.core.files import write_bytes
from diffusion_rl.reports.metrics import STEP_KEYS, Row, read_rows, step_of

# Okabe and Ito's colours, told apart with any colour vision, without the yellow (pale on white); then three of Tol's.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000", "#882255", "#999933", "#999999")
AXIS_LABELS = {
    "env_steps": "environment steps",
    "itr": "iterations",
    "epoch": "epochs",
    "episode_return": "mean return of an episode (sum of rewards)",
    "loss": "loss",
    "success_rate": "success rate",
}
KINDS = ("eval", "train")
MADE_BY = {  # ending -> metadata for the command, for the program, and for the date, which is left out
    ".png": ("Description", "Software", None),
    ".pdf": ("Subject", "Creator", "CreationDate"),
    ".svg": ("Description", "Creator", "Date"),
}
MIN_SEEDS_FOR_INTERVAL = 3

# Two-sided 95% quantiles of Student's t for 1 to 20 degrees of freedom.
STUDENT_T = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
)


Estimate = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray, np.ndarray]]


@dataclass
class Run:
    """One run folder: what it is, and its rows."""

    folder: Path
    name: str
    task: str
    seed: str
    rows: list[Row]
    algorithm: str = ""  # the class of its model


@dataclass
class Curve:
    """One quantity of one group of runs: values [seeds, points], NaN where a seed has no point.

    estimate: values -> centre, low, high [points]; the centre is called `mean`, whatever it is.
    """

    label: str
    task: str
    kind: str
    seeds: list[str]
    itr: np.ndarray
    x: np.ndarray
    values: np.ndarray
    estimate: Estimate
    mean: np.ndarray = field(init=False)
    low: np.ndarray = field(init=False)
    high: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        self.mean, self.low, self.high = self.estimate(self.values)


def mean_and_interval(values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns the mean over seeds and the 95% interval of that mean, from Student's t.

    values [seeds, points], NaN where missing; mean, low, high [points]. Where there are fewer than two values, low
    and high are NaN.
    """
    count = np.sum(~np.isnan(values), axis=0)
    mean = np.nansum(values, axis=0) / count
    squares = np.nansum((values - mean) ** 2, axis=0)
    with np.errstate(divide="ignore", invalid="ignore"):
        half = np.array([student_t(n - 1) for n in count]) * np.sqrt(squares / (count - 1) / count)
    half = np.where(count >= 2, half, np.nan)
    return mean, mean - half, mean + half


def student_t(degrees: int) -> float:
    """Returns the two-sided 95% quantile of Student's t (within 0.005 above 20 degrees of freedom)."""
    if degrees < 1:
        return float("nan")
    return STUDENT_T[degrees - 1] if degrees <= len(STUDENT_T) else 1.96 + 2.5 / degrees


def read_run(folder: str | Path) -> Run:
    """Reads `config.yaml` (name, env_name, seed) and `metrics.jsonl` of a run folder."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such run folder")
    metrics = folder / "metrics.jsonl"
    if not metrics.exists():
        raise UserError(
            f"{folder}: no metrics.jsonl in it; give the folder of one run, log/<suite>/<name>/<date>_<seed>"
        )
    config = _read_config(folder / "config.yaml")
    where = folder.resolve()
    return Run(
        folder=folder,
        name=str(config.get("name") or where.parent.name),
        task=str(config.get("env_name") or config.get("env") or ""),
        seed=str(config.get("seed", where.name.rsplit("_", 1)[-1])),
        rows=read_rows(metrics),
        algorithm=_class_of(config.get("model")),
    )


def _class_of(described: Any) -> str:
    return str(described.get("_target_", "")).rpartition(".")[2] if isinstance(described, dict) else ""


def _read_config(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    config = read_yaml(path)
    return config if isinstance(config, dict) else {}


def run_labels(runs: Sequence[Run], labels: Sequence[str]) -> list[str]:
    """Returns the label of each run from one for each run, or one for each name."""
    names = list(dict.fromkeys(run.name for run in runs))
    if len(labels) == len(runs):
        return list(labels)
    if len(labels) == len(names):
        return [labels[names.index(run.name)] for run in runs]
    raise UserError(f"{len(labels)} labels for {len(runs)} runs with {len(names)} names: give one for each of either")


def group_runs(runs: Sequence[Run], labels: Sequence[str] | None) -> dict[tuple[str, str], list[Run]]:
    """Groups runs by (label, task). Without labels: by name. With one label a run: by label. With one a name:
    renamed."""
    groups: dict[tuple[str, str], list[Run]] = {}
    for key, run in zip(run_labels(runs, labels or [run.name for run in runs]), runs, strict=True):
        groups.setdefault((key, run.task), []).append(run)
    return groups


def curve_of(
    label: str, runs: Sequence[Run], kind: str, x: str, y: str, estimate: Estimate = mean_and_interval
) -> Curve | None:
    """Returns the points of `kind` of a group of runs, lined up by iteration; None if there are none."""
    points = [_points(run, kind, x, y) for run in runs]
    itrs = sorted(set().union(*points))
    if not itrs:
        return None
    values = np.array([[seed.get(itr, (np.nan, np.nan))[1] for itr in itrs] for seed in points])
    xs = np.array([[seed.get(itr, (np.nan, np.nan))[0] for itr in itrs] for seed in points])
    # Seeds of one experiment are at the same number of steps in the same iteration; if not, their mean is drawn.
    x_mean = np.nanmean(xs, axis=0)
    return Curve(label, runs[0].task, kind, _seed_names(runs), np.array(itrs), x_mean, values, estimate)


def _seed_names(runs: Sequence[Run]) -> list[str]:
    """Returns the seeds; a seed that was run more than once is numbered: 42, 42 (2)."""
    seeds = [run.seed for run in runs]
    earlier = [seeds[:i].count(seed) for i, seed in enumerate(seeds)]
    return [f"{seed} ({count + 1})" if count else seed for seed, count in zip(seeds, earlier, strict=True)]


def _points(run: Run, kind: str, x: str, y: str) -> dict[int, tuple[float, float]]:
    points = {}
    for row in run.rows:
        itr = step_of(row)
        where, value = row.get(x), row.get(y)
        if itr is None or where is None or value is None or row.get("kind", "train") != kind:
            continue
        points[itr] = (float(where), float(value))
    return points


def learning_curve(
    run_folders: Sequence[str | Path],
    output: str | Path = "figure/learning_curve.png",
    *,
    x: str | None = None,
    y: str | None = None,
    labels: Sequence[str] | None = None,
    title: str | None = None,
    command: str = "",
) -> Path:
    """Draws `y` against `x` for the given runs; writes `output` (PNG) and the numbers beside it (CSV).

    By default returns against environment steps, or losses against steps for runs that train on data alone.

    Runs of one name are one line: the mean over its seeds with the 95% interval of that mean, or with fewer than
    three seeds the mean and each seed. Evaluations are drawn as points, training episodes as a paler line. Each task
    (`env_name` of the configuration) gets a panel. Raises UserError for a folder that is no run or holds no such
    numbers. Returns the path of the figure.
    """
    output = picture_path(output)
    all_runs = [read_run(folder) for folder in run_folders]
    groups = group_runs(all_runs, labels)
    x, y = default_columns(all_runs, x, y)
    curves = [
        curve for (label, _), runs in groups.items() for kind in KINDS if (curve := curve_of(label, runs, kind, x, y))
    ]
    missing = [key for key in groups if key not in {(curve.label, curve.task) for curve in curves}]
    if missing:
        folder = groups[missing[0]][0].folder
        raise UserError(f"{folder}: its metrics hold no rows with both {x} and {y}")
    heading = f"{y} against {x}; mean over seeds and the 95% interval of the mean (Student's t)"
    return write_figure(_draw(curves, x, y, title, command), output, curves_csv(curves, x, heading, command), command)


def default_columns(runs: Sequence[Run], x: str | None, y: str | None) -> tuple[str, str]:
    """Returns the columns to draw: those given, else what the metrics of the runs hold."""
    rows = [row for run in runs for row in run.rows]

    def is_there(key: str) -> bool:
        return any(row.get(key) is not None for row in rows)

    y = y or ("loss" if is_there("loss") and not is_there("episode_return") else "episode_return")
    steps = next((key for key in STEP_KEYS if is_there(key)), STEP_KEYS[0])
    acted = not rows or any(row.get("env_steps") for row in rows)
    return x or ("env_steps" if acted else steps), y


def curves_csv(curves: Sequence[Curve], x: str, heading: str, command: str, centre: str = "mean") -> str:
    """Returns one line a point: centre and interval over seeds, then the value of each seed."""
    seeds = list(dict.fromkeys(seed for curve in curves for seed in curve.seeds))
    columns = ["task", "label", "kind", "itr", x, "n_seeds", centre, "low", "high", *(f"seed_{s}" for s in seeds)]
    rows: list[Sequence[Any]] = [columns]
    for curve in curves:
        for point in range(len(curve.itr)):
            column = dict(zip(curve.seeds, curve.values[:, point], strict=True))
            rows.append(
                [curve.task, curve.label, curve.kind, curve.itr[point], f"{curve.x[point]:.10g}"]
                + [int(np.sum(~np.isnan(curve.values[:, point])))]
                + [_number(value) for value in (curve.mean[point], curve.low[point], curve.high[point])]
                + [_number(column.get(seed, np.nan)) for seed in seeds]
            )
    return csv_text(rows, command, heading)


def _number(value: float) -> str:
    return "" if np.isnan(value) else f"{value:.6g}"


def _draw(curves: Sequence[Curve], x: str, y: str, title: str | None, command: str) -> Any:
    from matplotlib.figure import Figure

    tasks = list(dict.fromkeys(curve.task for curve in curves))
    figure = Figure(figsize=(1.2 + 5.6 * len(tasks), 5.2), dpi=140, layout="constrained")
    panels = figure.subplots(1, len(tasks), squeeze=False)[0]
    for panel, task in zip(panels, tasks, strict=True):
        here = [curve for curve in curves if curve.task == task]
        _draw_panel(panel, here, x)
        panel.set_title(title if title and len(tasks) == 1 else task, fontsize=11)
    panels[0].set_ylabel(AXIS_LABELS.get(y, y.replace("_", " ")))
    if title and len(tasks) > 1:
        figure.suptitle(title, fontsize=12)
    if command:
        write_footer(figure, footer_of(command, width=125 * len(tasks)))
    return figure


def _draw_panel(panel: Any, curves: Sequence[Curve], x: str) -> None:
    labels = list(dict.fromkeys(curve.label for curve in curves))
    for curve in curves:
        colour = COLOURS[labels.index(curve.label) % len(COLOURS)]
        first = curve is next(c for c in curves if c.label == curve.label)
        count = len(curve.seeds)
        shown = curve.label.removeprefix(f"{curve.task}_")
        name = f"{shown} ({count} seed{'s' if count > 1 else ''})" if first else None
        draw_curve(panel, curve, colour, name)
    style_panel(panel, x)
    handles, names = panel.get_legend_handles_labels()
    handles, names = [*handles, *_kind_handles(curves)], [*names, *_kind_names(curves)]
    place = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.14)}
    panel.legend(handles, names, frameon=False, fontsize=8.5, ncols=2, **place)


def draw_curve(panel: Any, curve: Curve, colour: str, name: str | None) -> None:
    evaluation = curve.kind == "eval"
    line = {"color": colour, "label": name, "zorder": 4 if evaluation else 3}
    if evaluation:
        panel.plot(curve.x, curve.mean, marker="o", markersize=4.5, linewidth=1.8, **line)
    else:
        panel.plot(curve.x, curve.mean, linewidth=1.1, alpha=0.6, **line)
    if len(curve.seeds) >= MIN_SEEDS_FOR_INTERVAL:
        panel.fill_between(
            curve.x, curve.low, curve.high, color=colour, alpha=0.18 if evaluation else 0.09, linewidth=0
        )
    elif len(curve.seeds) > 1:
        for values in curve.values:
            panel.plot(curve.x, values, color=colour, linewidth=0.7, alpha=0.5 if evaluation else 0.3, zorder=2)


def _kind_names(curves: Sequence[Curve]) -> list[str]:
    kinds = {curve.kind for curve in curves}
    names = {"eval": "evaluation", "train": "training"}
    note = ["band: 95% interval of the mean"] if any(len(c.seeds) >= MIN_SEEDS_FOR_INTERVAL for c in curves) else []
    return [names[kind] for kind in KINDS if kind in kinds] + note


def _kind_handles(curves: Sequence[Curve]) -> list[Any]:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles = {
        "evaluation": Line2D([], [], color="0.4", marker="o", markersize=4.5, linewidth=1.8),
        "training": Line2D([], [], color="0.4", linewidth=1.1, alpha=0.6),
        "band: 95% interval of the mean": Patch(color="0.4", alpha=0.18, linewidth=0),
    }
    return [handles[name] for name in _kind_names(curves)]


def style_panel(panel: Any, x: str) -> None:
    from matplotlib.ticker import EngFormatter

    panel.set_xlabel(AXIS_LABELS.get(x, x.replace("_", " ")))
    if x == "env_steps":
        panel.xaxis.set_major_formatter(EngFormatter(sep=" "))  # 500 k, 2 M
    panel.spines[["top", "right"]].set_visible(False)
    panel.grid(True, color="0.9", linewidth=0.7)
    panel.set_axisbelow(True)
    panel.margins(x=0.02)


def footer_of(command: str, width: int) -> str:
    """Returns at most two lines of the command; the whole of it is in the CSV and in the PNG's metadata."""
    lines = [command[start : start + width] for start in range(0, len(command), width)]
    return "\n".join(lines if len(lines) <= 2 else [lines[0], lines[1][: width - 2] + " …"])


def write_footer(figure: Any, text: str) -> None:
    """Writes small text below a figure."""
    figure.supxlabel(text, x=0.01, ha="left", fontsize=5.5, color="0.45", family="monospace")


def csv_text(rows: Iterable[Sequence[Any]], command: str, heading: str = "") -> str:
    """Returns rows as CSV, below comments: what they are, and the command that made them."""
    text = io.StringIO()
    text.write(f"# {heading}\n" if heading else "")
    text.write(f"# made by: {command}\n" if command else "")
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


def picture_path(output: str | Path) -> Path:
    """Returns the path of a figure: PNG without an ending. Raises UserError for an ending that is no format of ours."""
    path = Path(output)
    path = path if path.suffix else path.with_suffix(".png")
    if path.suffix.lower() not in MADE_BY:
        raise UserError(f"--output {output}: a figure ends in {', '.join(MADE_BY)}")
    return path


def write_figure(figure: Any, path: Path, table: str, command: str, **options: Any) -> Path:
    """Writes a figure, which names the command, and the table of its numbers (CSV) beside it.

    Args:
        path: ends in .png, .pdf or .svg.
        options: of matplotlib's savefig.

    Returns:
        the path of the figure.
    """
    picture, ending = io.BytesIO(), picture_path(path).suffix.lower()
    described, program, date = MADE_BY[ending]
    metadata = {described: command, program: "diffusion-rl", **({date: None} if date else {})}
    figure.savefig(picture, format=ending[1:], metadata=metadata, **options)
    write_bytes(path.with_suffix(".csv"), table.encode())
    write_bytes(path, picture.getvalue())
    return path
