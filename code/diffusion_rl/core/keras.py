"""The one place that names the Keras package, whose settings here are its own defaults, whatever keras.json says."""

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

import tf_keras as keras

__all__ = ["bijectors", "distributions", "floatx", "keras", "precision"]

keras.backend.set_floatx("float32")
keras.backend.set_epsilon(1e-7)
keras.backend.set_image_data_format("channels_last")


def _probability() -> Any:
    """Imports TensorFlow Probability, which misses a module of Keras if that was imported before this package."""
    sys.modules.setdefault("tensorflow.compat.v2.keras", keras)
    import tensorflow_probability

    return tensorflow_probability


def distributions() -> Any:
    """Returns the distributions of TensorFlow Probability."""
    return _probability().distributions


def bijectors() -> Any:
    """Returns the bijectors of TensorFlow Probability."""
    return _probability().bijectors


def floatx() -> str:
    """Returns the dtype that new weights get: "float32", or "float64" inside `precision("float64")`."""
    return keras.backend.floatx()


@contextlib.contextmanager
def precision(dtype: str) -> Iterator[None]:
    """Builds networks and schedules in `dtype` inside this block. float64 is what tells wrong maths from rounding."""
    before = keras.backend.floatx()
    keras.backend.set_floatx(dtype)
    try:
        yield
    finally:
        keras.backend.set_floatx(before)
