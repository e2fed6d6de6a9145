"""Normalizers of one field of a data set, under the names of Diffuser's configurations.

Each is fitted on rows [N,D] and keeps the numpy dtype of what it is given; `arrays` is all that it knows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from diffusion_rl.core.errors import UserError

Arrays = dict[str, np.ndarray]


class DebugNormalizer:
    """The identity."""

    def __init__(self, arrays: Mapping[str, np.ndarray]):
        self.arrays: Arrays = dict(arrays)

    @classmethod
    def fit(cls, x: np.ndarray) -> DebugNormalizer:
        """x [N,D]"""
        return cls({})

    def normalize(self, x: np.ndarray) -> np.ndarray:
        """[...,D] as in the data -> [...,D] as the networks see it."""
        return x

    def unnormalize(self, x: np.ndarray) -> np.ndarray:
        """Inverts `normalize`, [...,D]."""
        return x


class GaussianNormalizer(DebugNormalizer):
    """Mean 0 and deviation 1; an entry that is constant in the data is only shifted."""

    @classmethod
    def fit(cls, x: np.ndarray) -> GaussianNormalizer:
        """x [N,D]"""
        x = x.astype(np.float32)
        stds = x.std(axis=0)
        return cls({"means": x.mean(axis=0), "stds": np.where(stds == 0, np.ones_like(stds), stds)})

    def normalize(self, x: np.ndarray) -> np.ndarray:
        """[...,D] -> [...,D]"""
        return (x - self.arrays["means"]) / self.arrays["stds"]

    def unnormalize(self, x: np.ndarray) -> np.ndarray:
        """[...,D] -> [...,D]"""
        return x * self.arrays["stds"] + self.arrays["means"]


class LimitsNormalizer(DebugNormalizer):
    """The data's range to [-1, 1]."""

    @classmethod
    def fit(cls, x: np.ndarray) -> LimitsNormalizer:
        """x [N,D]. Raises UserError for an entry that is constant."""
        constant = np.flatnonzero(x.min(axis=0) == x.max(axis=0))
        if len(constant):
            raise UserError(
                f"LimitsNormalizer: entry {constant[0]} of the data is constant, so it has no range: "
                "take SafeLimitsNormalizer"
            )
        return cls({"mins": x.min(axis=0), "maxs": x.max(axis=0)})

    def normalize(self, x: np.ndarray) -> np.ndarray:
        """[...,D] -> [...,D]"""
        return 2 * ((x - self.arrays["mins"]) / (self.arrays["maxs"] - self.arrays["mins"])) - 1

    def unnormalize(self, x: np.ndarray, tolerance: float = 1e-4) -> np.ndarray:
        """[...,D] -> [...,D]; all of it is clipped to +-1 if some of it is further outside than the tolerance."""
        if x.size and np.abs(x).max() > 1 + tolerance:
            x = np.clip(x, -1, 1)
        return (x + 1) / 2.0 * (self.arrays["maxs"] - self.arrays["mins"]) + self.arrays["mins"]


class SafeLimitsNormalizer(LimitsNormalizer):
    """The same; the range of an entry that is constant in the data is widened by 1 on both sides."""

    @classmethod
    def fit(cls, x: np.ndarray) -> SafeLimitsNormalizer:
        """x [N,D]"""
        mins, maxs = x.min(axis=0), x.max(axis=0)
        wider = (mins == maxs).astype(mins.dtype)
        return cls({"mins": mins - wider, "maxs": maxs + wider})


class WideLimitsNormalizer(LimitsNormalizer):
    """The data's range and 1e-5 more to [-1, 1], so that constant entries need no other treatment: Kuka's.

    The way back is without the 1e-5, as in the reference, and clips everything to [-1, 1].
    """

    WIDER = 1e-5

    @classmethod
    def fit(cls, x: np.ndarray) -> WideLimitsNormalizer:
        """x [N,D]"""
        return cls({"mins": x.min(axis=0), "maxs": x.max(axis=0)})

    def normalize(self, x: np.ndarray) -> np.ndarray:
        """[...,D] -> [...,D]"""
        return 2 * ((x - self.arrays["mins"]) / (self.arrays["maxs"] - self.arrays["mins"] + self.WIDER)) - 1

    def unnormalize(self, x: np.ndarray, tolerance: float = 0.0) -> np.ndarray:
        """[...,D] -> [...,D]"""
        return super().unnormalize(x, tolerance)


class CDFNormalizer(DebugNormalizer):
    """Every entry uniform in [-1, 1] by its empirical distribution; what lies outside of the data is clipped."""

    @classmethod
    def fit(cls, x: np.ndarray) -> CDFNormalizer:
        """x [N,D]"""
        arrays: Arrays = {}
        for i, column in enumerate(x.astype(np.float32).T):
            values, counts = np.unique(column, return_counts=True)
            arrays |= {f"values.{i}": values, f"probabilities.{i}": np.cumsum(counts) / column.size}
        return cls(arrays)

    def normalize(self, x: np.ndarray) -> np.ndarray:
        """[...,D] -> [...,D]"""
        return self._by_column(
            x, lambda i, y: 2 * np.interp(y, self._at("values", i), self._at("probabilities", i)) - 1
        )

    def unnormalize(self, x: np.ndarray) -> np.ndarray:
        """[...,D] -> [...,D]"""
        return self._by_column(
            x, lambda i, y: np.interp((y + 1) / 2.0, self._at("probabilities", i), self._at("values", i))
        )

    def _at(self, name: str, i: int) -> np.ndarray:
        return self.arrays[f"{name}.{i}"]

    @staticmethod
    def _by_column(x: np.ndarray, function: Callable[[int, np.ndarray], np.ndarray]) -> np.ndarray:
        columns = [function(i, x[..., i]) for i in range(x.shape[-1])]
        return np.stack(columns, axis=-1).astype(x.dtype)


NORMALIZERS: dict[str, type[DebugNormalizer]] = {
    cls.__name__: cls
    for cls in (
        *(GaussianNormalizer, LimitsNormalizer, SafeLimitsNormalizer, WideLimitsNormalizer),
        *(CDFNormalizer, DebugNormalizer),
    )
}


def normalizer(name: str) -> type[DebugNormalizer]:
    """The class of that name."""
    if name not in NORMALIZERS:
        raise UserError(f"normalizer={name!r} is unknown: choose one of {', '.join(NORMALIZERS)}")
    return NORMALIZERS[name]
