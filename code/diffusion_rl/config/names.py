"""Names that become parts of paths, and names of devices."""

from __future__ import annotations

import re
from pathlib import PurePath
from typing import Any

from diffusion_rl.core.errors import UserError

LONGEST_PART = 200  # of a path, in bytes; file systems take 255, and files get suffixes
LONGEST_NAME = 2000


def require_inside(name: str, what: str) -> None:
    """Check that a name leads to a place below the folder that it is put in.

    Args:
        name: one or more parts of a path, "plans/H32" say.
        what: the name as the user wrote it, to begin the error with.

    Raises:
        UserError: it is absolute, has ".." or characters that no file name has, or is too long.
    """
    parts = PurePath(name).parts
    what = what if len(what) <= 120 else f"{what[:117]}..."
    if PurePath(name).is_absolute() or ".." in parts:
        raise UserError(f"{what}: leads out of its folder; give a name without .. and not beginning with /")
    if not name.isprintable():
        raise UserError(f"{what!r}: has characters that a file name cannot have")
    if len(name.encode(errors="replace")) > LONGEST_NAME or any(
        len(p.encode(errors="replace")) > LONGEST_PART for p in parts
    ):
        raise UserError(f"{what}: is too long for a file name ({LONGEST_PART} bytes between slashes)")


def require_device(name: Any, what: str) -> None:
    """Raises UserError, which begins with `what`, for what is no device: cpu, cuda, cuda:<number>, or None."""
    if name is not None and not re.fullmatch(r"(cpu|cuda|gpu)(:\d{1,4})?", str(name)):
        raise UserError(f"{what}: choose cpu, cuda or cuda:<number>")
