"""Diffusion-policy reinforcement learning in TensorFlow/Keras."""

import importlib
import os
from typing import TYPE_CHECKING, Any

from diffusion_rl.api import NAMES
from diffusion_rl.core import moved, quiet

if TYPE_CHECKING:
    from diffusion_rl.api.datasets import load_dataset, write_dataset
    from diffusion_rl.api.policy import LoadedPolicy, Session, load_policy
    from diffusion_rl.api.runs import Evaluated, evaluate, export_policy, make_env, train

__all__ = [
    "Evaluated",
    "LoadedPolicy",
    "Session",
    "evaluate",
    "export_policy",
    "load_dataset",
    "load_policy",
    "make_env",
    "train",
    "write_dataset",
]

# TensorFlow reads these when it is imported: keep its log noise off the user's terminal, and Keras 2 as the Keras.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("TF_USE_LEGACY_KERAS", "1")

__version__ = "0.1.0"

moved.install()
quiet.install()


def __getattr__(name: str) -> Any:
    if name in NAMES:
        return getattr(importlib.import_module(f"diffusion_rl.api.{NAMES[name]}"), name)
    raise AttributeError(f"module 'diffusion_rl' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *NAMES})
