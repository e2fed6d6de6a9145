"""Errors meant for people."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

from diffusion_rl.core.programs import as_here

LONGEST = 900  # characters of a message


class UserError(Exception):
    """Something the user can mend: one line that names the thing and the cure.

    The command lines print it without a traceback and exit with status 2 (with a traceback under `HYDRA_FULL_ERROR=1`).
    Whatever a file or a library put into it, its text has no line breaks and a bearable length. Commands that it names
    are spelled as they are here (`as_here`).
    """

    def __str__(self) -> str:
        text = as_here(" ".join(super().__str__().splitlines()))
        return text if len(text) <= LONGEST else f"{text[: LONGEST // 2]} … {text[-LONGEST // 2 :]}"


class Interrupted(KeyboardInterrupt):
    """SIGINT or SIGTERM arrived and the state of the run has been saved; `str()` says where."""


def one_line(error: BaseException) -> str:
    """Returns what an error says, in one line of at most 200 characters; the name of its class where it says
    nothing."""
    reason = getattr(error, "strerror", None) or str(error)
    return " ".join(str(reason).split())[:200] or type(error).__name__


def listed(names: Iterable[str], most: int = 8) -> str:
    """Returns names from a file, for a message: the first ones, each cut to 40 characters and without control
    characters."""
    shown = [name[:40] if name.isprintable() else ascii(name[:40]) for name in itertools.islice(names, most)]
    return ", ".join(shown) or "nothing"


def is_out_of_memory(error: BaseException) -> bool:
    """Returns whether Python, numpy or TensorFlow (whose error is known by its name) ran out of memory."""
    return isinstance(error, MemoryError) or type(error).__name__ == "ResourceExhaustedError"
