"""Scores of planning: results in the folders of plans, a LaTeX table beside published ones, and bars with a CSV."""

from __future__ import annotations

import csv
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from diffusion_rl.core.errors import UserError
from diffusion_rl.core.files import read_bytes, read_json
from diffusion_rl.reports.published import rows
from diffusion_rl.reports.style import COLOURS, csv_text, picture_path, task_title, write_figure
from diffusion_rl.tasks.registry import tasks_of

BUFFERS = ("medium-replay", "medium", "medium-expert")
LOCOMOTION = {task.name: task.title for task in tasks_of(simulator="locomotion")}
DATASETS = [f"{task}-{buffer}-v2" for task in LOCOMOTION for buffer in BUFFERS]
ALGORITHMS = ("BC", "CQL", "IQL", "DT", "TT", "MOPO", "MOReL", "MBOP", "Diffuser")
WIDTH = 0.8  # of a group of bars
HIGHLIGHTED = 0.95  # of the row's best score
DAGGER = r"^\dagger"  # of scores that are not comparable
LABELS = {
    "Dataset": "Dataset",
    "Environment": "Environment",
    "Average": "Average",
    "medium-expert": "Medium-Expert",
    "medium": "Medium",
    "medium-replay": "Medium-Replay",
    **LOCOMOTION,
}
_COLOURS = {"tblue": "1F77B4", "tred": "FF6961", "tgreen": "429E9D", "thighlight": "000000"}
Scores = Mapping[str, Mapping[str, float]]  # by algorithm, then data set


class Experiment(NamedTuple):
    """The trials of one experiment; scores are 100 times the normalised ones.

    Attributes:
        guided: by a value.
        home_made: trained on data of this repository, not D4RL's.
    """

    dataset: str
    folder: Path
    scores: list[float]
    guided: bool = True
    home_made: bool = False

    @property
    def mean(self) -> float:
        return float(np.mean(self.scores))

    @property
    def error(self) -> float:
        """Returns the standard error of the mean."""
        return float(np.std(self.scores) / math.sqrt(len(self.scores))) if len(self.scores) > 1 else 0.0

    def __str__(self) -> str:
        columns = (
            f"{self.dataset:<30} | {self.folder.name:<50} | {self.folder.parent!s:<50} | {len(self.scores)} scores "
        )
        return f"{columns}\n    {self.mean:.1f} +/- {self.error:.2f}"


def experiments(logbase: str | Path, datasets: Iterable[str] = DATASETS) -> list[Experiment]:
    """Returns every `<logbase>/<dataset>/plans*/<experiment>` with a finished trial (a folder with a rollout.json)."""
    results = []
    for dataset in datasets:
        for folder in sorted(Path(logbase).glob(f"{dataset}/plans*/*"), key=str):
            trials = sorted(folder.glob("*/rollout.json"), key=str)
            if trials:
                facts = [_read(path) for path in trials]
                guided = "epoch_value" in facts[0]
                scores = [trial["score"] * 100 for trial in facts]
                results.append(Experiment(dataset, folder, scores, guided, _is_home_made(folder)))
    return results


def _is_home_made(folder: Path) -> bool:
    options = [read_json(path) for path in folder.glob("*/args.json")]
    return any(isinstance(own, dict) and own.get("home_made_data") is True for own in options)


def _read(path: Path) -> dict[str, Any]:
    facts = read_json(path)
    try:
        return {**facts, "score": float(facts["score"])}
    except (ValueError, LookupError, TypeError) as error:
        raise UserError(f"{path} has no score in it ({error}): delete it or plan again") from error


def published() -> tuple[dict[str, dict[str, float]], dict[str, dict[str, float]]]:
    """Returns published means and errors by algorithm and data set."""
    means: dict[str, dict[str, float]] = {}
    errors: dict[str, dict[str, float]] = {}
    for row in rows("d4rl_locomotion.csv"):
        means.setdefault(row["algorithm"], {})[row["dataset"]] = float(row["mean"])
        if row["error"]:
            errors.setdefault(row["algorithm"], {})[row["dataset"]] = float(row["error"])
    return means, errors


def latex_table(
    means: Scores,
    errors: Scores,
    algorithms: Iterable[str] = ALGORITHMS,
    labels: Mapping[str, str] | None = None,
    home_made: Collection[tuple[str, str]] = (),
) -> str:
    """Returns a table of all data sets; scores near the best of their row are bold.

    Averages are over the rows that all algorithms have.

    Args:
        errors: only the algorithms in it are printed with theirs.
        labels: other words for those of `LABELS`.
        home_made: (algorithm, data set) of scores with home-made data, which are marked and never bold.
    """
    words, algorithms = LABELS | dict(labels or {}), list(algorithms)
    lines = [rf"\definecolor{{{name}}}{{HTML}}{{{code}}}" for name, code in _COLOURS.items()]
    heads = (_head(name) for name in (words["Dataset"], words["Environment"], *algorithms))
    lines += [
        r"\newcolumntype{P}{>{\raggedleft\arraybackslash}X}",
        r"\begin{table*}[hb!]",
        r"\centering",
        r"\small",
        rf"\begin{{tabularx}}{{\textwidth}}{{ll{'P' * (len(algorithms) - 1)}r}}",
        r"\toprule",
        " & ".join(heads) + r" \\ ",
    ]
    for buffer in reversed(BUFFERS):
        lines.append(r"\midrule")
        for task in sorted(LOCOMOTION):
            cells = _cells(f"{task}-{buffer}-v2", means, errors, algorithms, home_made)
            lines.append(" & ".join([words[buffer], words[task], *cells]) + r" \\ ")
    average, notes = _average(words["Average"], means, algorithms, home_made)
    lines += [
        *average,
        r"\bottomrule",
        r"\end{tabularx}",
        r"\vspace{-.0cm}",
        r"\caption{",
        *notes,
        "}",
        r"\label{table:locomotion}",
        r"\end{table*}",
    ]
    return "\n".join(lines)


def _average(
    word: str, means: Scores, algorithms: Sequence[str], home_made: Collection[tuple[str, str]]
) -> tuple[list[str], list[str]]:
    """Returns the lines of the averages, and what has to be said of the table."""
    notes = [rf"${DAGGER}$: with this repository's home-made data, not D4RL's."] if home_made else []
    common = [dataset for dataset in DATASETS if all(dataset in means[name] for name in algorithms)]
    if not common:
        return [], [*notes, "No averages: there is no row that all have."]
    if len(common) < len(DATASETS):
        notes.append(f"Averages are over what all have: {', '.join(common)}.")
    marked = {name for name, dataset in home_made if dataset in common}
    averages = {name: float(np.round(np.mean([means[name][d] for d in common]), 1)) for name in algorithms}
    best = max((value for name, value in averages.items() if name not in marked), default=math.inf)
    cells = (f"${value}{DAGGER}$" if name in marked else _bold(value, best) for name, value in averages.items())
    return [r"\midrule", rf"\multicolumn{{2}}{{c}}{{\bf {word}}} & {' & '.join(cells)} \hspace{{.6cm}} \\ "], notes


def _head(name: str) -> str:
    return rf"\multicolumn{{1}}{{r}}{{\bf \color{{black}} {name}}}"


def _cells(
    dataset: str, means: Scores, errors: Scores, algorithms: Sequence[str], home_made: Collection[tuple[str, str]]
) -> Iterable[str]:
    comparable = [name for name in algorithms if dataset in means[name] and (name, dataset) not in home_made]
    best = max((means[name][dataset] for name in comparable), default=math.inf)
    for name in algorithms:
        mean, error = means[name].get(dataset), errors.get(name, {}).get(dataset)
        text = "-" if mean is None else _bold(mean, best) if name in comparable else f"{mean}{DAGGER}"
        yield f"${text}$" if error is None else rf"${text}$ \scriptsize{{\raisebox{{1pt}}{{$\pm {error}$}}}}"


def _bold(value: float, best: float) -> str:
    return rf"\textbf{{\color{{thighlight}}{value}}}" if value >= best * HIGHLIGHTED else str(value)


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
        logbase: the folder; or the CSV of an earlier figure, whose bars are returned.
        labels: "EXPERIMENT=TEXT", where EXPERIMENT is the name of a folder below plans; none: all, by their names.
        also: "TEXT:DATASET=MEAN,ERROR", scores from elsewhere.

    Raises:
        UserError: a text of another form, or nothing to draw.
    """
    if Path(logbase).suffix == ".csv":
        _, *table = csv.reader(line for line in read_bytes(logbase).decode().splitlines() if not line.startswith("#"))
        return [Bar(row[0], row[1], float(row[2]), float(row[3]), int(row[4])) for row in table]
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
    datasets, labels = (list(dict.fromkeys(names)) for names in zip(*(bar[:2] for bar in bars), strict=True))
    width = WIDTH / len(labels)

    def draw(figure: Any) -> None:
        panel = figure.subplots()
        for i, label in enumerate(labels):
            own = [bar for bar in bars if bar.label == label]
            x = np.array([datasets.index(bar.dataset) for bar in own]) + (i + 0.5) * width - WIDTH / 2
            look = {"color": COLOURS[i % len(COLOURS)], "label": label}
            panel.bar(x, [bar.mean for bar in own], 0.9 * width, yerr=[bar.error for bar in own], **look)
            for where, bar in zip(x, own, strict=True):
                panel.annotate(f"{bar.mean:.0f}", (where, bar.mean + bar.error), ha="center", va="bottom", fontsize=8)
        panel.set_xticks(range(len(datasets)), [task_title(dataset) for dataset in datasets])
        panel.tick_params(axis="x", length=0)
        panel.grid(False, axis="x")
        panel.set(ylabel="normalised score (0: random, 100: expert)", ylim=(min(0, panel.get_ylim()[0]), None))
        figure.legend(loc="outside right upper")

    caption = ["Mean of the episodes and its standard error (one model each, so not over trainings); the numbers of"]
    caption[0] += " episodes are in the CSV, 0 where they are not known."
    size = (3.6 + 0.45 * len(bars), 3.6)
    return write_figure(draw, size, picture_path(output), csv_text([Bar._fields, *bars], command), command, caption)
