"""D4RL's normalised scores."""

from __future__ import annotations

from typing import Any

import numpy as np

# D4RL's returns of a random and of an expert policy: a normalised score is 0 for the first and 1 for the second.
REFERENCE_RETURNS = {
    "hopper": (-20.272305, 3234.3),
    "halfcheetah": (-280.178953, 12135.0),
    "walker2d": (1.629008, 4592.3),
    "maze2d-umaze": (23.85, 161.86),
    "maze2d-medium": (13.13, 277.39),
    "maze2d-large": (6.7, 273.99),
    "kitchen": (0.0, 4.0),
    "antmaze": (0.0, 1.0),
}


def normalized_score(dataset: str, episode_return: float | np.ndarray) -> Any:
    """Scores a return (or returns [N]) as D4RL does, 0 to 1; not a number without a reference for the data set."""
    low, high = next((v for k, v in REFERENCE_RETURNS.items() if dataset.startswith(k)), (np.nan, np.nan))
    return (episode_return - low) / (high - low)
