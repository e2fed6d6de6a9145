"""Helper processes that never see TensorFlow."""

from __future__ import annotations

import contextlib
import multiprocessing
import re
import sys
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

LONGEST_CAUSE, LONGEST_PATH = 160, 80  # characters of a traceback's summary

#: What the fork server imports once for all processes that come from it.
_preloaded = ["diffusion_rl.envs.worker"]


def preload(*modules: str) -> None:
    """Makes the fork server import these modules once for all processes; has no effect after the first start."""
    _preloaded.extend(module for module in modules if module not in _preloaded)


def start(target: Callable[..., None], *arguments: Any) -> tuple[BaseProcess, Connection]:
    """Runs target(connection, *arguments) in a new process; returns the process and our end of the connection.

    The process comes from a fork server that never imported TensorFlow (forking after TensorFlow has started threads
    is unsafe, and software rendering in a process with TensorFlow crashes) and does not import the main script.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_preloaded)
    ours, theirs = context.Pipe()
    process = context.Process(target=target, args=(theirs, *arguments), daemon=True)
    with _hidden_main_module():
        process.start()
    theirs.close()
    return process, ours


def in_one_line(trace: str, name: str = "") -> str:
    """Shortens a traceback to "Type: first line of its message [name, file:line]", at most about 300 characters."""
    lines = trace.strip().splitlines()
    frames = [number for number, line in enumerate(lines) if line.startswith('  File "')]
    last = frames[-1] if frames else -1
    cause = next((line for line in lines[last + 1 :] if not line.startswith(" ")), "").removesuffix(":").strip()
    place = re.match(r'  File "(.+)", line (\d+)', lines[last]) if frames else None
    places = [name] if name else []
    if place:
        path = place[1] if len(place[1]) <= LONGEST_PATH else "…" + place[1][-LONGEST_PATH:]
        places.append(f"{path}:{place[2]}")
    cause = cause if len(cause) <= LONGEST_CAUSE else cause[:LONGEST_CAUSE] + "…"
    return f"{cause} [{', '.join(places)}]"


@contextlib.contextmanager
def _hidden_main_module() -> Iterator[None]:
    """Keeps a new process from importing the main script anew, which would load TensorFlow into it."""
    main = sys.modules["__main__"]
    kept: dict[str, Any] = {name: main.__dict__[name] for name in ("__file__", "__spec__") if name in main.__dict__}
    main.__dict__.pop("__file__", None)
    main.__dict__["__spec__"] = None
    try:
        yield
    finally:
        main.__dict__.update(kept)
