"""What the genuine Diffuser imports for pictures, simulators and command lines, replaced by nothing."""

from __future__ import annotations

import types
from importlib.machinery import ModuleSpec
from typing import Any

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
