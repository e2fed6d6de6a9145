"""One process at a time writes to a run's folder."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from diffusion_rl.core.errors import UserError
from diffusion_rl.core.files import lock_file

_NAME = ".lock"


class FolderLock:
    """A folder, made where it is missing, that this process alone writes to until `close` or its end.

    Args:
        cure: what else the user can do, in the spelling of the program ("name another logdir").

    Raises:
        UserError: another process holds it, or it cannot be written to.
    """

    def __init__(self, folder: Path, cure: str):
        self.folder = folder
        try:
            self._made = [place for place in (folder, *folder.parents) if not place.exists()]
            folder.mkdir(parents=True, exist_ok=True)
            self._is_new = not (folder / _NAME).exists()
            file = lock_file(folder / _NAME)
        except OSError as error:
            raise UserError(f"cannot write to {folder}: {error.strerror or error}; {cure}") from error
        if file is None:
            raise UserError(f"another process is writing to {folder}: wait for it, stop it, or {cure}")
        self._file = file

    def close(self) -> None:
        """Lets others write to the folder."""
        self._file.close()

    def undo(self) -> None:
        """Removes what this lock made, folders only where they hold nothing else, and lets others write."""
        with contextlib.suppress(OSError):
            if self._is_new or os.listdir(self.folder) == [_NAME]:
                (self.folder / _NAME).unlink()
            for place in self._made:
                place.rmdir()
        self.close()


@contextlib.contextmanager
def locked(folder: Path, cure: str) -> Iterator[None]:
    """Holds a folder's lock; where the block fails before it wrote anything, the folder goes again."""
    lock = FolderLock(folder, cure)
    try:
        yield
    except BaseException:
        lock.undo()
        raise
    lock.close()


def child_lock(path: Path) -> IO[str] | None:
    """Returns a locked file for a child process to inherit, which holds the lock for as long as it lives; None while
    another process does."""
    file = lock_file(path)
    if file is not None:
        os.set_inheritable(file.fileno(), True)
    return file
