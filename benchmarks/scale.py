"""How cost grows: DPPO's default Hopper sizes, one at a time made larger.

    python benchmarks/scale.py                            # everything: table, figure/scale/scale.png and its numbers
    python benchmarks/scale.py --readme docs/speed.md     # the table between that file's markers, too
    python benchmarks/scale.py --rows data replay --keep  # some rows; the others as the figure's numbers have them
    python benchmarks/scale.py --draw                     # nothing measured: from the figure's numbers
    python benchmarks/scale.py --quick                    # the two smallest sizes: to see that it works

Every size is measured in a process of its own (our_scale.py): processor time, which neighbours disturb less than time
on a clock, and peak memory. Prints a Markdown table with exponents, fitted to the upper half of the sizes.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import machine
import numpy as np
from run import insert
from scale_rows import ROWS, Row, write_data

HERE = Path(__file__).resolve().parent
FIGURE = HERE.parent / "figure" / "scale" / "scale.png"
MARKER = "scale"  # of the table in documents
ROOM = 1.5  # memory must suffice for so many times what the size before makes expected
LARGER = 0.15  # above what is expected an exponent is called out
BUSY = 0.5


class Point(NamedTuple):
    """One size of one row: processor seconds, GB. `first` is the first call's time, `start` what imports take."""

    row: str
    size: int
    seconds: float
    first: float
    start_gb: float
    peak_gb: float


def main() -> int:
    """Measures and shows."""
    options = _options()
    before = machine.load()
    points = _earlier(options.output) if options.keep else {}
    chosen = {name: ROWS[name] for name in ROWS if name in (options.rows or ROWS) and not options.draw}
    for process in dict.fromkeys(row.process for row in chosen.values()):
        here = {name: row for name, row in chosen.items() if row.process == process}
        points = {key: point for key, point in points.items() if point.row not in here}
        points |= {(point.row, point.size): point for point in measure(process, here, options.quick)}
    ordered = [points[key] for key in sorted(points, key=lambda key: ([*ROWS].index(key[0]), key[1]))]
    state = f"busy machine (load {before:.1f}), processor time" if before > BUSY else "quiet machine, processor time"
    about = _told(options.output) if options.draw else f"{machine.sentence(machine.describe())}; {state}"
    text = markdown(ordered, about)
    print(text)
    if options.output:
        write(ordered, options.output, _command(options), about)
    if options.readme:
        insert(options.readme, text, MARKER)
    return 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the two smallest sizes, few calls")
    parser.add_argument("--rows", nargs="+", choices=ROWS, metavar="ROW", help=f"of {[*ROWS]}")
    parser.add_argument("--keep", action="store_true", help="take the other rows from the CSV beside the figure")
    parser.add_argument("--draw", action="store_true", help="measure nothing: everything from that CSV")
    parser.add_argument(
        "--output", type=Path, metavar="FILE.png", help=f"figure (default: {FIGURE.relative_to(HERE.parent)}, if whole)"
    )
    parser.add_argument("--readme", type=Path, metavar="FILE.md", help="put the table between this file's markers")
    options = parser.parse_args()
    options.keep = options.keep or options.draw
    whole = not options.quick and (options.keep or not options.rows)
    options.output = options.output or (FIGURE if whole else None)
    if options.keep and options.output is None:
        parser.error("--keep needs the figure's file: --output FILE.png")
    return options


def _command(options: argparse.Namespace) -> str:
    words = ["python", "benchmarks/scale.py"] + ["--quick"] * options.quick
    return shlex.join([*words, "--rows", *options.rows] if options.rows and not options.keep else words)


# ---------- measuring ----------


def measure(process: str, here: dict[str, Row], quick: bool) -> Iterable[Point]:
    """Yields the points of the rows `here`, which one kind of process measures, smallest size first."""
    sizes = next(iter(here.values())).sizes[: 2 if quick else None]
    earlier: list[tuple[int, float]] = []  # (size, GB above the start)
    with tempfile.TemporaryDirectory() as name:
        for size in sizes:
            needed = expected(earlier, size)
            if lacking := _lacking(process, needed, size, Path(name)):
                print(f"{process}, {size}: left out, {lacking}", file=sys.stderr, flush=True)
                break
            answer = _ask(process, [row.part for row in here.values()], size, Path(name), 0.1 if quick else 1.0)
            if answer is None:
                break
            parts = answer["parts"]
            earlier.append((size, max(part["peak_gb"] for part in parts.values()) - answer["start_gb"]))
            for row_name, row in here.items():
                part = parts[row.part]
                point = Point(row_name, size, part[row.quantity], part["first"], answer["start_gb"], part["peak_gb"])
                print(
                    f"  {row_name}, {size}: {_time(point.seconds)}, {point.peak_gb:.2f} GB", file=sys.stderr, flush=True
                )
                yield point


def expected(earlier: Sequence[tuple[int, float]], size: int) -> float:
    """GB above the start that `size` will need, from (size, GB) of smaller ones: as from the last two in a line."""
    if len(earlier) < 2:
        return earlier[-1][1] if earlier else 0.0
    (small, less), (large, more) = earlier[-2:]
    return more + max(0.0, more - less) / (large - small) * (size - large)


def _lacking(process: str, needed: float, size: int, folder: Path) -> str:
    """What this machine lacks for `needed` GB above the start, or nothing; the data's file is on the disk, too."""
    available = machine.available_memory()
    if available is not None and ROOM * needed + 1 > available:
        return f"it needs about {needed:.1f} GB of memory above the start, {available:.1f} are available"
    file, free = size * 56 / 1e9, shutil.disk_usage(folder).free / 1e9
    return f"its file needs {file:.1f} GB, {free:.1f} are free" if process == "data" and 2 * file > free else ""


def _ask(process: str, parts: Iterable[str], size: int, folder: Path, seconds: float) -> dict[str, Any] | None:
    """Has a process measure one size; None if it did not get there."""
    command = [sys.executable, str(HERE / "our_scale.py"), process, str(size), "--seconds", str(seconds)]
    command += ["--parts", *dict.fromkeys(parts)]
    if process == "data":
        command += ["--data", str(write_data(folder / "train.npz", size))]
    ended = subprocess.run(command, capture_output=True, text=True)
    if ended.returncode:
        reason = (ended.stderr.strip().splitlines() or [f"status {ended.returncode}"])[-1]
        print(f"{process}, {size}: not measured, {reason}", file=sys.stderr, flush=True)
        return None
    return json.loads(ended.stdout.strip().splitlines()[-1])


def exponent(sizes: Sequence[float], values: Sequence[float]) -> float | None:
    """The power of the size that the values follow: least squares of the logarithms over the upper half of the sizes,
    at least two. None where there are not two, or a value is not above zero."""
    upper = sorted(zip(sizes, values, strict=True))[len(sizes) // 2 if len(sizes) > 3 else -2 :]
    if len(upper) < 2 or min(value for _, value in upper) <= 0:
        return None
    x, y = np.log(np.array(upper, float).T)
    return float(np.polyfit(x, y, 1)[0])


# ---------- showing ----------


def of_row(points: Sequence[Point], name: str) -> list[Point]:
    """The points of a row, smallest size first."""
    return [point for point in points if point.row == name]


def powers(points: Sequence[Point]) -> tuple[float | None, float | None]:
    """The exponents of a row's time, and of its memory above the start."""
    sizes = [point.size for point in points]
    return (
        exponent(sizes, [point.seconds for point in points]),
        exponent(sizes, [point.peak_gb - point.start_gb for point in points]),
    )


def markdown(points: Sequence[Point], about: str) -> str:
    """The table and what one needs to read it."""
    lines = ["| what grows: sizes | what is timed | processor time | exponent | peak memory, GB | exponent |"]
    lines.append("|---" * 6 + "|")
    for name, row in ROWS.items():
        if not (here := of_row(points, name)):
            continue
        time, memory = powers(here)
        mark = "**" if time is not None and time > row.power + LARGER else ""
        cells = [
            f"{row.varied}: {' / '.join(_count(point.size) for point in here)}",
            row.title,
            " / ".join(_time(point.seconds) for point in here),
            f"{mark}{_power(time)}{mark}",
            " / ".join(f"{point.peak_gb:.2f}" for point in here),
            _power(memory),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    start = np.median([point.start_gb for point in points]) if points else 0.0
    return "\n".join(
        [
            *lines,
            "",
            f"{about} of all threads",
            "together. Exponents are fitted to the upper half of the sizes, those of memory above the",
            f"{start:.2f} GB that a process has once everything is imported. Bold: larger than it should be.",
        ]
    )


def _power(value: float | None) -> str:
    return "–" if value is None else f"{value + 0.0:.2f}".replace("-0.00", "0.00")


def _count(size: int) -> str:
    digits = round(math.log10(size))
    return f"1e{digits}" if size >= 10**4 and 10**digits == size else str(size)


def _time(seconds: float) -> str:
    if seconds >= 1:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds * 1e3:.0f} ms" if seconds >= 0.01 else f"{seconds * 1e3:.1f} ms"


def write(points: Sequence[Point], path: Path, command: str, about: str) -> None:
    """Writes the figure, its numbers and its caption."""
    from diffusion_rl.reports.style import csv_text, write_figure

    table = csv_text([Point._fields, *points], command, about)
    caption = [
        "How cost grows where one size of DPPO's default Hopper run is made larger: processor time of all threads",
        "together, and (last panel) peak memory above that of a process that has imported everything. Dotted: time in",
        "proportion to the size. The exponents are fitted to the upper half of the sizes.",
        f"{about}.",
    ]
    write_figure(lambda figure: draw(figure, points), (10, 8.5), path, table, command, caption)


def draw(figure: Any, points: Sequence[Point]) -> None:
    """Draws a panel for each size that grows, and one of memory."""
    from diffusion_rl.reports.style import COLOURS, MARKERS

    measured = {name: of_row(points, name) for name in ROWS if of_row(points, name)}
    varied = list(dict.fromkeys(ROWS[name].varied for name in measured))
    columns = min(3, len(varied) + 1)
    panels = figure.subplots(-(-(len(varied) + 1) // columns), columns, squeeze=False).ravel()
    for panel, what in zip(panels, varied, strict=False):
        names = [name for name in measured if ROWS[name].varied == what]
        for name, colour, marker in zip(names, COLOURS, MARKERS, strict=False):
            here, power = measured[name], _power(powers(measured[name])[0])
            sizes, seconds = [p.size for p in here], [p.seconds for p in here]
            panel.plot(sizes, seconds, f"{marker}-", color=colour, label=f"{ROWS[name].title} ({power})")
            panel.plot(sizes, [seconds[0] * size / sizes[0] for size in sizes], ":", color="0.6", linewidth=1)
        panel.set(xscale="log", yscale="log", xlabel=what, ylabel="processor time, s")
        _finish(panel, sorted({p.size for name in names for p in measured[name]}), 0.35)
    last = panels[len(varied)]
    for i, what in enumerate(varied):
        here = max((measured[name] for name in measured if ROWS[name].varied == what), key=lambda row: row[-1].peak_gb)
        growth = [p.size / here[0].size for p in here]
        last.plot(growth, [p.peak_gb - p.start_gb for p in here], f"{MARKERS[i]}-", color=COLOURS[i], label=what)
    last.set(xscale="log", yscale="log", xlabel="times the smallest size", ylabel="peak memory above the start, GB")
    _finish(last, [1, 10, 100, 1000], 1.0)
    for panel in panels[len(varied) + 1 :]:
        panel.set_visible(False)


def _finish(panel: Any, sizes: Sequence[int], room: float) -> None:
    """Marks the sizes below a panel, and puts the legend into `room` above the lines."""
    panel.set_xticks(sizes, [_count(size) for size in sizes])
    panel.set_xticks([], minor=True)
    low, high = panel.get_ylim()
    panel.set_ylim(low, high * (high / low) ** room)
    panel.legend(loc="upper left", fontsize=7)


def _told(path: Path) -> str:
    """What the CSV beside the figure says of the machine."""
    return path.with_suffix(".csv").read_text().partition("\n")[0].removeprefix("# ")


def _earlier(path: Path) -> dict[tuple[str, int], Point]:
    """The points in the CSV beside the figure."""
    if not path.with_suffix(".csv").is_file():
        return {}
    lines = [line for line in path.with_suffix(".csv").read_text().splitlines() if not line.startswith("#")]
    rows = [{k: float(v) if k != "row" else v for k, v in row.items()} for row in csv.DictReader(lines)]
    points = [Point(**(row | {"size": int(row["size"])})) for row in rows if row["row"] in ROWS]
    return {(point.row, point.size): point for point in points}


if __name__ == "__main__":
    sys.path.insert(0, str(HERE.parent / "code"))
    sys.exit(main())
