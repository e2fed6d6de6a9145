"""Learning curves: returns, success rates or losses of runs, each task in a panel, seeds as intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from diffusion_rl.core.errors import UserError
from diffusion_rl.reports.runs import (
    KINDS,
    MIN_SEEDS_FOR_INTERVAL,
    Curve,
    algorithm_labels,
    curve_of,
    curves_csv,
    default_columns,
    group_runs,
    read_runs,
)
from diffusion_rl.reports.style import (
    COLOURS,
    MARKERS,
    counted,
    legend_below,
    picture_path,
    style_axes,
    task_title,
    write_figure,
)

Look = Mapping[str, Any]  # colour and marker


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
    """Draws `y` against `x` for the given runs; writes `output`, and beside it the numbers (CSV) and a caption (TXT).

    By default returns against environment steps, or losses against steps for runs that train on data alone.

    Runs of one name are one line: the mean over its seeds with the 95% interval of that mean, or with fewer than
    three seeds the mean and each seed. Evaluations are drawn as points, training episodes as a paler line. Each task
    (`env_name` of the configuration) gets a panel. In the place of a run folder the CSV of an earlier figure will do.
    Raises UserError for a folder that is no run or holds no such numbers. Returns the path of the figure.
    """
    output = picture_path(output)
    all_runs = [run for folder in run_folders for run in read_runs(folder)]
    groups = group_runs(all_runs, labels)
    x, y = default_columns(all_runs, x, y)
    curves = [
        curve for (label, _), runs in groups.items() for kind in KINDS if (curve := curve_of(label, runs, kind, x, y))
    ]
    missing = [key for key in groups if key not in {(curve.label, curve.task) for curve in curves}]
    if missing:
        folder = groups[missing[0]][0].folder
        raise UserError(f"{folder}: its metrics hold no rows with both {x} and {y}")
    firsts = [runs[0] for runs in groups.values()]
    shown = {} if labels else dict(zip(groups, algorithm_labels(firsts), strict=True))

    def draw(figure: Any) -> None:
        tasks = list(dict.fromkeys(curve.task for curve in curves))
        for panel, task in zip(figure.subplots(1, len(tasks), squeeze=False)[0], tasks, strict=True):
            here = [curve for curve in curves if curve.task == task]
            for curve in here:
                draw_curve(panel, curve, looks[curve.label])
            style_axes(panel, x, y)
            panel.set_title(title if title and len(tasks) == 1 else task_title(task))
        if title and len(tasks) > 1:
            figure.suptitle(title)
        legend_below(figure, handles_of(curves, looks, shown))

    looks = looks_of(dict.fromkeys(curve.label for curve in curves))
    heading = f"{y} against {x}; mean over seeds and the 95% interval of the mean (Student's t)"
    table = curves_csv(curves, x, heading, command)
    tasks = len({curve.task for curve in curves})
    return write_figure(
        draw, (1.2 + 4.4 * tasks, 4.4), output, table, command, [f"{heading}.", *seeds_of(curves, shown)]
    )


def looks_of(labels: Sequence[str] | Mapping[str, Any]) -> dict[str, Look]:
    """Returns colour and marker of each label."""
    return {
        label: {"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[i % len(MARKERS)]}
        for i, label in enumerate(labels)
    }


def seeds_of(curves: Sequence[Curve], shown: Mapping[tuple[str, str], str]) -> list[str]:
    """Returns a line for each task: the seeds of its lines. shown: as in `handles_of`."""
    lines: dict[str, dict[str, list[str]]] = {}
    for curve in curves:
        lines.setdefault(curve.task, {}).setdefault(", ".join(curve.seeds), []).append(
            shown.get((curve.label, curve.task), curve.label)
        )
    return [
        f"Seeds, {task}: " + "; ".join(f"{seeds} of {', '.join(dict.fromkeys(names))}" for seeds, names in by.items())
        for task, by in lines.items()
    ]


def draw_curve(panel: Any, curve: Curve, look: Look) -> None:
    """Draws the mean; its interval or, of too few seeds for one, each seed as a thin line."""
    evaluation, colour = curve.kind == "eval", look["color"]
    if evaluation:
        panel.plot(curve.x, curve.mean, **look, zorder=4)
    else:
        panel.plot(curve.x, curve.mean, color=colour, linewidth=1.1, alpha=0.6, zorder=3)
    if len(curve.seeds) >= MIN_SEEDS_FOR_INTERVAL:
        panel.fill_between(
            curve.x, curve.low, curve.high, color=colour, alpha=0.18 if evaluation else 0.09, linewidth=0
        )
    elif len(curve.seeds) > 1:
        for values in curve.values:
            panel.plot(curve.x, values, color=colour, linewidth=0.7, alpha=0.5 if evaluation else 0.3, zorder=2)


def handles_of(curves: Sequence[Curve], looks: Mapping[str, Look], shown: Mapping[tuple[str, str], str]) -> list[Any]:
    """Returns the legend: each label with its number of seeds, the kinds of lines where there are two, the band.

    shown: {(label, task): other words for the label}.
    """
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    kinds = {curve.kind for curve in curves}
    handles: list[Any] = []
    for label, look in looks.items():
        own = [curve for curve in curves if curve.label == label]
        counts = sorted({len(curve.seeds) for curve in own})
        name = shown.get((label, own[0].task), label) if own else label
        seeds = f" ({counted(counts[-1], 'seed') if len(counts) == 1 else '1 or more seeds'})" if own else ""
        marker = {} if own and "eval" in kinds else {"marker": "", "linestyle": "-" if own else "--"}
        handles.append(Line2D([], [], **{**look, **marker}, label=f"{name}{seeds}"))
    if len(kinds) > 1:
        handles.append(Line2D([], [], color="0.4", marker="o", label="evaluation"))
        handles.append(Line2D([], [], color="0.4", linewidth=1.1, alpha=0.6, label="training"))
    if any(len(curve.seeds) >= MIN_SEEDS_FOR_INTERVAL and np.isfinite(curve.low).any() for curve in curves):
        handles.append(Patch(color="0.4", alpha=0.18, linewidth=0, label="95% interval"))
    return handles
