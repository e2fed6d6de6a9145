"""Pictures of ways through a maze."""

from __future__ import annotations

from pathlib import Path

import numpy as np

COLUMNS = 5


def save(path: Path, free: np.ndarray, ways: np.ndarray, goal: np.ndarray) -> None:
    """Draws ways [n,steps,2 or more] over the cells of a maze [rows, columns] (true: no wall), a picture for each.

    goal: [2] of all, or [n,2].

    Positions are drawn as in D4RL, where a cell's centre is 0.2 less than its number.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    columns = min(len(ways), COLUMNS)
    rows = -(-len(ways) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(4 * columns, 4 * rows), squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    goals = np.broadcast_to(goal, (len(ways), 2))
    for axis, way, goal in zip(axes.flat, ways, goals, strict=False):
        axis.imshow(np.where(free, 1.0, 0.5), cmap="gray", vmin=0, vmax=1)
        y, x = way[:, 0] + 0.2, way[:, 1] + 0.2
        axis.plot(x, y, color="black", linewidth=1, zorder=1)
        axis.scatter(x, y, c=np.linspace(0, 1, len(way)), cmap="jet", s=12, zorder=2)
        axis.plot(goal[1] + 0.2, goal[0] + 0.2, marker="*", color="gold", markeredgecolor="black", markersize=14)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, bbox_inches="tight", dpi=80)
    plt.close(figure)
