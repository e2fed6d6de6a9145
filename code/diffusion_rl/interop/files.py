"""Files that are written whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from diffusion_rl.core.errors import UserError

_TEMPORARY = ".writing-"


@contextlib.contextmanager
def atomic_file(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """A binary file to write that takes the name `path` only once it is complete and on the disk.

    It is written under a temporary name beside `path`, flushed, and renamed; whatever happens, `path` is either what it
    was or the whole new file. The temporary file goes when the block fails; one left by a killed process goes at the
    next write into the folder. Missing folders are made.

    Raises:
        UserError: the operating system refused (a full disk, no permission, …); `path` is untouched.
    """
    target = Path(path)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(target.parent)
        temporary, file = _open_temporary(target)
        try:
            with file:
                yield file
                file.flush()
                os.fsync(file.fileno())
                os.replace(temporary, target)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise
    except OSError as error:
        raise UserError(_explain(target, error)) from error
    _sync_folder(target.parent)


def _open_temporary(target: Path) -> tuple[Path, BinaryIO]:
    """An empty temporary file beside `target`, locked for as long as it is open: the lock says that it is in use."""
    for attempt in range(1000):
        temporary = target.with_name(f".{target.name}{_TEMPORARY}{os.getpid()}-{attempt}")
        try:
            # Not the tempfile module: it would take away what the umask grants to others.
            file = os.fdopen(os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666), "w+b")
        except FileExistsError:
            continue
        with contextlib.suppress(OSError):  # some network drives know no locks: there a leftover simply stays
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(file.fileno()).st_nlink:
            return temporary, file
        file.close()  # another process took it for abandoned between its creation and its lock
    raise FileExistsError(errno.EEXIST, "no free temporary name beside it")


def _remove_abandoned(folder: Path) -> None:
    """Delete the temporary files whose writers are gone: their locks went with them."""
    for leftover in folder.glob(f".*{_TEMPORARY}*"):
        with contextlib.suppress(OSError), open(leftover, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            leftover.unlink()


def _sync_folder(folder: Path) -> None:
    """Put the renaming itself on the disk. The file is complete by now: not being able to is no error."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _explain(target: Path, error: OSError) -> str:
    reason = error.strerror or str(error)
    if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return f"cannot write {target}: {reason}"
    try:
        room = f" ({shutil.disk_usage(target.parent).free / 1e6:.1f} MB free there)"
    except OSError:
        room = ""
    return f"cannot write {target}: {reason}{room}; make room or choose another folder; nothing was overwritten"
