"""What the genuine planners import for pictures, simulators and command lines, replaced by nothing."""

from __future__ import annotations

import collections
import collections.abc
import contextlib
import importlib
import io
import sys
import types
from importlib.machinery import ModuleSpec
from typing import Any
from unittest.mock import MagicMock

SURROUNDINGS = ("gym", "d4rl", "mujoco_py", "imageio", "skvideo", "matplotlib", "tap", "git", "jax", "pybullet", "tqdm")


class _Nothing(types.ModuleType):
    """A module that has everything, all of it empty."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


class Finder:
    """Finds the surroundings that are not installed, and further packages of these names."""

    def __init__(self, *further: str):
        self.names = (*SURROUNDINGS, *further)

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        return ModuleSpec(name, self, is_package=True) if name.split(".")[0] in self.names else None  # type: ignore[arg-type]

    def create_module(self, spec: ModuleSpec) -> types.ModuleType:
        return _Nothing(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        pass


def import_diffuser(checkout: str, *names: str) -> list[Any]:
    """Import modules of the authors' Diffuser, "sampling" say, from a checkout."""
    if not hasattr(collections, "Mapping"):
        collections.Mapping = collections.abc.Mapping  # type: ignore[attr-defined] # as in the Python it was written for
    sys.path.insert(0, checkout)
    sys.meta_path.append(Finder())  # type: ignore[arg-type]
    with contextlib.redirect_stdout(io.StringIO()):
        return [importlib.import_module(f"diffuser.{name}") for name in names]


def make_cleandiffuser_importable(checkout: str) -> None:
    """Let DiffuserLite's authors' package be imported from a checkout, without what only networks that see need."""
    sys.path.insert(0, checkout)
    for name in ("torchvision", "torchvision.transforms", "torchvision.transforms.functional"):
        sys.modules.setdefault(name, MagicMock())
