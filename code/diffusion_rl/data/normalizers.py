"""Normalisation of observations and actions: how networks see them, and back.

`MinMaxNormalizer` has the bounds of a data set, for policies; planners fit a normalizer on each field of their data.

The formulas of `MinMaxNormalizer`, their order of operations included, are those of the reference's environment
wrappers, so that a policy trained on one side sees the same numbers on the other. dtypes follow numpy's promotion:
float64 observations with float32 bounds give float64, float32 actions with float32 bounds stay float32.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from diffusion_rl.core.errors import UserError
from diffusion_rl.core.npz import read_npz
from diffusion_rl.data.assets import resolve

Arrays = dict[str, np.ndarray]

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
        """Maps raw observations [...,O] to normalised ones."""
        return 2 * ((obs - self.obs_min) / (self.obs_max - self.obs_min + 1e-6) - 0.5)

    def unnormalize_action(self, action: np.ndarray) -> np.ndarray:
        """Maps actions [...,A] in [-1, 1] to the environment's units."""
        action = (action + 1) / 2
        return action * (self.action_max - self.action_min) + self.action_min

    def as_lists(self) -> dict[str, list[float]]:
        """Returns the bounds as JSON values, for the metadata of a checkpoint."""
        return {key: np.asarray(getattr(self, key), dtype=np.float64).tolist() for key in KEYS}

    @classmethod
    def fit(cls, observations: np.ndarray, actions: np.ndarray) -> MinMaxNormalizer:
        """Takes the bounds of observations [N,O] and actions [N,A], in their dtypes."""
        return cls(observations.min(axis=0), observations.max(axis=0), actions.min(axis=0), actions.max(axis=0))

    @classmethod
    def unit(cls, obs_dim: int, action_dim: int) -> MinMaxNormalizer:
        """Takes what is in [-1, 1] as it is, but for the 1e-6 in the formula."""
        one = np.ones(obs_dim, np.float32), np.ones(action_dim, np.float32)
        return cls(-one[0], one[0], -one[1], one[1])

    @classmethod
    def from_npz(cls, path: str | Path, obs_dim: int | None = None, action_dim: int | None = None) -> MinMaxNormalizer:
        """Reads the bounds from `normalization.npz`.

        Raises UserError as `read_bounds` does.
        """
        return cls(**read_bounds(path, obs_dim, action_dim))


def read_bounds(path: str | Path, obs_dim: int | None = None, action_dim: int | None = None) -> dict[str, np.ndarray]:
    """Reads the bounds of a `normalization.npz` by their names in `KEYS`: finite vectors, none below its other end.

    Args:
        obs_dim, action_dim: sizes that they must have; None: any.

    Raises:
        UserError: the file is missing or unreadable, or it holds anything else.
    """
    bounds = read_npz(resolve(path), KEYS)
    if missing := [key for key in KEYS if key not in bounds]:
        raise UserError(f"normalization file {path} lacks {', '.join(missing)}: it must hold {', '.join(KEYS)}")
    for kind, dim in (("obs", obs_dim), ("action", action_dim)):
        _check_bounds(path, kind, bounds[f"{kind}_min"], bounds[f"{kind}_max"], dim)
    return {key: bounds[key] for key in KEYS}


def _check_bounds(path: str | Path, kind: str, low: np.ndarray, high: np.ndarray, dim: int | None) -> None:
    for key, bound in ((f"{kind}_min", low), (f"{kind}_max", high)):
        if bound.ndim != 1 or not len(bound):
            raise UserError(f"normalization file {path}: {key} must be a vector, it has shape {bound.shape}")
        if dim is not None and bound.shape != (dim,):
            raise UserError(
                f"normalization file {path} is for {kind}_dim={len(bound)}, but {kind}_dim={dim} is wanted here: "
                f"take the file of this task or set {kind}_dim={len(bound)}"
            )
        if not np.isfinite(bound).all():
            raise UserError(f"normalization file {path}: {key} holds NaN or infinity; make it anew")
    if low.shape != high.shape:
        raise UserError(f"normalization file {path}: {kind}_min and {kind}_max differ in length")
    if (low > high).any():
        worst = int(np.argmax(low > high))
        raise UserError(f"normalization file {path}: {kind}_min exceeds {kind}_max in dimension {worst}; make it anew")


# ---------- of one field, fitted on rows [N,D]; the numpy dtype of what is given is kept ----------


class IdentityNormalizer:
    """Leaves everything as it is; base of the others.

    Args:
        arrays: all that it knows.
    """

    def __init__(self, arrays: Mapping[str, np.ndarray]):
        self.arrays: Arrays = dict(arrays)

    @classmethod
    def fit(cls, x: np.ndarray) -> IdentityNormalizer:
        """Fits on rows [N,D]."""
        return cls({})

    def normalize(self, x: np.ndarray) -> np.ndarray:
        """Maps data [...,D] to what the networks see."""
        return x

    def unnormalize(self, x: np.ndarray) -> np.ndarray:
        """Inverts `normalize`, [...,D]."""
        return x


class GaussianNormalizer(IdentityNormalizer):
    """Scales to mean 0 and deviation 1; only shifts an entry that is constant in the data."""

    @classmethod
    def fit(cls, x: np.ndarray) -> GaussianNormalizer:
        """Fits means and deviations on rows [N,D]."""
        x = x.astype(np.float32)
        stds = x.std(axis=0)
        return cls({"means": x.mean(axis=0), "stds": np.where(stds == 0, np.ones_like(stds), stds)})

    def normalize(self, x: np.ndarray) -> np.ndarray:
        """Shifts and scales [...,D]."""
        return (x - self.arrays["means"]) / self.arrays["stds"]

    def unnormalize(self, x: np.ndarray) -> np.ndarray:
        """Inverts `normalize`, [...,D]."""
        return x * self.arrays["stds"] + self.arrays["means"]


class LimitsNormalizer(IdentityNormalizer):
    """Maps the data's range to [-1, 1]."""

    @classmethod
    def fit(cls, x: np.ndarray) -> LimitsNormalizer:
        """Fits the range of rows [N,D]. Raises UserError for an entry that is constant."""
        constant = np.flatnonzero(x.min(axis=0) == x.max(axis=0))
        if len(constant):
            raise UserError(
                f"LimitsNormalizer: entry {constant[0]} of the data is constant, so it has no range: "
                "take SafeLimitsNormalizer"
            )
        return cls({"mins": x.min(axis=0), "maxs": x.max(axis=0)})

    def normalize(self, x: np.ndarray) -> np.ndarray:
        """Maps the range [...,D] to [-1, 1]."""
        return 2 * ((x - self.arrays["mins"]) / (self.arrays["maxs"] - self.arrays["mins"])) - 1

    def unnormalize(self, x: np.ndarray, tolerance: float = 1e-4) -> np.ndarray:
        """Inverts `normalize`, [...,D]; clips all of it to +-1 if some of it is further outside than the tolerance."""
        if x.size and np.abs(x).max() > 1 + tolerance:
            x = np.clip(x, -1, 1)
        return (x + 1) / 2.0 * (self.arrays["maxs"] - self.arrays["mins"]) + self.arrays["mins"]


class SafeLimitsNormalizer(LimitsNormalizer):
    """Maps the data's range to [-1, 1], widened by 1 on both sides for an entry that is constant in the data."""

    @classmethod
    def fit(cls, x: np.ndarray) -> SafeLimitsNormalizer:
        """Fits the range of rows [N,D]."""
        mins, maxs = x.min(axis=0), x.max(axis=0)
        wider = (mins == maxs).astype(mins.dtype)
        return cls({"mins": mins - wider, "maxs": maxs + wider})


class WideLimitsNormalizer(LimitsNormalizer):
    """Maps the data's range plus 1e-5 to [-1, 1], so that constant entries need no special case (Kuka).

    The way back is without the 1e-5, as in the reference, and clips everything to [-1, 1].
    """

    WIDER = 1e-5

    @classmethod
    def fit(cls, x: np.ndarray) -> WideLimitsNormalizer:
        """Fits the range of rows [N,D]."""
        return cls({"mins": x.min(axis=0), "maxs": x.max(axis=0)})

    def normalize(self, x: np.ndarray) -> np.ndarray:
        """Maps the widened range [...,D] to [-1, 1]."""
        return 2 * ((x - self.arrays["mins"]) / (self.arrays["maxs"] - self.arrays["mins"] + self.WIDER)) - 1

    def unnormalize(self, x: np.ndarray, tolerance: float = 0.0) -> np.ndarray:
        """Clips [...,D] to +-1 and maps it to the range that is not widened."""
        return super().unnormalize(x, tolerance)


class CDFNormalizer(IdentityNormalizer):
    """Maps every entry to a uniform one in [-1, 1] by its empirical distribution; clips what lies outside the data."""

    @classmethod
    def fit(cls, x: np.ndarray) -> CDFNormalizer:
        """Fits the distribution of each entry of rows [N,D]."""
        arrays: Arrays = {}
        for i, column in enumerate(x.astype(np.float32).T):
            values, counts = np.unique(column, return_counts=True)
            arrays |= {f"values.{i}": values, f"probabilities.{i}": np.cumsum(counts) / column.size}
        return cls(arrays)

    def normalize(self, x: np.ndarray) -> np.ndarray:
        """Maps [...,D] to each entry's share of smaller values, from -1 to 1."""
        return self._by_column(
            x, lambda i, y: 2 * np.interp(y, self._at("values", i), self._at("probabilities", i)) - 1
        )

    def unnormalize(self, x: np.ndarray) -> np.ndarray:
        """Inverts `normalize`, [...,D]."""
        return self._by_column(
            x, lambda i, y: np.interp((y + 1) / 2.0, self._at("probabilities", i), self._at("values", i))
        )

    def _at(self, name: str, i: int) -> np.ndarray:
        return self.arrays[f"{name}.{i}"]

    @staticmethod
    def _by_column(x: np.ndarray, function: Callable[[int, np.ndarray], np.ndarray]) -> np.ndarray:
        columns = [function(i, x[..., i]) for i in range(x.shape[-1])]
        return np.stack(columns, axis=-1).astype(x.dtype)


#: Under the names of Diffuser's configurations, which checkpoints hold as well.
NORMALIZERS: dict[str, type[IdentityNormalizer]] = {
    "GaussianNormalizer": GaussianNormalizer,
    "LimitsNormalizer": LimitsNormalizer,
    "SafeLimitsNormalizer": SafeLimitsNormalizer,
    "WideLimitsNormalizer": WideLimitsNormalizer,
    "CDFNormalizer": CDFNormalizer,
    "IdentityNormalizer": IdentityNormalizer,
    "DebugNormalizer": IdentityNormalizer,
}


def normalizer(name: str) -> type[IdentityNormalizer]:
    """Finds the class of that name."""
    if name not in NORMALIZERS:
        raise UserError(f"normalizer={name!r} is unknown: choose one of {', '.join(NORMALIZERS)}")
    return NORMALIZERS[name]
