"""SIGINT (Ctrl-C) and SIGTERM, which every program treats alike: a loop saves and ends, anything else ends at once.

Signals within a second of the first are one with it: timeout(1) and some batch systems send theirs twice.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

ONE_REQUEST_SECONDS = 1.0
_PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of prctl(2)
_SIGNALS = (signal.SIGINT, signal.SIGTERM)

_listening = 0  # how many handlers of this module are installed, one over the other
_first_at: float | None = None  # when the first signal came since somebody listens


class StopRequest:
    """Notes the first signal while it is entered (several times over, if need be); a later one raises
    KeyboardInterrupt.

    Attributes:
        name: of the signal; None while there was none.
    """

    def __init__(self) -> None:
        self.name: str | None = None
        self._levels: list[contextlib.AbstractContextManager[None]] = []

    def __enter__(self) -> StopRequest:
        self._levels.append(_handled(self._note))
        self._levels[-1].__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._levels.pop().__exit__(None, None, None)

    def _note(self, name: str, again: bool) -> None:
        if again:
            raise KeyboardInterrupt(f"stopped by {name}")
        self.name = name


@contextlib.contextmanager
def interrupting() -> Iterator[None]:
    """Lets both signals raise KeyboardInterrupt, whose text names the signal."""
    with _handled(_interrupt):
        yield


@contextlib.contextmanager
def held() -> Iterator[None]:
    """Holds a signal back to the end of the block (an import must not be cut); raises KeyboardInterrupt then."""
    with StopRequest() as request:
        yield
    if request.name:
        raise KeyboardInterrupt(f"stopped by {request.name}")


def ignore() -> None:
    """Ignores both signals from here to the end of the process: nothing is left to stop."""
    _install(signal.SIG_IGN)


def end_with_parent() -> Callable[[], None] | None:
    """Gives what a child calls before it begins, so that it gets SIGTERM when this process ends, however it ends.

    None where the operating system (others than Linux) has no such thing.
    """
    parent = os.getpid()
    try:
        prctl = ctypes.CDLL(None).prctl
    except (OSError, AttributeError):
        return None

    def prepare() -> None:
        prctl(_PARENT_DEATH_SIGNAL, int(signal.SIGTERM))
        if os.getppid() != parent:  # it ended in between
            os._exit(128 + signal.SIGTERM)

    return prepare


def _interrupt(name: str, again: bool) -> None:
    raise KeyboardInterrupt(f"stopped by {name}")


@contextlib.contextmanager
def _handled(act: Callable[[str, bool], None]) -> Iterator[None]:
    """Lets signals call `act` with their name and whether one came before; puts handlers back at the end."""
    global _listening, _first_at

    def handle(number: int, frame: FrameType | None) -> None:
        global _first_at
        now, before = time.monotonic(), _first_at
        if before is not None and now - before < ONE_REQUEST_SECONDS:
            return
        if before is None:
            _first_at = now
        act(signal.Signals(number).name, before is not None)

    before = _install(handle)
    _listening += 1
    try:
        yield
    finally:
        _listening -= 1
        if not _listening:
            _first_at = None
        for number, handler in before.items():
            signal.signal(number, handler)


def _install(handler: Any) -> dict[signal.Signals, Any]:
    """Installs a handler and returns those of before; none outside of the main thread, whose signals are not ours."""
    before = {}
    for number in _SIGNALS:
        with contextlib.suppress(ValueError):
            before[number] = signal.signal(number, handler)
    return before
