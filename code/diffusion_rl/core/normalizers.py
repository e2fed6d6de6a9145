"""Normalisation of observations and actions with the bounds of a data set.

The formulas, their order of operations included, are those of the reference's environment wrappers, so that a policy
trained on one side sees the same numbers on the other. dtypes follow numpy's promotion: float64 observations with
float32 bounds give float64, float32 actions with float32 bounds stay float32.
"""

from __future__ import annotations

import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from diffusion_rl.core.errors import UserError

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

        Raises UserError for a missing or unreadable file, a missing key, or bounds of another dimension.
        """
        path = Path(path)
        if not path.is_file():
            raise UserError(
                f"normalization file {path} does not exist: put the data set's normalization.npz there, "
                "or set DPPO_DATA_DIR or normalization_path to where it is"
            )
        try:
            with np.load(path, allow_pickle=False) as archive:
                missing = [key for key in KEYS if key not in archive.files]
                arrays = {key: archive[key] for key in KEYS if key not in missing}
        except (ValueError, OSError, EOFError, zipfile.BadZipFile, AttributeError) as error:
            raise UserError(f"normalization file {path} cannot be read ({error}); make it anew") from error
        if missing:
            raise UserError(f"normalization file {path} lacks {', '.join(missing)}: it must hold {', '.join(KEYS)}")
        normalizer = cls(**arrays)
        normalizer._check(path, obs_dim, action_dim)
        return normalizer

    def _check(self, path: Path, obs_dim: int | None, action_dim: int | None) -> None:
        for kind, wanted in (("obs", obs_dim), ("action", action_dim)):
            for bound in ("min", "max"):
                shape = getattr(self, f"{kind}_{bound}").shape
                if len(shape) != 1:
                    raise UserError(f"normalization file {path}: {kind}_{bound} must be a vector, it has shape {shape}")
                if wanted is not None and shape != (wanted,):
                    raise UserError(
                        f"normalization file {path} is for {kind}_dim={shape[0]}, the config says {kind}_dim={wanted}: "
                        f"take the file of this task or set {kind}_dim={shape[0]}"
                    )
            if getattr(self, f"{kind}_min").shape != getattr(self, f"{kind}_max").shape:
                raise UserError(f"normalization file {path}: {kind}_min and {kind}_max differ in length")
