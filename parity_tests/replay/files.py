"""Reading golden files. One file is one case: `meta` is JSON, the arrays are grouped by the prefix of their name."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

Cast = Callable[[Any], Any]  # a recorded array as a tensor of the precision under test
Outputs = dict[str, Any]

GOLDENS = Path(__file__).resolve().parent.parent / "goldens"


class Golden:
    """A recorded case.

    Attributes:
        name: file name without suffix.
        path: of the file (need not exist for one recorded in memory).
        meta: what was called and how (`kind`, `spec`, `method`, `args`, `draws`, …).
        arrays: every array under its stored name ("in/x", "w/layer.weight", "out64/loss", …).
    """

    def __init__(self, path: str | Path, meta: dict[str, Any], arrays: dict[str, np.ndarray]):
        self.path, self.name, self.meta, self.arrays = Path(path), Path(path).stem, meta, arrays

    @classmethod
    def load(cls, path: str | Path) -> Golden:
        """Read a file. Nothing in it is executed."""
        with np.load(path, allow_pickle=False) as file:
            return cls(path, json.loads(str(file["meta"])), {k: file[k] for k in file.files if k != "meta"})

    @property
    def kind(self) -> str:
        return self.meta["kind"]

    def group(self, prefix: str) -> dict[str, np.ndarray]:
        """The arrays below a prefix ("in", "w", "out", "out64", "grad", "grad64"), without it."""
        start = prefix + "/"
        return {k[len(start) :]: v for k, v in self.arrays.items() if k.startswith(start)}

    def subgroup(self, prefix: str) -> dict[str, np.ndarray]:
        """The arrays of `in/` below a dotted prefix ("env", "dataset"), without it."""
        start = f"in/{prefix}."
        return {k[len(start) :]: v for k, v in self.arrays.items() if k.startswith(start)}

    @cached_property
    def state_dict(self) -> dict[str, np.ndarray]:
        """The reference's, names of shared tensors filled in."""
        weights = self.group("w")
        weights.update({alias: weights[name] for alias, name in self.meta.get("aliases", {}).items()})
        return weights

    @cached_property
    def weights(self) -> dict[str, np.ndarray]:
        """The state_dict, and what the reference stacks beside it for ensembles of critics."""
        return self.state_dict | {"ensemble_params." + name: value for name, value in self.group("ens").items()}

    @cached_property
    def draws(self) -> list[tuple[str, np.ndarray]]:
        """(function, array) of every random draw, in the order of the calls."""
        if "draws" in self.meta:
            return [(d["fn"], self.arrays[d["name"]]) for d in self.meta["draws"]]
        stored = sorted(k for k in self.arrays if k.startswith("in/draw_"))
        return [("unnamed", self.arrays[k]) for k in stored]

    def resolve(self, value: Any) -> Any:
        """Replace "@in/<name>" by the array, in nested arguments."""
        if isinstance(value, str) and value.startswith("@in/"):
            return self.arrays[value[1:]]
        if isinstance(value, dict):
            return {k: self.resolve(v) for k, v in value.items()}
        return value

    @property
    def arguments(self) -> dict[str, Any]:
        """Positional and keyword arguments of the call by name."""
        named = dict(zip(self.meta["arg_names"], self.meta["args"], strict=True)) | self.meta["kwargs"]
        return {k: self.resolve(v) for k, v in named.items()}

    def classes(self) -> list[str]:
        """Every class and function path of the reference that this case touches."""
        paths = _class_paths(self.meta.get("spec"))
        paths += [self.meta[k] for k in ("agent_class", "class_path", "target") if self.meta.get(k)]
        return paths


def _class_paths(spec: Any) -> list[str]:
    if isinstance(spec, dict):
        own = [spec["class"]] if "class" in spec else []
        return own + [path for value in spec.values() for path in _class_paths(value)]
    if isinstance(spec, list):
        return [path for value in spec for path in _class_paths(value)]
    return []


def case_files(folder: str | Path) -> list[Path]:
    """The golden files of a folder, sorted."""
    files = sorted(Path(folder).glob("*.npz"))
    if not files:
        raise FileNotFoundError(f"no golden files (*.npz) in {folder}: pass --golden-dir DIR")
    return files
