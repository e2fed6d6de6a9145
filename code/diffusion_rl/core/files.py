"""Files: written whole or not at all, and read only where they are what they should be."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, BinaryIO

from diffusion_rl.core.errors import UserError, one_line

_TEMPORARY = ".writing-"
_LARGEST_JSON = 64_000_000  # bytes
_HOLES, _SMALL = 100, 1 << 26  # a larger file than this may be at most so many times as large as what is on the disk
_OTHERS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def require_file(path: str | os.PathLike[str], missing: str = "") -> Path:
    """Returns the path of a regular file, which reading neither blocks nor fills with nothing.

    Args:
        missing: what to say where there is none; "no such file: <path>" by default.

    Raises:
        UserError: there is none, it cannot be reached, it is a folder, a pipe or a device, or it consists of holes.
    """
    try:
        facts = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(missing or f"no such file: {path}") from None
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
        raise UserError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from error
    if not stat.S_ISREG(facts.st_mode):
        kind = _OTHERS.get(stat.S_IFMT(facts.st_mode), "something else")
        raise UserError(f"{path} is {kind}, not a file: give the file itself")
    if facts.st_size > _SMALL and facts.st_size > _HOLES * 512 * facts.st_blocks:
        raise UserError(f"{path} claims {facts.st_size} bytes, of which hardly any were ever written: get it again")
    return Path(path)


def read_bytes(path: str | os.PathLike[str], missing: str = "", most: int | None = None) -> bytes:
    """Returns the contents of a regular file (see `require_file`) of at most `most` bytes."""
    with reading(path, "get it again, or check who may read it"), open(require_file(path, missing), "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if most is not None and size > most:
            raise UserError(f"{path} has {size} bytes, more than the {most} that are read of such a file")
        return file.read()


def read_json(path: str | os.PathLike[str], missing: str = "") -> Any:
    """Returns the value in a JSON file. Raises UserError where there is none, or where it is no JSON."""
    payload = read_bytes(path, missing, _LARGEST_JSON)
    with reading(path, "write it again, or delete it", "is no JSON, or damaged"):
        return json.loads(payload)


@contextlib.contextmanager
def reading(path: str | os.PathLike[str], cure: str, what: str = "cannot be read") -> Iterator[None]:
    """Turns whatever libraries raise on a damaged file into one line: `<path> <what> (<their reason>): <cure>`."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # half a dozen kinds from each library; a MemoryError, too
        raise UserError(f"{path} {what} ({one_line(error)}): {cure}") from error


@contextlib.contextmanager
def atomic_file(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Yields a binary file to write that takes the name `path` only once it is complete and on the disk.

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


def require_writable(path: str | os.PathLike[str]) -> None:
    """Raises UserError unless a file can be written at `path`: before the work whose result it is to hold."""
    target = Path(path)
    if os.path.isdir(target):
        raise UserError(f"cannot write {target}: it is a folder")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary, file = _open_temporary(target)
        with file:
            temporary.unlink()
    except OSError as error:
        raise UserError(_explain(target, error)) from error


def lock_file(path: str | os.PathLike[str]) -> IO[str] | None:
    """Opens a file, locked by this process until it is closed; returns None where another process has it.

    File systems without locks go without.
    """
    while True:
        file = os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666), "w")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            return None
        except OSError:
            pass
        if os.fstat(file.fileno()).st_nlink:
            return file
        file.close()  # it was removed between its opening and its lock


def _open_temporary(target: Path) -> tuple[Path, BinaryIO]:
    """Returns an empty temporary file beside `target`, locked for as long as it is open: the lock says that it is in
    use."""
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
    """Deletes the temporary files whose writers are gone: their locks went with them."""
    for leftover in folder.glob(f".*{_TEMPORARY}*"):
        with contextlib.suppress(OSError), open(leftover, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            leftover.unlink()


def _sync_folder(folder: Path) -> None:
    """Puts the renaming itself on the disk. The file is complete by now: not being able to is no error."""
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


def write_bytes(path: str | os.PathLike[str], content: bytes | memoryview) -> None:
    """Writes a file whole or not at all (see `atomic_file`)."""
    with atomic_file(path) as file:
        file.write(content)


def write_json(path: str | os.PathLike[str], facts: Any) -> None:
    """Writes values as JSON with sorted keys, indented, whole or not at all."""
    write_bytes(path, (json.dumps(facts, indent=2, sort_keys=True) + "\n").encode())
