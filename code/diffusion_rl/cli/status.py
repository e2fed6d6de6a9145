"""How a command line ends: with a status, and one line where something is wrong."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

from diffusion_rl.core.errors import UserError, is_out_of_memory, one_line
from diffusion_rl.training import signals


def exit_status(command: Callable[[], int | None]) -> int:
    """Run a command line; the status that its process ends with.

    A UserError, or a file or memory that the operating system refuses, is one line on stderr and 2 (a traceback under
    `HYDRA_FULL_ERROR=1`); SIGINT or SIGTERM at any time one line and 130.
    """
    with signals.interrupting():
        try:
            return command() or 0
        except Exception as error:
            line = str(error) if isinstance(error, UserError) else _refused(error)
            if line is None or os.environ.get("HYDRA_FULL_ERROR") == "1":
                raise
            print(f"error: {line}", file=sys.stderr)
            return 2
        except KeyboardInterrupt as stopped:
            print(str(stopped) or "interrupted", file=sys.stderr)
            return 130


def _refused(error: Exception) -> str | None:
    """What the operating system refuses: memory, or a file that it names; None for anything else."""
    if is_out_of_memory(error):
        return f"not enough memory ({one_line(error)}): choose smaller numbers"
    named = isinstance(error, OSError) and error.filename and error.strerror
    return f"{error.filename}: {error.strerror}" if named else None  # type: ignore[attr-defined]
