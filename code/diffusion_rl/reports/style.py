"""How every figure of this repository looks, and what is written beside it: its numbers, and how it was made."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from diffusion_rl.core.errors import UserError
from diffusion_rl.core.files import write_bytes
from diffusion_rl.tasks.registry import task_named

# Okabe and Ito's colours, told apart with any colour vision, without the yellow (pale on white); then three of Tol's.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000", "#882255", "#999933", "#999999")
MARKERS = "os^DvPX<>h"  # beside the colours, for prints in grey
TIME = "cividis"  # colour map of time
STYLE: dict[Any, Any] = {  # of matplotlib
    "font.size": 9,
    "axes.titlesize": 10,
    "legend.fontsize": 8.5,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.xmargin": 0.02,
    "grid.color": "0.9",
    "grid.linewidth": 0.7,
    "lines.linewidth": 1.6,
    "lines.markersize": 4.5,
    "errorbar.capsize": 3,
    "pdf.fonttype": 42,  # text stays text
    "svg.fonttype": "none",
    "savefig.dpi": 160,
}
AXIS_LABELS = {
    "env_steps": "environment steps",
    "itr": "iterations",
    "epoch": "epochs",
    "gradient_steps": "gradient steps",
    "episode_return": "mean return of an episode",
    "loss": "loss",
    "success_rate": "success rate",
}
MADE_BY = {  # ending -> metadata for the command, for the program, and for the date, which is left out
    ".png": ("Description", "Software", None),
    ".pdf": ("Subject", "Creator", "CreationDate"),
    ".svg": ("Description", "Creator", "Date"),
}


def axis_label(column: str) -> str:
    """Returns what an axis is called that shows a column of the metrics."""
    return AXIS_LABELS.get(column, column.replace("_", " "))


def task_title(name: str) -> str:
    """Returns an environment or data set in words: hopper-medium-v2 -> Hopper, medium."""
    task = task_named(name)
    if task is None or not task.title:
        return name
    rest = "-".join(word for word in name.removeprefix(task.name).split("-") if word and not word[1:].isdigit())
    return f"{task.title}, {rest}" if rest else task.title


def style_axes(panel: Any, x: str, y: str) -> None:
    """Names the axes of a panel that is drawn, and lets them begin at zero: differences look as large as they are."""
    from matplotlib.ticker import EngFormatter

    panel.set_xlabel(axis_label(x))
    panel.set_ylabel(axis_label(y))
    if x in ("env_steps", "gradient_steps"):
        panel.xaxis.set_major_formatter(EngFormatter(sep=" "))  # 500 k, 2 M
    if y == "success_rate":
        panel.set_ylim(-0.03, 1.03)
    elif panel.dataLim.y0 >= 0:
        panel.set_ylim(bottom=0)
    elif panel.dataLim.y1 <= 0:
        panel.set_ylim(top=0)
    if panel.get_xlim()[0] > 0:
        panel.set_xlim(left=0)


def legend_below(figure: Any, handles: Sequence[Any]) -> None:
    """Puts the legend of a whole figure below it, in as many columns as its width has room for."""
    longest = max(len(handle.get_label()) for handle in handles)
    columns = int(figure.get_figwidth() / (0.5 + 0.06 * longest))
    figure.legend(handles=list(handles), loc="outside lower center", ncols=max(1, min(columns, len(handles))))


def counted(count: int, what: str) -> str:
    """Returns "1 seed", "3 seeds"."""
    return f"{count} {what}{'s' if count != 1 else ''}"


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


def write_figure(
    draw: Callable[[Any], None],
    size: tuple[float, float],
    path: Path,
    table: str,
    command: str,
    caption: Sequence[str] = (),
) -> Path:
    """Draws and writes a figure, which names the command; beside it its numbers (CSV) and what there is to say (TXT).

    Args:
        draw: draws on a matplotlib figure.
        size: of it, in inches.
        path: ends in .png, .pdf or .svg.
        table: its numbers.
        command: that made it.
        caption: lines on what is seen.

    Returns:
        the path of the figure.
    """
    import matplotlib
    from matplotlib.figure import Figure

    picture, ending = io.BytesIO(), picture_path(path).suffix.lower()
    described, program, date = MADE_BY[ending]
    metadata = {described: command, program: "diffusion-rl", **({date: None} if date else {})}
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure)
        figure.savefig(picture, format=ending[1:], metadata=metadata)
    write_bytes(path.with_suffix(".csv"), table.encode())
    lines = [*caption, f"Made by: {command}"] if command else list(caption)
    if lines:
        write_bytes(path.with_suffix(".txt"), "".join(f"{line}\n" for line in lines).encode())
    write_bytes(path, picture.getvalue())
    return path
