"""Algorithms beside each other, task by task, and beside what is published: the figure and table of a paper.

Over seeds stands the interquartile mean with its bootstrap interval (Agarwal et al. 2021, arXiv:2108.13264).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from diffusion_rl.core.errors import UserError
from diffusion_rl.reports import published
from diffusion_rl.reports.figures import Look, draw_curve, handles_of, looks_of, seeds_of
from diffusion_rl.reports.runs import (
    RESAMPLES,
    Curve,
    Run,
    algorithm_labels,
    curve_of,
    curves_csv,
    group_runs,
    iqm_and_interval,
    read_runs,
    run_labels,
    task_of,
)
from diffusion_rl.reports.style import AXIS_LABELS, legend_below, picture_path, style_axes, task_title, write_figure

FAR = 2.5  # times as many steps in published curves as in ours: they get a panel beside ours
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
    hold no such numbers.
    """
    output = picture_path(output)
    runs = [run for folder in run_folders for run in read_runs(folder)]
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
    looks = looks_of(dict.fromkeys(n for p in panels for n in [*(c.label for c in p.curves), *p.references]))
    views = 1 + any(map(_is_far, panels))  # the beginning apart, where published curves go on

    def draw(figure: Any) -> None:
        wide = len(panels) == 1 and views == 2
        axes = figure.subplots(*((1, 2) if wide else (views, len(panels))), squeeze=False).reshape(views, -1)
        for i, panel in enumerate(panels):
            for view in range(views):
                _draw_panel(axes[view, i], panel, x, looks, (_end_of(panel) or None) if view < views - 1 else None)
        legend_below(figure, _handles(panels, looks))

    size = (1.2 + 3.4 * max(len(panels), views), 4.8) if len(panels) == 1 else (1 + 3 * len(panels), 1.6 + 2.8 * views)
    path = write_figure(draw, size, output, numbers, command, _captions(panels))
    return path, _tables(panels)


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


def _is_far(panel: Panel) -> bool:
    """Returns whether published curves are so much longer than ours that these would be a corner of the panel."""
    ends = [published.final_values()[panel.task, algorithm].env_steps for algorithm in panel.references]
    return bool(ends) and max(ends) > FAR * _end_of(panel)


def _end_of(panel: Panel) -> float:
    return max(curve.x.max() for curve in panel.curves)


def _draw_panel(axes: Any, panel: Panel, x: str, looks: Mapping[str, Look], end: float | None = None) -> None:
    """Draws a panel. end: of its axis, where published curves go further."""
    for curve in sorted(panel.curves, key=lambda curve: -curve.x.max()):  # short ones on top
        draw_curve(axes, curve, looks[curve.label])
    for algorithm in panel.references:
        _draw_published(axes, panel.task, algorithm, looks[algorithm]["color"], end is None)
    style_axes(axes, x, panel.y)
    axes.set_title(f"{task_title(panel.task)}{'' if end is None else ': the beginning'}")
    if end is not None:
        axes.set_xlim(-0.03 * end, 1.1 * end)


def _handles(panels: Sequence[Panel], looks: Mapping[str, Look]) -> list[Any]:
    from matplotlib.lines import Line2D

    handles = handles_of([curve for panel in panels for curve in panel.curves], looks, {})
    if any(panel.references for panel in panels):
        hollow: dict[str, Any] = {"marker": "o", "markersize": 3, "markerfacecolor": "white", "linewidth": 1}
        handles.append(Line2D([], [], color="0.4", linestyle="--", label="published replication", **hollow))
        handles.append(Line2D([], [], color="0.4", marker="D", linestyle="", label="published by the authors"))
    return handles


def _captions(panels: Sequence[Panel]) -> list[str]:
    """Returns what is drawn, and the seeds of each line."""
    lines = [CAPTION]
    metrics = sorted({panel.y for panel in panels if panel.references})
    if metrics:
        errors = ", ".join(f"±{published.READING_ERROR[y]:g} in the {AXIS_LABELS[y].split(' of')[0]}" for y in metrics)
        lines.append(PUBLISHED_CAPTION.format(errors=errors))
    return lines + seeds_of([curve for panel in panels for curve in panel.curves], {})


def _draw_published(axes: Any, task: str, algorithm: str, colour: str, final_too: bool) -> None:
    curve = published.curves().get((task, algorithm))
    if curve is not None:
        line = {"linestyle": "--", "linewidth": 1.0, "marker": "o", "markersize": 3, "markerfacecolor": "white"}
        axes.plot(curve.env_steps, curve.values, color=colour, alpha=0.75, zorder=2, **line)
    final = published.final_values()[task, algorithm]
    if final.original is not None and final_too:
        axes.plot([final.env_steps], [final.original], "D", color=colour, markersize=5, clip_on=False, zorder=3)


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
