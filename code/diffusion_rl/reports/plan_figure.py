"""Scores of planners beside each other, a group of bars for each data set; a CSV of the numbers beside the figure."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from diffusion_rl.core.errors import UserError
from diffusion_rl.reports.figures import csv_text, write_figure
from diffusion_rl.reports.plan_results import experiments

WIDTH = 0.8  # of a group of bars


class Bar(NamedTuple):
    """Mean and standard error of normalised scores; `episodes` 0: not known."""

    dataset: str
    label: str
    mean: float
    error: float
    episodes: int


def bars_of(logbase: str | Path, labels: Sequence[str], also: Sequence[str] = ()) -> list[Bar]:
    """Returns every experiment below a folder of plans that has a label, in the order of the labels.

    Args:
        labels: "EXPERIMENT=TEXT", where EXPERIMENT is the name of a folder below plans; none: all, by their names.
        also: "TEXT:DATASET=MEAN,ERROR", scores from elsewhere.

    Raises:
        UserError: a text of another form, or nothing to draw.
    """
    results = experiments(logbase)
    words = dict(_split(label, "=") for label in labels) or {
        result.folder.name: result.folder.name for result in results
    }
    known = [result for result in results if result.folder.name in words]
    bars = [
        Bar(result.dataset, words[result.folder.name], result.mean, result.error, len(result.scores))
        for result in known
    ]
    for text in also:
        label, rest = _split(text, ":")
        dataset, numbers = _split(rest, "=")
        try:
            mean, error = (float(number) for number in numbers.split(","))
        except ValueError as problem:
            raise UserError(f"--also {text}: write TEXT:DATASET=MEAN,ERROR") from problem
        bars.append(Bar(dataset, label, mean, error, 0))
    if not bars:
        raise UserError(f"no finished plans of these names below {logbase}: plan first, or name another folder")
    order = list(dict.fromkeys([*words.values(), *(bar.label for bar in bars)]))
    return sorted(bars, key=lambda bar: (bar.dataset, order.index(bar.label)))


def _split(text: str, separator: str) -> tuple[str, str]:
    before, present, after = text.rpartition(separator)
    if not present:
        raise UserError(f"{text!r}: a {separator!r} is missing")
    return before, after


def plan_scores(bars: Sequence[Bar], output: str | Path, command: str = "") -> Path:
    """Draws the bars with their standard errors."""
    from matplotlib.figure import Figure

    datasets, labels = (list(dict.fromkeys(names)) for names in zip(*(bar[:2] for bar in bars), strict=True))
    figure = Figure(figsize=(4.5 + 2.5 * len(datasets), 4), layout="constrained")
    panel = figure.subplots()
    width = WIDTH / len(labels)
    for i, label in enumerate(labels):
        own = [bar for bar in bars if bar.label == label]
        x = np.array([datasets.index(bar.dataset) for bar in own]) + (i + 0.5) * width - WIDTH / 2
        panel.bar(x, [bar.mean for bar in own], 0.9 * width, yerr=[bar.error for bar in own], capsize=3, label=label)
        for where, bar in zip(x, own, strict=True):
            panel.annotate(f"{bar.mean:.0f}", (where, bar.mean + bar.error), ha="center", va="bottom", fontsize=8)
    panel.set_xticks(range(len(datasets)), datasets)
    panel.set(ylabel="normalised score")
    panel.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right upper", frameon=False)
    return write_figure(figure, Path(output), csv_text([Bar._fields, *bars], command), command, dpi=150)
