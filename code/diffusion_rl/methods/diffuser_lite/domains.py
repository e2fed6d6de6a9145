"""What DiffuserLite's authors fixed for their three domains beyond the configuration files.

Shape letters: E environments, O observation.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from diffusion_rl.core.errors import UserError
from diffusion_rl.tasks.registry import task_named

Targets = Callable[[np.ndarray, np.ndarray], np.ndarray]  # (observations [E,O], returns so far [E]) -> [E]


@dataclass(frozen=True)
class Domain:
    """A kind of task.

    Attributes:
        horizons: states of the levels.
        steps: denoising steps of the models R1 (the diffusion backbone takes these, too) and R2.
        best_return: beyond which nothing counts.
        judged: which state of a candidate is judged by its value; None: there are no values and no candidates.
        guidance: of each level; None: that of the task.
        learned_reward: reward of the data -> reward that values are learned of.
    """

    horizons: tuple[int, ...]
    steps: tuple[int, int]
    best_return: float = np.inf
    judged: int | None = None
    guidance: tuple[float, ...] | None = None
    learned_reward: Callable[[np.ndarray], np.ndarray] = lambda reward: reward

    @property
    def has_values(self) -> bool:
        """Returns whether plans are judged by learned values."""
        return self.judged is not None

    def steps_of(self, model: str) -> int:
        """Returns denoising steps of "R1" or "R2"."""
        return self.steps[model == "R2"]


DOMAINS = {
    "mujoco": Domain((5, 5, 9), (3, 1)),
    "kitchen": Domain((4, 5, 5), (5, 2), 4.0, -1, (1.0, 1.0, 1.0), lambda reward: reward / np.float32(4)),
    "antmaze": Domain((5, 5, 9), (5, 2), 1.0, 1, (1.0, 0.0, 0.0), lambda reward: reward - np.float32(1)),
}


def return_scale(name: str) -> float:
    """Returns what the returns of a data set are divided by. Raises UserError where no scale is known."""
    task = task_named(name)
    for beginning, scale in (task.return_scales if task else {}).items():
        if name.startswith(beginning):
            return float(scale)
    raise UserError(f"no scale of returns is known for {name}: set task.return_scale=<a typical good return>")


KITCHEN = {"kitchen-mixed": (0.3, 0.35, 0.4, 0.5), "kitchen-partial": (0.25, 0.35, 0.45, 0.5)}  # by tasks done


def kitchen_targets(task: str, returns: np.ndarray) -> np.ndarray:
    """Returns to ask for [E], by the tasks done so far [E]; 1 where their number is none of 0 to 3."""
    table = next(v for k, v in KITCHEN.items() if task.startswith(k))
    targets = np.ones(len(returns), np.float32)
    for done, target in enumerate(table):
        targets[returns == done] = target
    return targets


def antmaze_targets(task: str, observations: np.ndarray, upstream_typo: bool = False) -> np.ndarray:
    """Returns to ask for [E], by the position, the first two of the observations [E,O] in the environment's units.

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
