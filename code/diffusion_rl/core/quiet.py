"""TensorFlow is imported without what it writes to the terminal: from 2.21 on three lines that no setting silences."""

from __future__ import annotations

import importlib
import os
import sys


def import_tensorflow() -> None:
    """Imports TensorFlow while standard error leads nowhere; does nothing where it is imported, or logs are asked for.

    TF_CPP_MIN_LOG_LEVEL below 3 asks for them.
    """
    if "tensorflow" in sys.modules or os.environ.get("TF_CPP_MIN_LOG_LEVEL") != "3":
        return
    sys.stderr.flush()
    saved, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        importlib.import_module("tensorflow")
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(nowhere)
