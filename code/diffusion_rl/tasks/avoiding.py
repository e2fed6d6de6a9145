"""The places of D3IL's avoiding task (Jia et al. 2024, arXiv:2402.14606), and the ways that paths take.

The end effector starts below, between two sides (y = -0.28), and is to cross a line above (y > 0.4), past three rows of
cylinders. Which gap of each row it takes is its mode, numbered through: row 1 has 0 (left of the obstacle, smaller x)
and 1, row 2 has 2 to 4, row 3 has 5 to 8. Metres throughout.
"""

from __future__ import annotations

import numpy as np

#: x, y, radius, half the height of each cylinder; they stand in z = 0.
OBSTACLES = np.array(
    [
        [0.5, -0.1, 0.03, 0.07],
        [0.425, 0.08, 0.025, 0.1],
        [0.575, 0.08, 0.025, 0.1],
        [0.35, 0.26, 0.025, 0.1],
        [0.5, 0.26, 0.025, 0.1],
        [0.65, 0.26, 0.025, 0.1],
    ]
)
ROD_RADIUS = 0.01
FINISH_Y = 0.35  # where the line is drawn
GOAL_Y = 0.4  # what has to be crossed
X_RANGE = (0.2, 0.8)  # outside is a penalty

#: y of each row, x of the borders between its gaps, number of its first mode.
ROWS = ((-0.1, (0.5,), 0), (0.08, (0.425, 0.575), 2), (0.26, (0.35, 0.5, 0.65), 5))
TOLERANCE = 0.03
NOT_PASSED = -1


def new_modes(n: int) -> np.ndarray:
    """Returns the modes [n,3] of paths that have not passed any row."""
    return np.full((n, len(ROWS)), NOT_PASSED)


def pass_rows(modes: np.ndarray, positions: np.ndarray, tolerance: float = TOLERANCE) -> None:
    """Enters into modes [N,3], in place, the gaps in which positions [N,2] are, of rows not passed before.

    A position this near to the first two rows counts as passing them; the third row is passed from its y on.
    """
    x, y = positions[:, 0], positions[:, 1]
    for row, (row_y, borders, first) in enumerate(ROWS):
        near = y >= row_y if row == len(ROWS) - 1 else np.abs(y - row_y) <= tolerance
        passing = near & (modes[:, row] == NOT_PASSED)
        modes[passing, row] = first + np.searchsorted(borders, x[passing])


def modes_of(path: np.ndarray, tolerance: float = TOLERANCE) -> tuple[int, ...]:
    """Returns the gaps that a path [T,2] took, `NOT_PASSED` for rows that it did not reach."""
    modes = new_modes(1)
    for position in path:
        pass_rows(modes, position[None], tolerance)
    return tuple(int(mode) for mode in modes[0])


def clearance(path: np.ndarray) -> np.ndarray:
    """Returns the distance [T] between rod and nearest obstacle at positions [T,2]; contact is at 0 and below."""
    distance = np.linalg.norm(path[:, None] - OBSTACLES[None, :, :2], axis=-1)
    return (distance - OBSTACLES[:, 2]).min(axis=1) - ROD_RADIUS
