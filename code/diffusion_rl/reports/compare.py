"""Algorithms beside each other, task by task, and beside what is published: the figure and table of a paper.

Over seeds stands the interquartile mean with its stratified bootstrap interval (Agarwal et al. 2021,
arXiv:2108.13264), computed by rliable.
"""

from __future__ import annotations

import functools
import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from diffusion_rl.config.declared import declaring
from diffusion_rl.core.errors import UserError
from diffusion_rl.reports import published
from diffusion_rl.reports.figures import (
    AXIS_LABELS,
    COLOURS,
    MIN_SEEDS_FOR_INTERVAL,
    Curve,
    Run,
    curve_of,
    curves_csv,
    draw_curve,
    footer_of,
    group_runs,
    picture_path,
    read_run,
    run_labels,
    style_panel,
    write_figure,
    write_footer,
)

RESAMPLES = 2000
ALGORITHMS = ("diffusion_rl.methods.on_policy", "diffusion_rl.methods.off_policy")
# What the papers call the algorithms, by the runs' names where the class of a run's model is not known.
NAMES = {
    "sac_ppo_diffusion": "DPOER",
    "ppo_diffusion": "DPPO",
    "awr_diffusion": "DAWR",
    "rwr_diffusion": "DRWR",
    "dql_diffusion": "DQL",
    "idql_diffusion": "IDQL",
    "dipo_diffusion": "DIPO",
    "qsm_diffusion": "QSM",
    "ppo_gaussian": "Gaussian PPO",
    "ppo_gmm": "GMM PPO",
    "ppo_exact_diffusion": "DPPO (exact)",
    "ft_diffusion": "DPPO",
    "ft_gaussian": "Gaussian PPO",
    "dacer": "DACER",
    "original_dacer": "DACER",
    "sac": "SAC",
    "rlpd": "RLPD",
    "calql": "Cal-QL",
    "ibrl": "IBRL",
}
WIDTH = 105  # letters of a line below a panel
CAPTION = (
    f"line: interquartile mean over seeds; band (3 seeds or more): its 95% bootstrap interval, {RESAMPLES} resamples"
)
PUBLISHED_CAPTION = "dashed: published replication, diamond: the authors' final mean, both read off figures ({errors})"


@dataclass
class Panel:
    """One task: the runs' curves, and the names of the algorithms whose published values are drawn."""

    task: str
    y: str
    curves: list[Curve]
    references: list[str]


def iqm_and_interval(values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns the interquartile mean over seeds and its 95% interval: percentiles of a bootstrap that resamples seeds.

    values [seeds, points], NaN where missing; iqm, low, high [points]. Low and high are NaN where there are fewer
    than three seeds. The resamples are the same in every call.
    """
    try:
        import scipy.stats
        from rliable import library
    except ImportError as error:
        raise UserError(f'comparisons need {error.name}: pip install -e ".[figures]"') from error

    def iqm(scores: np.ndarray) -> np.ndarray:
        return scipy.stats.trim_mean(scores[:, 0], 0.25, axis=0)

    result = np.full((3, values.shape[1]), np.nan)
    present = ~np.isnan(values)
    for seeds in np.unique(present.T, axis=0):  # points at which the same seeds have a value
        here = np.flatnonzero((seeds == present.T).all(axis=1))
        scores = values[seeds][:, None, here]  # rliable's order: runs, tasks, points
        if seeds.sum() < MIN_SEEDS_FOR_INTERVAL:
            result[0, here] = iqm(scores)
            continue
        np.random.seed(0)  # rliable draws from numpy's global generator
        centres, intervals = library.get_interval_estimates({"": scores}, iqm, reps=RESAMPLES)
        result[:, here] = [centres[""], *intervals[""]]
    return result[0], result[1], result[2]


def task_of(env_name: str) -> str:
    """Returns the task as the papers name it: hopper-medium-v2 -> hopper; other names as they are."""
    short = env_name.split("-")[0]
    return short if any(short == task for task, _ in published.final_values()) else env_name


def algorithm_labels(runs: Sequence[Run]) -> list[str]:
    """Returns each run's algorithm under the papers' name, with what a sweep varied ("DPPO train.gamma=0.9").

    Runs of one task that would get the same label under different names keep their names: they are no seeds of one
    experiment.
    """
    labels = [_algorithm_of(run) for run in runs]
    names: dict[tuple[str, str], set[str]] = {}
    for run, label in zip(runs, labels, strict=True):
        names.setdefault((run.task, label), set()).add(run.name)
    unclear = {label for (_, label), different in names.items() if len(different) > 1}
    return [_short_name(run) if label in unclear else label for run, label in zip(runs, labels, strict=True)]


def _short_name(run: Run) -> str:
    return run.name.removeprefix(f"{run.task}_")


@functools.cache
def class_labels() -> dict[str, str]:
    """Returns what the papers call the algorithms, by the name of their class (its `LABEL`)."""
    labels = [declaring(package, "LABEL") for package in ALGORITHMS]
    return {path.rpartition(".")[2]: label for by_path in labels for path, label in by_path.items()}


def _algorithm_of(run: Run) -> str:
    name, _, variant = _short_name(run).partition(",")
    if run.algorithm in class_labels():
        return f"{class_labels()[run.algorithm]} {variant}".strip()
    for word, algorithm in NAMES.items():
        if re.match(rf"{word}(_mlp|_unet|_img|_ta\d|$)", name):
            return f"{algorithm} {variant}".strip()
    return _short_name(run)


def compare(
    run_folders: Sequence[str | Path],
    output: str | Path = "figure/compare.png",
    *,
    tasks: Sequence[str] = (),
    x: str = "env_steps",
    y: str | None = None,
    kind: str = "eval",
    labels: Sequence[str] | None = None,
    references: str = "same",
    command: str = "",
) -> tuple[Path, str]:
    """Draws `y` against `x`, a panel for each task and a line for each algorithm; writes a PNG and its numbers (CSV).

    tasks: which, and their order, as env_name or in short ("hopper"); none for all. y: None for the success rate in
    robomimic's tasks and the return in all others. kind: eval or train. labels: as in `learning_curve`. references:
    the published curves of the "same" algorithms as the runs', of "all", or "none".

    Returns the path of the figure, and the final values as Markdown and LaTeX tables. Raises UserError for folders that
    hold no such numbers and where rliable is not installed.
    """
    output = picture_path(output)
    runs = [read_run(folder) for folder in run_folders]
    known = list(dict.fromkeys(task_of(run.task) for run in runs))
    wanted = list(dict.fromkeys(map(task_of, tasks))) or known
    for task in wanted:
        if task not in known:
            raise UserError(f"--task {task}: none of the run folders is of it (they are of {', '.join(known)})")
    groups = group_runs(runs, run_labels(runs, labels) if labels else algorithm_labels(runs))
    panels = [_panel(task, groups, x, y, kind, references) for task in wanted]
    heading = f"{y or 'success_rate or episode_return'} against {x}; {CAPTION}"
    numbers = curves_csv([c for panel in panels for c in panel.curves], x, heading, command, centre="iqm")
    numbers += "".join(_published_csv(panel) for panel in panels)
    return write_figure(_draw(panels, x, command), output, numbers, command), _tables(panels)


def _panel(
    task: str, groups: dict[tuple[str, str], list[Run]], x: str, y: str | None, kind: str, references: str
) -> Panel:
    y = y or published.metric_of(task)
    curves = []
    for (label, env_name), runs in groups.items():
        if task_of(env_name) != task:
            continue
        curve = curve_of(label, runs, kind, x, y, iqm_and_interval)
        if curve is None:
            raise UserError(f"{runs[0].folder}: its metrics hold no {kind} rows with both {x} and {y} (--kind, --y)")
        curve.task = task
        curves.append(curve)
    return Panel(task, y, curves, _references(task, x, y, [curve.label for curve in curves], references))


def _references(task: str, x: str, y: str, labels: Sequence[str], which: str) -> list[str]:
    """Returns the algorithms whose published values belong in this panel; DPOER_50 is published as another curve of
    DPOER."""
    if which == "none" or x != "env_steps" or y != published.metric_of(task):
        return []
    known = [algorithm for of_task, algorithm in published.final_values() if of_task == task]
    return known if which == "all" else [algorithm for algorithm in known if algorithm.removesuffix("_50") in labels]


def _published_csv(panel: Panel) -> str:
    """Returns lines for the CSV of the figure: task, label, kind, (no iteration), environment steps, (no seeds),
    value."""
    lines = []
    curves, finals = published.curves(), published.final_values()
    for algorithm in panel.references:
        if (panel.task, algorithm) in curves:
            curve = curves[panel.task, algorithm]
            pairs = zip(curve.env_steps, curve.values, strict=True)
            lines += [f"{panel.task},{algorithm},published replication,,{x:.10g},,{y:.6g}" for x, y in pairs]
        final = finals[panel.task, algorithm]
        for source in ("replication", "original"):
            value = getattr(final, source)
            if value is not None:
                lines.append(f"{panel.task},{algorithm},published {source} (final),,{final.env_steps},,{value:.6g}")
    return "".join(f"{line}\n" for line in lines)


def _draw(panels: Sequence[Panel], x: str, command: str) -> Any:
    from matplotlib.figure import Figure

    names = [name for panel in panels for name in [*(c.label for c in panel.curves), *panel.references]]
    order = list(dict.fromkeys(names))
    colours = {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(order)}
    figure = Figure(figsize=(1.2 + 4.8 * len(panels), 5.2), dpi=140, layout="constrained")
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for curve in panel.curves:
            draw_curve(axes, curve, colours[curve.label], None)
        for algorithm in panel.references:
            _draw_published(axes, panel.task, algorithm, colours[algorithm])
        style_panel(axes, x)
        axes.set_title(panel.task, fontsize=11)
        axes.set_ylabel(AXIS_LABELS.get(panel.y, panel.y.replace("_", " ")))
    handles = _handles(panels, colours)
    columns = min(len(handles), 3 * len(panels))
    figure.legend(handles=handles, loc="outside upper center", ncols=columns, frameon=False, fontsize=8.5)
    caption = "\n".join([*_captions(panels), footer_of(command, width=WIDTH * len(panels))])
    write_footer(figure, caption)
    return figure


def _draw_published(axes: Any, task: str, algorithm: str, colour: str) -> None:
    curve = published.curves().get((task, algorithm))
    if curve is not None:
        line = {"linestyle": "--", "linewidth": 1.0, "marker": "o", "markersize": 3, "markerfacecolor": "white"}
        axes.plot(curve.env_steps, curve.values, color=colour, alpha=0.75, zorder=2, **line)
    final = published.final_values()[task, algorithm]
    if final.original is not None:
        axes.plot([final.env_steps], [final.original], "D", color=colour, markersize=5, clip_on=False, zorder=3)


def _handles(panels: Sequence[Panel], colours: dict[str, str]) -> list[Any]:
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], color=colour, linewidth=2, label=name) for name, colour in colours.items()]
    if any(panel.references for panel in panels):
        hollow: dict[str, Any] = {"marker": "o", "markersize": 3, "markerfacecolor": "white", "linewidth": 1}
        handles.append(Line2D([], [], color="0.4", linestyle="--", label="published replication", **hollow))
        handles.append(Line2D([], [], color="0.4", marker="D", linestyle="", label="published by the authors"))
    return handles


def _captions(panels: Sequence[Panel]) -> list[str]:
    """Returns lines below the figure: what is drawn, and the seeds of each line."""
    lines = [CAPTION]
    metrics = sorted({panel.y for panel in panels if panel.references})
    if metrics:
        errors = ", ".join(f"±{published.READING_ERROR[y]:g} in the {AXIS_LABELS[y].split(' of')[0]}" for y in metrics)
        lines.append(PUBLISHED_CAPTION.format(errors=errors))
    for panel in panels:
        alike: dict[tuple[str, ...], list[str]] = {}
        for curve in panel.curves:
            alike.setdefault(tuple(curve.seeds), []).append(curve.label)
        seeds = "; ".join(f"{', '.join(seeds)} of {', '.join(labels)}" for seeds, labels in alike.items())
        lines += textwrap.wrap(f"seeds, {panel.task}: {seeds}", WIDTH * len(panels))
    return lines


def _tables(panels: Sequence[Panel]) -> str:
    """Returns final values: a Markdown table, an empty line, a LaTeX one."""
    title = ["task", "algorithm", "seeds", "environment steps", "IQM [95% interval]"]
    title += ["published: environment steps", "replication", "original"]
    rows = [_final_row(panel, curve) for panel in panels for curve in panel.curves]
    markdown = [f"| {' | '.join(row)} |" for row in (title, ["---"] * len(title), *rows)]
    latex = [r"\begin{tabular}{llrrrrrr}", r"\hline", f"{_latex(title)} \\hline", *map(_latex, rows), r"\hline"]
    return "\n".join([*markdown, "", *latex, r"\end{tabular}"])


def _latex(row: Sequence[str]) -> str:
    escaped = (re.sub(r"([&%$#_{}])", r"\\\1", cell) for cell in row)
    return f"{' & '.join(escaped)} \\\\".replace("–", "--")


def _final_row(panel: Panel, curve: Curve) -> list[str]:
    """Returns the last point that every seed has (the last of any, if there is none)."""
    complete = np.flatnonzero(~np.isnan(curve.values).any(axis=0))
    last = complete[-1] if len(complete) else len(curve.itr) - 1
    digits = 3 if panel.y == "success_rate" else 0
    count = int(np.sum(~np.isnan(curve.values[:, last])))
    value = f"{curve.mean[last]:.{digits}f}"
    if not np.isnan(curve.low[last]):
        value += f" [{curve.low[last]:.{digits}f}, {curve.high[last]:.{digits}f}]"
    row = [panel.task, curve.label, str(count), f"{curve.x[last]:.10g}", value]
    if curve.label not in panel.references:
        return [*row, "–", "–", "–"]
    final = published.final_values()[panel.task, curve.label]
    others = (final.replication, final.original)
    return [*row, str(final.env_steps), *("–" if other is None else f"{other:.{digits}f}" for other in others)]
