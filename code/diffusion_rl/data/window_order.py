"""The order in which training goes through the windows of a data set."""

from __future__ import annotations

from typing import Any

import numpy as np


class WindowOrder:
    """Goes through the windows of a data set in random order, again and again; the last batch of a pass is smaller."""

    def __init__(self, count: int, size: int, noise: Any):
        self.count, self.size, self.noise = count, size, noise
        self.order, self.position = np.arange(0), 0

    def __next__(self) -> np.ndarray:
        if self.position >= len(self.order):
            self.order, self.position = self.noise.permutation(self.count), 0
        items = self.order[self.position : self.position + self.size]
        self.position += self.size
        return items
