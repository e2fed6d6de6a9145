"""Options of the test suites; they stand here because `pytest parity_tests tests` may register each only once."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib.util
import os
import sys
from collections.abc import Iterator

import pytest

os.environ.setdefault("DPPO_OFFLINE", "1")  # a file that is missing is an error of a test, not a download
# PyTorch with CUDA brings Triton, whose LLVM and TensorFlow's crash in one process; PyTorch does without it.
sys.modules.setdefault("triton", None)  # type: ignore[arg-type]

# What `make test` installs. A test that needs one of these is skipped where it is missing, but not there.
PACKAGES = ("torch", "einops", "mujoco", "gymnasium", "gymnasium_robotics", "robosuite", "mpe2", "imageio_ffmpeg")
PACKAGES += ("gdown", "pyarrow", "rliable", "nbclient", "nbformat", "PIL", "hydra_plugins.hydra_joblib_launcher")
PACKAGES += ("pybullet",) if sys.version_info < (3, 13) else ()  # setup.py: later Pythons have no wheel of it

OPTIONS = {
    "--golden-dir": "folder of recordings to replay instead of the shipped one",
    "--trajectories": "file of recorded MuJoCo 2.1.0 trajectories instead of the shipped one",
    "--recordings": "folder of D3IL's avoiding recordings (pickles) to replay",
    "--upstream": "checkout of the PyTorch reference to compare with live",
    "--upstream-diffuser": "checkout of the PyTorch Diffuser (jannerm/diffuser) to compare with live",
    "--upstream-kuka": "the same of its branch kuka",
    "--upstream-reinflow": "checkout of the PyTorch ReinFlow to compare with live",
}


def pytest_addoption(parser: pytest.Parser) -> None:
    for name, text in OPTIONS.items():
        with contextlib.suppress(ValueError):  # registered already, by a conftest nearer to the tests
            parser.addoption(name, default=None, metavar="PATH", help=text)


def pytest_configure() -> None:
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing and "MAKELEVEL" in os.environ:
        raise pytest.UsageError(f"make test needs {', '.join(missing)}: rm .venv/.test, and make test installs them")


@pytest.fixture(scope="module", autouse=True)
def memory_is_returned() -> Iterator[None]:
    """Graphs are cycles of objects, which the collector seldom looks for. Compiled programs stay (see the Makefile)."""
    yield
    gc.collect()
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):  # another C library than glibc
            ctypes.CDLL("libc.so.6").malloc_trim(0)
