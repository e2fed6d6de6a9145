"""How a command line ends: with a status, and one line where something is wrong."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from collections.abc import Callable, Iterator

from diffusion_rl.core.errors import Interrupted, UserError, is_out_of_memory, one_line
from diffusion_rl.core.programs import as_here
from diffusion_rl.training import signals

USER_ERROR, INTERRUPTED = 2, 130
_FULL_DISK = (errno.ENOSPC, errno.EROFS, errno.EDQUOT)


def exit_status(command: Callable[[], int | None]) -> int:
    """Runs a command line. Returns the status that its process ends with.

    A UserError, or a file or memory that the operating system refuses, is one line on stderr and 2 (a traceback under
    `HYDRA_FULL_ERROR=1`); SIGINT or SIGTERM at any time one line and 130.
    """
    with reported() as status, signals.interrupting():
        status[0] = command() or 0
    return status[0]


@contextlib.contextmanager
def reported(label: str = "", smaller: str = "", interrupted: str = "") -> Iterator[list[int]]:
    """Turns what the user can mend into one line on stderr. Yields [exit status], filled in at the end.

    Args:
        label: what to begin the line with, where there are several runs.
        smaller: which numbers to reduce where memory is too small.
        interrupted: what to say after a signal that nothing else is said about.
    """
    status = [0]
    wants_traceback = os.environ.get("HYDRA_FULL_ERROR") == "1"
    try:
        yield status
    except SystemExit as end:
        status[0] = end.code if isinstance(end.code, int) else int(end.code is not None)
    except KeyboardInterrupt as stopped:
        print(_farewell(stopped, interrupted), file=sys.stderr)
        status[0] = INTERRUPTED
    except Exception as error:
        line = None if wants_traceback else line_for_user(error, smaller)
        if line is None:
            raise
        print(f"error: {label}{line}", file=sys.stderr, flush=True)
        status[0] = USER_ERROR


def show(text: str) -> None:
    """Prints a text, its commands spelled as here. The reader may take the first lines only (`| head`)."""
    try:
        print(as_here(text), flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _farewell(stopped: KeyboardInterrupt, otherwise: str) -> str:
    """Returns the line after a signal: where the loop saved its state, else `otherwise`."""
    return (str(stopped) if isinstance(stopped, Interrupted) else "") or otherwise or str(stopped) or "interrupted"


def line_for_user(error: Exception, smaller: str = "") -> str | None:
    """Returns one line for an error that the user can mend; None for a defect of ours."""
    if isinstance(error, UserError):
        return str(error)
    if is_out_of_memory(error):
        return f"not enough memory ({one_line(error)}): choose smaller numbers{smaller and f', such as {smaller}'}"
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"{error.filename}: {error.strerror}"
    if isinstance(error, OSError) and error.errno in _FULL_DISK:
        return f"writing: {error.strerror}"
    if isinstance(error, FileNotFoundError | PermissionError | IsADirectoryError | NotADirectoryError):
        return one_line(error)
    if type(error).__module__.startswith(("hydra.", "omegaconf.")):
        from diffusion_rl.config.compose import config_line

        return config_line(error)
    return None
