"""What figures are made of: runs and the tables of earlier figures, the papers' names, groups of seeds, curves."""

from __future__ import annotations

import csv
import functools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from diffusion_rl.config.declared import declaring
from diffusion_rl.config.yaml_files import read_yaml
from diffusion_rl.core.errors import UserError
from diffusion_rl.core.files import read_bytes
from diffusion_rl.core.noise import NoiseSource
from diffusion_rl.reports import published
from diffusion_rl.reports.metrics import STEP_KEYS, Row, read_rows, step_of
from diffusion_rl.reports.style import csv_text

KINDS = ("eval", "train")
MIN_SEEDS_FOR_INTERVAL = 3
RESAMPLES = 2000
METHODS = ("diffusion_rl.methods.on_policy", "diffusion_rl.methods.off_policy")
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
# Two-sided 95% quantiles of Student's t for 1 to 20 degrees of freedom.
STUDENT_T = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
)


Estimate = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray, np.ndarray]]


@dataclass
class Run:
    """One run folder: what it is, and its rows."""

    folder: Path
    name: str
    task: str
    seed: str
    rows: list[Row]
    algorithm: str = ""  # the class of its model


@dataclass
class Curve:
    """One quantity of one group of runs: values [seeds, points], NaN where a seed has no point.

    estimate: values -> centre, low, high [points]; the centre is called `mean`, whatever it is.
    """

    label: str
    task: str
    kind: str
    seeds: list[str]
    itr: np.ndarray
    x: np.ndarray
    values: np.ndarray
    estimate: Estimate
    mean: np.ndarray = field(init=False)
    low: np.ndarray = field(init=False)
    high: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        self.mean, self.low, self.high = self.estimate(self.values)


def mean_and_interval(values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns the mean over seeds and the 95% interval of that mean, from Student's t.

    values [seeds, points], NaN where missing; mean, low, high [points]. Where there are fewer than two values, low
    and high are NaN.
    """
    count = np.sum(~np.isnan(values), axis=0)
    mean = np.nansum(values, axis=0) / count
    squares = np.nansum((values - mean) ** 2, axis=0)
    with np.errstate(divide="ignore", invalid="ignore"):
        half = np.array([student_t(n - 1) for n in count]) * np.sqrt(squares / (count - 1) / count)
    half = np.where(count >= 2, half, np.nan)
    return mean, mean - half, mean + half


def student_t(degrees: int) -> float:
    """Returns the two-sided 95% quantile of Student's t (within 0.005 above 20 degrees of freedom)."""
    if degrees < 1:
        return float("nan")
    return STUDENT_T[degrees - 1] if degrees <= len(STUDENT_T) else 1.96 + 2.5 / degrees


def iqm_and_interval(values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns the interquartile mean over seeds and its 95% interval: percentiles of a bootstrap that resamples seeds.

    values [seeds, points], NaN where missing; iqm, low, high [points]. Low and high are NaN where there are fewer
    than three seeds. The resamples are the same in every call (Agarwal et al. 2021, arXiv:2108.13264).
    """
    result = np.full((3, values.shape[1]), np.nan)
    present = ~np.isnan(values)
    for seeds in np.unique(present.T, axis=0):  # points at which the same seeds have a value
        here, count = np.flatnonzero((seeds == present.T).all(axis=1)), int(seeds.sum())
        scores = values[seeds][:, here]
        result[0, here] = _iqm(scores)
        if count >= MIN_SEEDS_FOR_INTERVAL:
            drawn = NoiseSource(0).integers(0, count, (count, RESAMPLES))
            result[1:, here] = np.percentile(_iqm(scores[drawn]), (2.5, 97.5), axis=0)
    return result[0], result[1], result[2]


def _iqm(scores: np.ndarray) -> np.ndarray:
    """Returns the mean over the first axis without its lowest and highest quarter."""
    cut = len(scores) // 4
    return np.sort(scores, axis=0)[cut : len(scores) - cut].mean(axis=0)


def read_run(folder: str | Path) -> Run:
    """Reads `config.yaml` (name, env_name, seed) and `metrics.jsonl` of a run folder."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such run folder")
    metrics = folder / "metrics.jsonl"
    if not metrics.exists():
        raise UserError(
            f"{folder}: no metrics.jsonl in it; give the folder of one run, log/<suite>/<name>/<date>_<seed>"
        )
    config = _read_config(folder / "config.yaml")
    where = folder.resolve()
    return Run(
        folder=folder,
        name=str(config.get("name") or where.parent.name),
        task=str(config.get("env_name") or config.get("env") or ""),
        seed=str(config.get("seed", where.name.rsplit("_", 1)[-1])),
        rows=read_rows(metrics),
        algorithm=_class_of(config.get("model")),
    )


def read_runs(path: str | Path) -> list[Run]:
    """Reads a run folder, or the runs of an earlier figure from its table (CSV)."""
    return _read_table(Path(path)) if Path(path).suffix == ".csv" else [read_run(path)]


def _read_table(path: Path) -> list[Run]:
    """Returns a run for each label, task and seed in a table that `curves_csv` wrote."""
    lines = read_bytes(path).decode().splitlines()
    columns, *rows = csv.reader(line for line in lines if not line.startswith("#"))
    if columns[:4] != ["task", "label", "kind", "itr"] or len(columns) < 9:
        raise UserError(f"{path} is no table of curves: give the CSV of a learning curve or comparison, or run folders")
    heading = lines[0].removeprefix("# ").split(" against ")[0].split(" or ")
    runs: dict[tuple[str, str, str], Run] = {}
    for row in (row for row in rows if row[2] in KINDS):
        task, label, kind, itr, x = row[:5]
        y = heading[0] if len(heading) == 1 else published.metric_of(task_of(task))
        for column, value in zip(columns[9:], row[9:], strict=False):
            if value:
                seed = column.removeprefix("seed_")
                run = runs.setdefault((task, label, seed), Run(path, label, task, seed, []))
                run.rows.append({"itr": int(itr), "kind": kind, columns[4]: float(x), y: float(value)})
    return list(runs.values())


def _class_of(described: Any) -> str:
    return str(described.get("_target_", "")).rpartition(".")[2] if isinstance(described, dict) else ""


def _read_config(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    config = read_yaml(path)
    return config if isinstance(config, dict) else {}


def run_labels(runs: Sequence[Run], labels: Sequence[str]) -> list[str]:
    """Returns the label of each run from one for each run, or one for each name."""
    names = list(dict.fromkeys(run.name for run in runs))
    if len(labels) == len(runs):
        return list(labels)
    if len(labels) == len(names):
        return [labels[names.index(run.name)] for run in runs]
    raise UserError(f"{len(labels)} labels for {len(runs)} runs with {len(names)} names: give one for each of either")


def group_runs(runs: Sequence[Run], labels: Sequence[str] | None) -> dict[tuple[str, str], list[Run]]:
    """Groups runs by (label, task). Without labels: by name. With one label a run: by label. With one a name:
    renamed."""
    groups: dict[tuple[str, str], list[Run]] = {}
    for key, run in zip(run_labels(runs, labels or [run.name for run in runs]), runs, strict=True):
        groups.setdefault((key, run.task), []).append(run)
    return groups


def curve_of(
    label: str, runs: Sequence[Run], kind: str, x: str, y: str, estimate: Estimate = mean_and_interval
) -> Curve | None:
    """Returns the points of `kind` of a group of runs, lined up by iteration; None if there are none."""
    points = [_points(run, kind, x, y) for run in runs]
    itrs = sorted(set().union(*points))
    if not itrs:
        return None
    values = np.array([[seed.get(itr, (np.nan, np.nan))[1] for itr in itrs] for seed in points])
    xs = np.array([[seed.get(itr, (np.nan, np.nan))[0] for itr in itrs] for seed in points])
    # Seeds of one experiment are at the same number of steps in the same iteration; if not, their mean is drawn.
    x_mean = np.nanmean(xs, axis=0)
    order = np.argsort(x_mean, kind="stable")  # a seed that ends early must not turn the line back
    return Curve(
        label, runs[0].task, kind, _seed_names(runs), np.array(itrs)[order], x_mean[order], values[:, order], estimate
    )


def _seed_names(runs: Sequence[Run]) -> list[str]:
    """Returns the seeds; a seed that was run more than once is numbered: 42, 42 (2)."""
    seeds = [run.seed for run in runs]
    earlier = [seeds[:i].count(seed) for i, seed in enumerate(seeds)]
    return [f"{seed} ({count + 1})" if count else seed for seed, count in zip(seeds, earlier, strict=True)]


def _points(run: Run, kind: str, x: str, y: str) -> dict[int, tuple[float, float]]:
    points = {}
    for row in run.rows:
        itr = step_of(row)
        where, value = row.get(x), row.get(y)
        if itr is None or where is None or value is None or row.get("kind", "train") != kind:
            continue
        points[itr] = (float(where), float(value))
    return points


def default_columns(runs: Sequence[Run], x: str | None, y: str | None) -> tuple[str, str]:
    """Returns the columns to draw: those given, else what the metrics of the runs hold."""
    rows = [row for run in runs for row in run.rows]

    def is_there(key: str) -> bool:
        return any(row.get(key) is not None for row in rows)

    y = y or ("loss" if is_there("loss") and not is_there("episode_return") else "episode_return")
    steps = next((key for key in STEP_KEYS if is_there(key)), STEP_KEYS[0])
    acted = not rows or any(row.get("env_steps") for row in rows)
    return x or ("env_steps" if acted else steps), y


def curves_csv(curves: Sequence[Curve], x: str, heading: str, command: str, centre: str = "mean") -> str:
    """Returns one line a point: centre and interval over seeds, then the value of each seed."""
    seeds = list(dict.fromkeys(seed for curve in curves for seed in curve.seeds))
    columns = ["task", "label", "kind", "itr", x, "n_seeds", centre, "low", "high", *(f"seed_{s}" for s in seeds)]
    rows: list[Sequence[Any]] = [columns]
    for curve in curves:
        for point in range(len(curve.itr)):
            column = dict(zip(curve.seeds, curve.values[:, point], strict=True))
            rows.append(
                [curve.task, curve.label, curve.kind, curve.itr[point], f"{curve.x[point]:.10g}"]
                + [int(np.sum(~np.isnan(curve.values[:, point])))]
                + [_number(value) for value in (curve.mean[point], curve.low[point], curve.high[point])]
                + [_number(column.get(seed, np.nan)) for seed in seeds]
            )
    return csv_text(rows, command, heading)


def _number(value: float) -> str:
    return "" if np.isnan(value) else f"{value:.6g}"


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
    labels = [declaring(package, "LABEL") for package in METHODS]
    return {path.rpartition(".")[2]: label for by_path in labels for path, label in by_path.items()}


def _algorithm_of(run: Run) -> str:
    name, _, variant = _short_name(run).partition(",")
    if run.algorithm in class_labels():
        return f"{class_labels()[run.algorithm]} {variant}".strip()
    if stages := re.search(r"models\.\w+-online_(True|False)$", name):  # VAE + Diffusion RL's usual name of a job
        return "latent diffusion, offline" + (", then online" if stages[1] == "True" else "")
    for word, algorithm in NAMES.items():
        if re.match(rf"{word}(_mlp|_unet|_img|_ta\d|$)", name):
            return f"{algorithm} {variant}".strip()
    return _short_name(run)
