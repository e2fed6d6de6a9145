"""Returns that DiffuserLite asks for, by task and by how far an episode has come (the authors' values)."""

from __future__ import annotations

import numpy as np

KITCHEN = {"kitchen-mixed": (0.3, 0.35, 0.4, 0.5), "kitchen-partial": (0.25, 0.35, 0.45, 0.5)}  # by tasks done


def kitchen_targets(task: str, returns: np.ndarray) -> np.ndarray:
    """[E] for the tasks done so far [E]; 1 where their number is none of 0 to 3."""
    table = next(v for k, v in KITCHEN.items() if task.startswith(k))
    targets = np.ones(len(returns), np.float32)
    for done, target in enumerate(table):
        targets[returns == done] = target
    return targets


def antmaze_targets(task: str, observations: np.ndarray, upstream_typo: bool = False) -> np.ndarray:
    """[E] by the position, the first two of the observations [E,O] in the environment's units.

    upstream_typo: the original looks for "large_diverse" and so asks for 1 everywhere in antmaze-large-diverse.
    """
    x, y = observations[:, 0], observations[:, 1]
    if "medium-play" in task:
        rules = [(x == x, 0.2), (y > 18, 0.8)]
    elif "medium-diverse" in task:
        rules = [(x == x, 0.2), (x > 10, 0.3), (y > 15, 0.8)]
    elif "large-play" in task:
        rules = [(x == x, 0.6), ((x >= 13) & (y < 28), 0.25), (x < 13, 0.1)]
    elif "large-diverse" in task and not upstream_typo:
        rules = [(x == x, 0.6), ((x >= 13) & (y < 28), 0.3), (x < 13, 0.25)]
    else:
        rules = []
    targets = np.ones(len(observations), np.float32)
    for where, target in rules:  # later ones win
        targets[where] = target
    return targets
