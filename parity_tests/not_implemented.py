"""The one list of recorded cases that this package does not cover yet, with the reason.

The replayer skips these by name and counts them; a case that is neither covered nor listed here fails.
Keys are patterns (fnmatch) over class paths of the reference, or over case names ("case:" in front).
"""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase

NOT_IMPLEMENTED: dict[str, str] = {}


def reason_for(case: str, classes: Iterable[str]) -> str | None:
    """Why a case is not covered, naming what is missing; None if it is."""
    for pattern, what in NOT_IMPLEMENTED.items():
        if pattern.startswith("case:"):
            if fnmatchcase(case, pattern[5:]):
                return f"not implemented: {case} ({what})"
            continue
        for path in classes:
            if fnmatchcase(path, pattern):
                return f"not implemented: {path} ({what})"
    return None
