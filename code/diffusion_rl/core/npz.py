"""Arrays of numbers in npy and npz files, whose declared sizes are compared with what is there before they are read."""

from __future__ import annotations

import math
import os
import zipfile
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import BinaryIO

import numpy as np

from diffusion_rl.core.errors import UserError, listed
from diffusion_rl.core.files import atomic_file, reading, require_file

FREE_BYTES, LARGEST_RATIO = 1 << 27, 100  # a compressed file may hold so many bytes, or so many times its own size
_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)  # those that numpy writes
_NUMBERS = "biuf"
_CURE = "fetch or make it again"
_NO_NPZ = "is damaged or not an npz of plain arrays, so it cannot be read"


class Allowance:
    """How many bytes a compressed file may expand to; `take` says where they are exceeded.

    Args:
        path: of the file, whose size on the disk counts.
    """

    def __init__(self, path: Path):
        self.path, self.size = path, path.stat().st_size
        self.left = FREE_BYTES + LARGEST_RATIO * self.size

    def take(self, count: int, what: str) -> None:
        """Counts so many bytes for `what`. Raises UserError where they are more than is left."""
        self.left -= count
        if self.left < 0:
            raise UserError(
                f"{self.path}: {listed([what])} claims {count} bytes in a file of {self.size}; at most {LARGEST_RATIO} "
                f"times the file's size are read (and {FREE_BYTES >> 20} MB): write it again with less compression"
            )


def read_npz(
    path: str | os.PathLike[str], keys: Collection[str] | None = None, missing: str = ""
) -> dict[str, np.ndarray]:
    """Returns arrays of an npz file, those of `keys` that are there, or all.

    Raises:
        UserError: no such file (`missing` is what to say then), a damaged one, arrays of anything but numbers, or
            arrays that claim to be larger than the file can hold.
    """
    path, arrays = require_file(path, missing), {}
    with reading(path, _CURE, _NO_NPZ):
        allowance = Allowance(path)
        with zipfile.ZipFile(path) as archive:
            for info in archive.infolist():
                key = info.filename.removesuffix(".npy")
                if keys is None or key in keys:
                    allowance.take(info.file_size, key)
                    arrays[key] = _member(archive, info, key)
    return arrays


def names_in(path: str | os.PathLike[str]) -> list[str]:
    """Returns names of the arrays in an npz file, sorted. Raises UserError as `read_npz` does."""
    path = require_file(path)
    with reading(path, _CURE, _NO_NPZ), zipfile.ZipFile(path) as archive:
        return sorted(name.removesuffix(".npy") for name in archive.namelist())


def read_npy(path: str | os.PathLike[str], mmap: bool = False) -> np.ndarray:
    """Reads the array [...] of numbers in an npy file; `mmap`: as a view of the file.

    Raises:
        UserError: no such file, a damaged one, or an array of anything but numbers.
    """
    path = require_file(path, f"{path} is missing")
    with reading(path, _CURE, "is no npy file of numbers"):
        with open(path, "rb") as file:
            _require_numbers(file, path.stat().st_size, "it")
        return np.load(path, allow_pickle=False, mmap_mode="r" if mmap else None)


def write_npz(path: Path, arrays: Mapping[str, np.ndarray]) -> Path:
    """Writes a compressed npz file whole or not at all. Raises UserError where that is impossible."""
    with atomic_file(path) as file:
        np.savez_compressed(file, **arrays)  # type: ignore[arg-type]  # whose keywords are arrays
    return path


def _member(archive: zipfile.ZipFile, info: zipfile.ZipInfo, name: str) -> np.ndarray:
    if info.compress_type not in _METHODS or info.flag_bits & 1:
        raise ValueError(f"{name} is compressed or encrypted by other means than numpy's")
    with archive.open(info) as file:
        _require_numbers(file, info.file_size, name)  # type: ignore[arg-type]
    with archive.open(info) as file:
        return np.lib.format.read_array(file, allow_pickle=False)


def _require_numbers(file: BinaryIO, size: int, name: str) -> None:
    """Raises ValueError unless the header describes numbers that take up the rest of the file of `size` bytes."""
    version = np.lib.format.read_magic(file)
    if version not in ((1, 0), (2, 0), (3, 0)):
        raise ValueError(f"version {version} of the format is unknown")
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read(file)
    if dtype.kind not in _NUMBERS:
        raise ValueError(f"{name} holds values of type {dtype}, not numbers")
    claimed, there = dtype.itemsize * math.prod(shape), size - file.tell()
    if claimed != there or min(shape, default=0) < 0:
        raise ValueError(f"{name} claims {claimed} bytes for its shape {shape}, but has {there}")
