"""The one place that names the Keras package."""

import contextlib
from collections.abc import Iterator

import tf_keras as keras

__all__ = ["keras", "floatx", "precision"]


def floatx() -> str:
    """The dtype that new weights get: "float32", or "float64" inside `precision("float64")`."""
    return keras.backend.floatx()


@contextlib.contextmanager
def precision(dtype: str) -> Iterator[None]:
    """Build networks and schedules in `dtype` inside this block. float64 is what tells wrong maths from rounding."""
    before = keras.backend.floatx()
    keras.backend.set_floatx(dtype)
    try:
        yield
    finally:
        keras.backend.set_floatx(before)
