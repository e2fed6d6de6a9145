"""DiffuserLite's figures: losses by gradient step, and scores of a sweep over checkpoints; a CSV beside each."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from diffusion_rl.core.errors import UserError
from diffusion_rl.core.files import read_json
from diffusion_rl.reports.style import COLOURS, MARKERS, csv_text, legend_below, style_axes, write_figure

Points = Sequence[tuple[int, float]]  # (gradient step, value)
#: What the levels' losses are called, from the coarse plan to the fine one.
LEGEND = {"loss0": "level 1, the coarsest", "loss1": "level 2", "loss2": "level 3, the finest"}
LEGEND |= {"R1": "R1, the diffusion", "R2": "R2, after the reflow"}
STEPS_OF = {"R1": "gradient steps of the training", "R2": "gradient steps of the reflow"}
FIGURES = "figures"
LOSSES = {"gradient_steps": int}  # what rows must hold
SCORES = {"checkpoint": (int, str), "score": (int, float), "standard_error": (int, float)}


def read_rows(path: str | Path, needed: Mapping[str, type | tuple[type, ...]]) -> list[dict[str, Any]]:
    """Reads the rows of a loss log or of the results of a sweep. needed: what each row must hold."""
    rows = read_json(path)
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise UserError(f"{path} is no JSON list of rows")
    for row in rows:
        for key, kinds in needed.items():
            if not isinstance(row.get(key), kinds) or isinstance(row[key], bool):
                raise UserError(f"{path}: a row has no proper {key}")
    return rows


def by_name(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[tuple[int, float]]]:
    """Returns {name: [(gradient step, value), …]} of every number in the rows but the step itself."""
    curves: dict[str, list[tuple[int, float]]] = {}
    for row in sorted(rows, key=lambda row: row.get("gradient_steps", 0)):
        for name, value in row.items():
            if name != "gradient_steps" and isinstance(value, int | float):
                curves.setdefault(name, []).append((int(row["gradient_steps"]), float(value)))
    return curves


def plot_loss_curves(loss_data: Mapping[str, Points], save_dir: str | Path, command: str = "") -> list[Path]:
    """Draws `loss_curve.png` of the levels' losses and `invdyn_loss_curve.png`; what there is nothing of is left out.

    Args:
        loss_data: {"loss0": [(step, loss), …], …, "invdyn_loss": …}.
        command: that drew it, for the files to name.
    """
    levels = {name: points for name, points in loss_data.items() if name.startswith("loss") and points}
    inverse = {name: points for name, points in loss_data.items() if name == "invdyn_loss" and points}
    drawn = []
    for name, curves, title in (
        ("loss_curve.png", levels, "Diffusion Model Training Loss"),
        ("invdyn_loss_curve.png", inverse, "Inverse Dynamics Model Training Loss"),
    ):
        if curves:
            drawn.append(_draw(Path(save_dir) / name, {"gradient steps": curves}, title, "loss", command=command))
    return drawn


def score_points(rows: Sequence[Mapping[str, Any]]) -> list[tuple[int, float, float]]:
    """Returns (step, score, standard error) of a sweep's numbered checkpoints."""
    numbered = (row for row in rows if isinstance(row.get("checkpoint"), int))
    points = sorted((row["checkpoint"], row["score"], row["standard_error"]) for row in numbered)
    if not points:
        raise UserError("no numbered checkpoint among the results: run mode=inference diffusion_ckpt=all")
    return points


def plot_scores(rows: Sequence[Mapping[str, Any]], save_dir: str | Path, command: str = "") -> Path:
    """Draws `normalized_score.png` of sweeps' rows: mean and standard error by training step, a curve for each
    model."""
    points = {
        model: score_points([row for row in rows if row["test_model"] == model])
        for model in sorted({row["test_model"] for row in rows})
    }
    panels = {STEPS_OF[model]: {model: [(step, mean) for step, mean, _ in scores]} for model, scores in points.items()}
    errors = {model: [error for _, _, error in scores] for model, scores in points.items()}
    return _draw(
        Path(save_dir) / "normalized_score.png", panels, "Normalized Score", "normalised score", errors, command
    )


def _draw(
    path: Path,
    panels: Mapping[str, Mapping[str, Points]],
    title: str,
    y: str,
    errors: Mapping[str, Sequence[float]] | None = None,
    command: str = "",
) -> Path:
    """Draws {what the steps are of: {name of a curve: points}}, a panel for each."""
    curves = {name: points for inner in panels.values() for name, points in inner.items()}

    def draw(figure: Any) -> None:
        axes = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
        looks = iter(zip(COLOURS, MARKERS, strict=False))
        for panel, (x, inner) in zip(axes, panels.items(), strict=True):
            for name, points in inner.items():
                steps, values = zip(*points, strict=True)
                colour, marker = next(looks)
                few = marker if errors is not None or len(points) == 1 else None
                spread = None if errors is None else errors[name]
                panel.errorbar(steps, values, spread, label=LEGEND.get(name, name), color=colour, marker=few)
            style_axes(panel, "gradient_steps", y)
            panel.set_xlabel(x)
            panel.label_outer()
        figure.suptitle(title)
        if len(curves) > 1:
            legend_below(figure, [handle for panel in axes for handle in panel.get_legend_handles_labels()[0]])

    rows: list[list[Any]] = [["curve", "gradient_steps", "value", *(["standard_error"] if errors is not None else [])]]
    for name, points in curves.items():
        extra = [[]] * len(points) if errors is None else [[error] for error in errors[name]]
        rows += [[name, *point, *more] for point, more in zip(points, extra, strict=True)]
    caption = [f"{title}, one training" + ("; bars: standard error of the mean over episodes." if errors else ".")]
    return write_figure(draw, (1.4 + 4.2 * len(panels), 3.8), path, csv_text(rows, command), command, caption)


def organize_figures(results: str | Path = "results") -> list[Path]:
    """Moves pictures that lie about in a results folder into its `figures/`; one whose name is taken gets a number.

    Returns:
        where they are now. Pictures that are there already stay, and are not returned.
    """
    folder, moved = Path(results) / FIGURES, []
    for path in sorted(Path(results).rglob("*.png")):
        if folder in path.parents:
            continue
        folder.mkdir(parents=True, exist_ok=True)
        target, number = folder / path.name, 1
        while target.exists():
            target, number = folder / f"{path.stem}_{number}{path.suffix}", number + 1
        shutil.move(path, target)
        moved.append(target)
    return moved
