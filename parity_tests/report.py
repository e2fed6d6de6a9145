"""How far this package is from the PyTorch reference: `make parity-report`, or `python parity_tests/report.py [DIR]`.

Replays a folder of recordings in this process and writes figure/parity/parity.md and parity.png: for each rung of the
ladder and each quantity, the worst deviation in float32 and in float64, beside the gate. summary.png has a line for
each rung.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
for _path in (ROOT, ROOT / "code"):
    if str(_path) not in sys.path:
        sys.path.insert(0, str(_path))
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

from diffusion_rl.reports.style import COLOURS, csv_text, write_figure  # noqa: E402
from parity_tests import tolerances  # noqa: E402
from parity_tests.replay.compare import DEVIATIONS, Deviation, Mismatch  # noqa: E402
from parity_tests.replay.dispatch import NotImplementedCase, replay  # noqa: E402
from parity_tests.replay.files import GOLDENS, case_files  # noqa: E402

OUTPUT = ROOT / "figure" / "parity"
RUNGS = {
    1: "layers, schedules, data",
    2: "whole networks",
    3: "losses, samplers, log-probabilities",
    4: "gradients",
    5: "optimizer steps",
    6: "training steps",
    7: "whole iterations",
}
EXACT = 1e-17  # where the picture puts what is bit-equal
PRECISIONS = {"float32": COLOURS[1], "float64": COLOURS[0]}
COMMAND = "make parity-report"
CAPTION = "Each dot: the worst deviation of one quantity over all recorded cases; parity.md and parity.png name them."


@dataclass
class Row:
    """One line of the table."""

    rung: int
    quantity: str
    cases: set[str] = field(default_factory=set)
    worst: dict[str, float] = field(default_factory=dict)  # by precision
    gate: dict[str, float] = field(default_factory=dict)

    def add(self, deviation: Deviation) -> None:
        self.cases.add(deviation.case.removesuffix(" plain"))
        for column, value in ((self.worst, deviation.deviation), (self.gate, deviation.gate)):
            column[deviation.dtype] = max(column.get(deviation.dtype, 0.0), value)


def replay_folder(folder: Path) -> tuple[list[str], list[str], list[str]]:
    """Names of the cases that passed, failed and are not implemented; deviations gather in `compare.DEVIATIONS`."""
    passed, failed, missing = [], [], []
    for path in case_files(folder):
        try:
            replay(path)
        except NotImplementedCase:
            missing.append(path.stem)
        except Mismatch as mismatch:
            print(mismatch, file=sys.stderr)
            failed.append(path.stem)
        else:
            passed.append(path.stem)
    return passed, failed, missing


def rows_of(deviations: list[Deviation]) -> list[Row]:
    """Deviations by rung and quantity."""
    rows: dict[tuple[int, str], Row] = {}
    for deviation in deviations:
        quantity = _quantity(deviation)
        rows.setdefault((deviation.rung, quantity), Row(deviation.rung, quantity)).add(deviation)
    return [rows[key] for key in sorted(rows)]


def _quantity(deviation: Deviation) -> str:
    """Quantities of one method together; those of whole iterations by what they are."""
    name = deviation.quantity
    if deviation.rung == 7:
        return {
            "chains_trajs": "denoising chains",
            "actions": "actions",
            "values_trajs": "values",
            "logprobs_trajs": "log-probabilities",
            "advantages_trajs": "advantages and returns",
            "returns_trajs": "advantages and returns",
            "reward_trajs": "scaled rewards",
            "losses of the minibatches": name,
            "final weights": name,
            "learning rates": name,
        }.get(name, "episodes and statistics")
    if deviation.rung in (2, 3) or "schedule table" in name:
        return name.split(" ")[0].removesuffix(".schedule") + (" tables" if "schedule table" in name else "")
    name = name.split(" state.")[0]  # not each weight of a target network apart
    return name.removesuffix(" out").removesuffix(" _total_loss").removesuffix(".forward").removesuffix("out/")


def _text(value: float | None) -> str:
    return "" if value is None else "exact" if value == 0 else f"{value:.1e}"


def markdown(rows: list[Row], counts: tuple[int, int, int], source: str) -> str:
    lines = [
        "# Distance from the PyTorch reference",
        "",
        f"{counts[0]} recorded cases replayed ({source}): {counts[1]} beyond a gate, {counts[2]} not implemented.",
        "Deviations are the worst over all cases, relative to the largest magnitude of the array (gradients: of the",
        "whole model). A float32 gate may be wider than its rung's where the reference's own float32 is further than",
        "that from its float64. Regenerate with `make parity-report`.",
        "",
        "| rung | quantity | cases | worst float32 | gate | worst float64 | gate |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        cells = [f"{row.rung} {RUNGS[row.rung]}", row.quantity, str(len(row.cases))]
        for dtype in ("float32", "float64"):
            cells += [_text(row.worst.get(dtype)), _text(row.gate[dtype]) if dtype in row.gate else ""]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def picture(rows: list[Row], path: Path, command: str) -> None:
    """One line per quantity: both deviations, and the gates as strokes."""
    by_rung: dict[int, list[Row]] = defaultdict(list)
    for row in rows:
        by_rung[row.rung].append(row)

    def draw(figure: Any) -> None:
        axes, labels, ticks, y = figure.subplots(), [], [], 0.0
        for rung, members in by_rung.items():
            y += 1.2
            axes.text(EXACT, y, f"  {rung}  {RUNGS[rung]}", va="center", ha="left", fontsize=8, weight="bold")
            for row in members:
                y += 1
                ticks.append(y)
                labels.append(row.quantity)
                _draw_row(axes, row, y)
        axes.set_ylim(y + 0.8, 0.2)
        _label(axes, ticks, labels, 7)

    height = 0.22 * (len(rows) + 1.2 * len(by_rung)) + 1.1
    write_figure(draw, (8.5, height), path, _table(rows), command)


def summary(rows: list[Row], path: Path, command: str) -> None:
    """One line per rung: all quantities' deviations, and the rung's gates as strokes."""
    rows = [row for row in rows if row.quantity != "the reference's own rounding"]

    def draw(figure: Any) -> None:
        axes, rungs = figure.subplots(), sorted({row.rung for row in rows})
        for row in rows:
            _draw_row(axes, row, rungs.index(row.rung))
        axes.set_ylim(len(rungs) - 0.5, -0.5)
        counts = [len([row for row in rows if row.rung == rung]) for rung in rungs]
        names = [f"{RUNGS[rung]} ({count})" for rung, count in zip(rungs, counts, strict=True)]
        _label(axes, range(len(rungs)), names, 8.5)

    write_figure(draw, (8.5, 3.4), path, _table(rows), command, [CAPTION])


def _draw_row(axes: Any, row: Row, y: float) -> None:
    for dtype, colour in PRECISIONS.items():
        above = y + (0.16 if dtype == "float32" else -0.16)
        if dtype in row.worst:
            axes.plot(max(row.worst[dtype], EXACT), above, "o", color=colour, markersize=4, alpha=0.7)
            if row.gate[dtype] > 0:
                axes.plot(row.gate[dtype], above, "|", color=colour, markersize=8, markeredgewidth=1.6)


def _label(axes: Any, ticks: Sequence[float], labels: Sequence[str], size: float) -> None:
    from matplotlib.lines import Line2D

    axes.set(xscale="log", xlim=(EXACT / 2, 1e-2))
    axes.set_yticks(ticks, labels, fontsize=size)
    axes.set_xticks([EXACT, *(10.0**k for k in range(-16, -1, 2))], ["exact", *(f"1e{k}" for k in range(-16, -1, 2))])
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel("worst deviation from the PyTorch reference (dot) and gate (stroke)")
    axes.spines["left"].set_visible(False)
    handles = [Line2D([], [], marker="o", linestyle="", color=c, label=d) for d, c in PRECISIONS.items()]
    axes.figure.legend(handles=handles, loc="outside upper right", ncols=2)


def _table(rows: list[Row]) -> str:
    columns = ["rung", "quantity", "cases", "float32", "gate_float32", "float64", "gate_float64"]
    lines: list[Sequence[Any]] = [columns]
    for row in rows:
        pairs = [(row.worst.get(dtype, ""), row.gate.get(dtype, "")) for dtype in PRECISIONS]
        lines.append([row.rung, row.quantity, len(row.cases), *pairs[0], *pairs[1]])
    return csv_text(lines, "make parity-report")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", nargs="?", type=Path, default=GOLDENS, help="folder of recordings")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    arguments = parser.parse_args()
    DEVIATIONS.clear()
    logging.getLogger("tensorflow").setLevel(logging.ERROR)  # each case is compiled anew, which it warns of
    passed, failed, missing = replay_folder(arguments.folder)
    rows = rows_of(DEVIATIONS)
    arguments.output.mkdir(parents=True, exist_ok=True)
    source = "the shipped folder" if arguments.folder == GOLDENS else "another folder"
    text = markdown(rows, (len(passed) + len(failed), len(failed), len(missing)), source)
    (arguments.output / "parity.md").write_text(text, encoding="utf-8")
    picture(rows, arguments.output / "parity.png", COMMAND)
    summary(rows, arguments.output / "summary.png", COMMAND)
    for rung in RUNGS:
        worst = {
            d: max((r.worst[d] for r in rows if r.rung == rung and d in r.worst), default=0.0)
            for d in ("float32", "float64")
        }
        single, double = tolerances.GATES[rung]
        print(
            f"rung {rung} {RUNGS[rung]:36} float32 {worst['float32']:.1e} (gate {single:.0e})   "
            f"float64 {worst['float64']:.1e} (gate {double:.0e})"
        )
    print(f"{len(passed)} passed, {len(failed)} failed, {len(missing)} not implemented")
    print(f"written: {arguments.output / 'parity.md'}, parity.png and summary.png beside it")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
