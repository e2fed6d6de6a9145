"""Small environments for the tests; worker processes import this module, which registers them."""

from __future__ import annotations

import os
import sys
from typing import Any

import gymnasium
import numpy as np


class Counter(gymnasium.Env):
    """Observation [step of the episode, first draw of the episode]; reward 1; terminates at `length` if given.

    An action above 1.5 raises, above 2.5 kills the process, below -1.5 raises if TensorFlow is imported;
    options["note"] is remembered in the second entry.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 20}

    def __init__(self, length: int | None = None, render_mode: str | None = None):
        self.observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (2,))
        self.action_space = gymnasium.spaces.Box(-3.0, 3.0, (1,))
        self.length = length
        self.render_mode = render_mode

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self.step_number = 0
        self.mark = (options or {}).get("note", self.np_random.random())
        return self._observe(), {}

    def _observe(self) -> np.ndarray:
        return np.array([self.step_number, self.mark])

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        if action[0] > 2.5:
            os._exit(7)
        if action[0] > 1.5:
            raise RuntimeError("the gripper fell off")
        if action[0] < -1.5 and "tensorflow" in sys.modules:
            raise RuntimeError("a worker has imported TensorFlow")
        self.step_number += 1
        return self._observe(), 1.0, self.step_number == self.length, False, {}

    def render(self) -> np.ndarray:
        return np.full((32, 32, 3), self.step_number, dtype=np.uint8)


gymnasium.register("Counter-v0", entry_point=Counter)
