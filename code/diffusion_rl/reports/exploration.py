"""Paths through the avoiding task, drawn over its obstacles, and what the picture shows in numbers (DPPO, Figure 7)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from diffusion_rl.reports.style import COLOURS, counted, csv_text, legend_below, picture_path, write_figure
from diffusion_rl.tasks import avoiding

X_LIMITS, Y_LIMITS = (0.2, 0.8), (-0.3, 0.5)
PATH_COLOUR, COLLISION_COLOUR, FINISH_COLOUR = COLOURS[:3]
DATA_COLOUR = "#000000"
NAMES = {"data": "demonstrations", "diffusion": "DPPO", "gaussian": "Gaussian PPO", "gmm": "GMM PPO"}
CAPTION = (
    "Ways from below to the line at the top. Each panel: how many of the ways through the obstacles (modes) are taken,"
)
CAPTION += " and the share of paths that reach the line without touching an obstacle."
COLUMNS = ("modes", "policy", "paths", "distinct_modes", "finishing", "colliding", "spread_mm", "off_data_mm", "taken")


@dataclass(frozen=True)
class Panel:
    """Paths [T, 2] of one policy (or the demonstrations, `policy` "data"), and which of them collided."""

    modes: str
    policy: str
    paths: Sequence[np.ndarray]
    collided: np.ndarray


@dataclass(frozen=True)
class Numbers:
    """What the paths of a panel show.

    distinct_modes: different ways through the three rows, among paths that finish; taken: how many took each.
    finishing: share that crosses y = 0.4 without having touched an obstacle; colliding: share that touches one.
    spread: standard deviation of x where paths of the same mode pass a row, in mm (averaged over rows and modes that
    two finishing paths take); off_data: mean distance to the nearest point of any demonstration before the goal, in mm.
    """

    distinct_modes: int
    finishing: float
    colliding: float
    spread: float
    off_data: float
    taken: dict[tuple[int, ...], int]


def measure(panel: Panel, data: Sequence[np.ndarray]) -> Numbers:
    """Returns the numbers of a panel; data: the demonstrations [T, 2] of its set of modes."""
    before = [path[: _end(path)] for path in panel.paths]
    crossed = np.array([bool((path[:, 1] > avoiding.GOAL_Y).any()) for path in panel.paths])
    finishing = crossed & ~np.asarray(panel.collided)
    ways = [avoiding.modes_of(path) for path in before]
    taken = Counter(way for way, good in zip(ways, finishing, strict=True) if good)
    spreads = []
    for way in taken:
        same = [path for path, other, good in zip(before, ways, finishing, strict=True) if good and other == way]
        if len(same) > 1:
            spreads += [np.std([_x_at(path, y) for path in same]) for y, _, _ in avoiding.ROWS]
    cloud = np.concatenate(data)
    distances = [np.linalg.norm(path[:, None] - cloud, axis=-1).min(axis=1).mean() for path in before]
    return Numbers(
        distinct_modes=len(taken),
        finishing=float(finishing.mean()),
        colliding=float(np.mean(panel.collided)),
        spread=1e3 * float(np.mean(spreads)) if spreads else float("nan"),
        off_data=1e3 * float(np.mean(distances)),
        taken=dict(sorted(taken.items())),
    )


def _end(path: np.ndarray) -> int:
    """Returns positions until the goal is crossed, or all."""
    crossed = np.flatnonzero(path[:, 1] > avoiding.GOAL_Y)
    return int(crossed[0]) + 1 if len(crossed) else len(path)


def _x_at(path: np.ndarray, y: float) -> float:
    """Returns x where a path that goes up first reaches this y."""
    t = int(np.argmax(path[:, 1] >= y))
    (x0, y0), (x1, y1) = path[max(t - 1, 0)], path[t]
    return float(x1 if y1 == y0 else x0 + (x1 - x0) * (y - y0) / (y1 - y0))


def draw(panels: Sequence[Panel], output: str | Path, command: str = "") -> tuple[Path, str]:
    """Draws a row of panels for each set of modes, its data first, and writes the CSV beside.

    Returns the PNG's path and the numbers as lines of text.
    """
    output = picture_path(output)
    rows = list(dict.fromkeys(panel.modes for panel in panels))
    columns = list(dict.fromkeys(panel.policy for panel in panels))
    data = {panel.modes: panel.paths for panel in panels if panel.policy == "data"}
    records = [(panel, measure(panel, data[panel.modes])) for panel in panels]

    def on(figure: Any) -> None:
        axes = figure.subplots(len(rows), len(columns), squeeze=False)
        for panel, numbers in records:
            _draw_panel(axes[rows.index(panel.modes), columns.index(panel.policy)], panel, numbers)
        legend_below(figure, _handles())

    size = (1.9 * len(columns), 0.6 + 2.9 * len(rows))
    write_figure(on, size, output, csv_text(_rows(records), command), command, [CAPTION])
    return output, "\n".join(describe(panel, numbers) for panel, numbers in records)


def _draw_panel(axis: Any, panel: Panel, numbers: Numbers) -> None:
    from matplotlib.patches import Circle

    for x, y, radius, _ in avoiding.OBSTACLES:
        axis.add_patch(Circle((x, y), radius, color="#999999"))
    axis.axhline(avoiding.FINISH_Y, color=FINISH_COLOUR, linewidth=1.5)
    colour = DATA_COLOUR if panel.policy == "data" else PATH_COLOUR
    for path, collided in zip(panel.paths, panel.collided, strict=True):
        axis.plot(path[:, 0], path[:, 1], color=COLLISION_COLOUR if collided else colour, linewidth=0.7, alpha=0.6)
    axis.set(xlim=X_LIMITS, ylim=Y_LIMITS, aspect="equal", xticks=[], yticks=[])
    title = f"{panel.modes.upper()}, {NAMES.get(panel.policy, panel.policy)}"
    axis.set_title(f"{title}\n{counted(numbers.distinct_modes, 'mode')}, {numbers.finishing:.0%} finish", fontsize=8)


def _handles() -> list[Any]:
    from matplotlib.lines import Line2D

    names = {DATA_COLOUR: "demonstration", PATH_COLOUR: "path", COLLISION_COLOUR: "path that touches an obstacle"}
    handles = [Line2D([], [], color=colour, label=name) for colour, name in names.items()]
    handles.append(Line2D([], [], color="#999999", marker="o", markersize=8, linestyle="", label="obstacle"))
    return [*handles, Line2D([], [], color=FINISH_COLOUR, label="finish")]


def describe(panel: Panel, numbers: Numbers) -> str:
    """Returns the numbers of a panel as one line."""
    taken = ", ".join(f"{'-'.join(map(str, way))}: {count}" for way, count in numbers.taken.items())
    return (
        f"{panel.modes} {panel.policy:9s} {len(panel.paths):3d} paths: {numbers.distinct_modes} distinct modes "
        f"({taken}), {numbers.finishing:.0%} finish, {numbers.colliding:.0%} collide, "
        f"spread within a mode {numbers.spread:.1f} mm, {numbers.off_data:.1f} mm from the data"
    )


def _rows(records: Sequence[tuple[Panel, Numbers]]) -> Iterator[Sequence[Any]]:
    yield COLUMNS
    for panel, n in records:
        taken = " ".join(f"{'-'.join(map(str, way))}:{count}" for way, count in n.taken.items())
        figures = (round(n.finishing, 4), round(n.colliding, 4), round(n.spread, 2), round(n.off_data, 2))
        yield [panel.modes, panel.policy, len(panel.paths), n.distinct_modes, *figures, taken]
