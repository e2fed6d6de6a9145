"""Normalisation of observations and actions with the bounds of a data set.

The formulas, their order of operations included, are those of the reference's environment wrappers, so that a policy
trained on one side sees the same numbers on the other. dtypes follow numpy's promotion: float64 observations with
float32 bounds give float64, float32 actions with float32 bounds stay float32.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from diffusion_rl.core.errors import UserError
from diffusion_rl.core.npz import read_npz

KEYS = ("obs_min", "obs_max", "action_min", "action_max")


@dataclass(frozen=True)
class MinMaxNormalizer:
    """Maps observations to about [-1, 1] and actions back from [-1, 1] to the data's range.

    obs_min, obs_max: [O]; action_min, action_max: [A]. Nothing is clipped: a value outside the data's range lies
    outside [-1, 1], and a feature that is constant in the data is divided by 1e-6.
    """

    obs_min: np.ndarray
    obs_max: np.ndarray
    action_min: np.ndarray
    action_max: np.ndarray

    @property
    def obs_dim(self) -> int:
        return self.obs_min.shape[0]

    @property
    def action_dim(self) -> int:
        return self.action_min.shape[0]

    def normalize_obs(self, obs: np.ndarray) -> np.ndarray:
        """[..., O] raw -> [..., O] normalised."""
        return 2 * ((obs - self.obs_min) / (self.obs_max - self.obs_min + 1e-6) - 0.5)

    def unnormalize_action(self, action: np.ndarray) -> np.ndarray:
        """[..., A] in [-1, 1] -> [..., A] in the units of the environment."""
        action = (action + 1) / 2
        return action * (self.action_max - self.action_min) + self.action_min

    def as_lists(self) -> dict[str, list[float]]:
        """The bounds as JSON values, for the metadata of a checkpoint."""
        return {key: np.asarray(getattr(self, key), dtype=np.float64).tolist() for key in KEYS}

    @classmethod
    def from_npz(cls, path: str | Path, obs_dim: int | None = None, action_dim: int | None = None) -> MinMaxNormalizer:
        """Read the bounds from `normalization.npz`; with obs_dim or action_dim given, hold the file to them.

        Raises UserError as `read_bounds` does.
        """
        return cls(**read_bounds(path, obs_dim, action_dim))


def read_bounds(path: str | Path, obs_dim: int | None = None, action_dim: int | None = None) -> dict[str, np.ndarray]:
    """The bounds in a `normalization.npz`, by their names in `KEYS`: finite vectors of these dimensions, none below its
    other end.

    Raises:
        UserError: the file is missing or unreadable, or it holds anything else.
    """
    cure = "put the data set's normalization.npz there, or set DPPO_DATA_DIR or normalization_path to where it is"
    bounds = read_npz(path, KEYS, f"no such file: {path} (the normalization file does not exist): {cure}")
    if missing := [key for key in KEYS if key not in bounds]:
        raise UserError(f"normalization file {path} lacks {', '.join(missing)}: it must hold {', '.join(KEYS)}")
    for kind, wanted in (("obs", obs_dim), ("action", action_dim)):
        _check_bounds(path, kind, bounds[f"{kind}_min"], bounds[f"{kind}_max"], wanted)
    return {key: bounds[key] for key in KEYS}


def _check_bounds(path: str | Path, kind: str, low: np.ndarray, high: np.ndarray, wanted: int | None) -> None:
    for key, bound in ((f"{kind}_min", low), (f"{kind}_max", high)):
        if bound.ndim != 1 or not len(bound):
            raise UserError(f"normalization file {path}: {key} must be a vector, it has shape {bound.shape}")
        if wanted is not None and bound.shape != (wanted,):
            raise UserError(
                f"normalization file {path} is for {kind}_dim={len(bound)}, but {kind}_dim={wanted} is wanted here: "
                f"take the file of this task or set {kind}_dim={len(bound)}"
            )
        if not np.isfinite(bound).all():
            raise UserError(f"normalization file {path}: {key} holds NaN or infinity; make it anew")
    if low.shape != high.shape:
        raise UserError(f"normalization file {path}: {kind}_min and {kind}_max differ in length")
    if (low > high).any():
        worst = int(np.argmax(low > high))
        raise UserError(f"normalization file {path}: {kind}_min exceeds {kind}_max in dimension {worst}; make it anew")
