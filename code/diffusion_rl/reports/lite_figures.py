"""DiffuserLite's figures: losses by gradient step, and scores of a sweep over checkpoints."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from diffusion_rl.core.errors import UserError

Points = Sequence[tuple[int, float]]  # (gradient step, value)
DPI = 150
FIGURES = "figures"


def read_rows(path: str | Path) -> list[dict[str, Any]]:
    """The rows of a loss log or of the results of a sweep."""
    try:
        rows = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: {error}; a JSON list of rows is needed") from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise UserError(f"{path} is no list of rows")
    return rows


def by_name(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[tuple[int, float]]]:
    """{name: [(gradient step, value), …]} of every number in the rows but the step itself."""
    found: dict[str, list[tuple[int, float]]] = {}
    for row in sorted(rows, key=lambda row: row.get("gradient_steps", 0)):
        for name, value in row.items():
            if name != "gradient_steps" and isinstance(value, int | float):
                found.setdefault(name, []).append((int(row["gradient_steps"]), float(value)))
    return found


def plot_loss_curves(loss_data: Mapping[str, Points], save_dir: str | Path) -> list[Path]:
    """`loss_curve.png` of the levels' losses and `invdyn_loss_curve.png`; what there is nothing of is left out.

    Args:
        loss_data: {"loss0": [(step, loss), …], …, "invdyn_loss": …}.
    """
    levels = {name: points for name, points in loss_data.items() if name.startswith("loss") and points}
    inverse = {name: points for name, points in loss_data.items() if name == "invdyn_loss" and points}
    drawn = []
    for name, curves, colour, title in (
        ("loss_curve.png", levels, None, "Diffusion Model Training Loss"),
        ("invdyn_loss_curve.png", inverse, "orange", "Inverse Dynamics Model Training Loss"),
    ):
        if curves:
            drawn.append(_draw(Path(save_dir) / name, curves, title, "Loss", colour))
    return drawn


def score_points(rows: Sequence[Mapping[str, Any]]) -> list[tuple[int, float, float]]:
    """(step, score, standard error) of a sweep's numbered checkpoints."""
    numbered = (row for row in rows if isinstance(row.get("checkpoint"), int))
    found = sorted((row["checkpoint"], row["score"], row["standard_error"]) for row in numbered)
    if not found:
        raise UserError("no numbered checkpoint among the results: run mode=inference diffusion_ckpt=all")
    return found


def plot_scores(points: Sequence[tuple[int, float, float]], save_dir: str | Path) -> Path:
    """`normalized_score.png`: mean and standard error (score, error) by training step."""
    curve = {"normalized score": [(step, mean) for step, mean, _ in points]}
    errors = [error for _, _, error in points]
    return _draw(Path(save_dir) / "normalized_score.png", curve, "Normalized Score", "Score", None, errors)


def _draw(
    path: Path,
    curves: Mapping[str, Points],
    title: str,
    label: str,
    colour: str | None,
    errors: Sequence[float] | None = None,
) -> Path:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 6))
    panel = figure.subplots()
    for name, points in curves.items():
        steps, values = zip(*points, strict=True)
        marker = "." if len(points) == 1 else None
        if errors is None:
            panel.plot(steps, values, label=name, color=colour, marker=marker)
        else:
            panel.errorbar(steps, values, errors, label=name, capsize=3, marker="o")
    panel.set(xlabel="Gradient Steps", ylabel=label, title=title)
    panel.legend()
    panel.grid(True)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.writing")
    figure.savefig(temporary, dpi=DPI, bbox_inches="tight", format="png")
    os.replace(temporary, path)
    return path


def organize_figures(results: str | Path = "results") -> list[Path]:
    """Move pictures that lie about in a results folder into its `figures/`; one whose name is taken gets a number.

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
