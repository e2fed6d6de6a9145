"""Pictures: videos at a glance, ways through a maze, plans as lines."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from diffusion_rl.core.errors import UserError
from diffusion_rl.core.files import atomic_file
from diffusion_rl.reports.style import COLOURS, STYLE, TIME, legend_below

GAP = 4  # white pixels between pictures
IN_A_ROW = 5
PALETTE = 48  # colours of an animation


def contact_sheet(videos: Sequence[str | os.PathLike], output: str | os.PathLike, columns: int, command: str) -> Path:
    """Writes a PNG with `columns` frames of each video, evenly spaced from its first to its last.

    Raises UserError for a video that cannot be read, or of another size than the first.
    """
    from matplotlib.image import imsave

    rows = [_row(frames(video), columns) for video in videos]
    for video, row in zip(videos, rows, strict=True):
        if row.shape != rows[0].shape:
            raise UserError(f"{video}: its frames have another size than those of {videos[0]}; make two sheets")
    sheet = np.concatenate([np.concatenate([row, _white(GAP, row.shape[1])]) for row in rows])
    with atomic_file(output) as file:
        imsave(file, sheet[:-GAP], format="png", metadata={"Description": command})
    return Path(output)


def animation(videos: Sequence[str | os.PathLike], output: str | os.PathLike, every: int, height: int) -> Path:
    """Writes a GIF of videos side by side, again and again; one that is over stands still until the others are.

    Args:
        every: shows each `every`-th frame, for as long as so many take in the first video; the last, a second more.
        height: of the pictures, in pixels.

    Raises:
        UserError: a video cannot be read.
    """
    from PIL import Image

    shown = [[Image.fromarray(picture) for picture in frames(video)[::every]] for video in videos]
    width = [round(height * pictures[0].width / pictures[0].height) for pictures in shown]
    sheets = []
    for i in range(max(map(len, shown))):
        sheet = Image.new("RGB", (sum(width) + GAP * (len(width) - 1), height), "white")
        for n, pictures in enumerate(shown):
            small = pictures[min(i, len(pictures) - 1)].resize((width[n], height), Image.Resampling.LANCZOS)
            sheet.paste(small, (sum(width[:n]) + GAP * n, 0))
        sheets.append(sheet)
    some = np.concatenate([np.asarray(sheets[i]) for i in (0, len(sheets) // 2, -1)])
    palette = Image.fromarray(some).quantize(PALETTE)
    drawn = [sheet.quantize(palette=palette, dither=Image.Dither.NONE) for sheet in sheets]
    with atomic_file(output) as file:
        shown_for = round(1000 * every / _rate(videos[0]))  # milliseconds
        timing: dict[str, Any] = {"duration": [shown_for] * (len(drawn) - 1) + [shown_for + 1000], "loop": 0}
        drawn[0].save(file, format="GIF", save_all=True, append_images=drawn[1:], optimize=True, **timing)
    return Path(output)


def _rate(video: str | os.PathLike) -> float:
    """Returns the frames a second of a video."""
    import imageio.v2 as imageio

    with imageio.get_reader(os.fspath(video)) as opened:
        reader: Any = opened  # whose class declares no data
        return float(reader.get_meta_data()["fps"])


def frames(video: str | os.PathLike) -> list[np.ndarray]:
    """Returns all frames [Hi,Wi,3] uint8 of a video."""
    try:
        import imageio.v2 as imageio
    except ImportError as error:
        raise UserError('reading videos needs pip install "imageio[ffmpeg]"') from error
    try:
        with imageio.get_reader(os.fspath(video)) as opened:
            reader: Any = opened  # whose class declares no iteration
            pictures = [np.asarray(frame) for frame in reader]
    except (OSError, ValueError, RuntimeError, IndexError, ImportError) as error:
        raise UserError(f"{video}: cannot be read as a video ({error})".split("\n")[0]) from error
    if not pictures:
        raise UserError(f"{video}: no frames in it")
    return pictures


def _row(pictures: Sequence[np.ndarray], columns: int) -> np.ndarray:
    chosen = [pictures[i] for i in np.linspace(0, len(pictures) - 1, columns).round().astype(int)]
    gap = _white(len(chosen[0]), GAP)
    return np.concatenate([part for picture in chosen for part in (picture, gap)][:-1], axis=1)


def _white(height: int, width: int) -> np.ndarray:
    return np.full((height, width, 3), 255, np.uint8)


def save_maze(path: Path, free: np.ndarray, ways: np.ndarray, goal: np.ndarray, titles: Sequence[str] = ()) -> None:
    """Draws ways [n,steps,2 or more] over the cells of a maze [rows, columns] (true: no wall), a picture for each.

    goal: [2] of all, or [n,2].

    Positions are drawn as in D4RL, where a cell's centre is 0.2 less than its number.
    """
    from matplotlib.lines import Line2D

    goals = np.broadcast_to(goal, (len(ways), 2))
    black: dict[str, Any] = {"markeredgecolor": "black", "linestyle": ""}
    start = Line2D([], [], marker="o", color="white", markersize=6, label="start", **black)
    end = Line2D([], [], marker="*", color=COLOURS[1], markersize=13, label="goal", **black)
    with _panels(path, len(ways), side=2.2) as axes:
        for i, (axis, way, goal) in enumerate(zip(axes, ways, goals, strict=False)):
            axis.set(xticks=[], yticks=[], title=titles[i] if titles else "")
            axis.spines[:].set_visible(False)
            axis.imshow(np.where(free, 1.0, 0.75), cmap="gray", vmin=0, vmax=1)
            y, x = way[:, 0] + 0.2, way[:, 1] + 0.2
            axis.plot(x, y, color="0.6", linewidth=0.8, zorder=1)
            time = axis.scatter(x, y, c=np.linspace(0, 1, len(way)), cmap=TIME, s=7, zorder=2)
            for mark, place in ((start, (x[0], y[0])), (end, (goal[1] + 0.2, goal[0] + 0.2))):
                look = {name: getattr(mark, f"get_{name}")() for name in ("marker", "color", "markersize")}
                axis.plot(*place, zorder=3, **look, **black)
        figure = axes[0].figure
        colours = {"first step": 0.0, "half of the time": 0.5, "last step": 1.0}
        dots = [Line2D([], [], marker="o", ls="", color=time.cmap(at), label=name) for name, at in colours.items()]
        legend_below(figure, [start, *dots, end])


def save_lines(path: Path, plans: np.ndarray) -> None:
    """Draws plans [n,H,D], a picture for each, with a line for each entry."""
    with _panels(path, len(plans)) as axes:
        for axis, plan in zip(axes, plans, strict=False):
            axis.plot(plan)
            axis.set_xlabel("step of the plan")


def save_samples(path: Path, samples: np.ndarray, plan: np.ndarray, seen: np.ndarray | None = None) -> None:
    """Draws sampled actions [B,H,A] and the plan [H,A] that was made of them, a panel for each entry.

    seen: pictures [C,Hi,Wi] that they were planned from, of which the first camera's comes first.
    """
    from matplotlib.lines import Line2D

    low, high = min(samples.min(), plan.min()), max(samples.max(), plan.max())
    with _panels(path, plan.shape[1] + (seen is not None), side=2.4) as axes:
        if seen is not None:
            axes[0].imshow(np.moveaxis(seen[:3], 0, -1).astype(np.uint8))
            axes[0].set(title="what is seen", xticks=[], yticks=[])
            axes[0].grid(False)
        for i, axis in enumerate(axes[len(axes) - plan.shape[1] :]):
            axis.plot(samples[:, :, i].T, color=COLOURS[0], alpha=0.3, linewidth=0.8)
            axis.plot(plan[:, i], color="black", linewidth=2)
            axis.set(title=f"action {i}", xlabel="step of the plan", ylim=(low - 0.1, high + 0.1))
        one = Line2D([], [], color=COLOURS[0], alpha=0.5, label="a sample")
        legend_below(axes[0].figure, [one, Line2D([], [], color="black", linewidth=2, label="the plan: their mean")])


@contextlib.contextmanager
def _panels(path: Path, count: int, side: float = 3.0) -> Iterator[list[Any]]:
    """Yields so many panels to draw on, `side` inches wide, in rows of `IN_A_ROW`; writes them as a PNG."""
    import matplotlib
    from matplotlib.figure import Figure

    columns = min(count, IN_A_ROW)
    rows = -(-count // columns)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(side * columns, side * rows + 0.4), layout="constrained")
        axes = list(figure.subplots(rows, columns, squeeze=False).flat)
        yield axes[:count]
        for axis in axes[count:]:
            axis.remove()
        with atomic_file(path) as file:
            figure.savefig(file, format="png", bbox_inches="tight", dpi=110)
