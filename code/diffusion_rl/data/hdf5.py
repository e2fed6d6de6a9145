"""HDF5 files of unknown origin: nothing is read before its size is known.

What an `open_hdf5` gives are groups and arrays that look only at the file itself: external links, external storage and
virtual data sets, which lie in other files, are refused, and so are arrays that were not written as a whole and chunks
that expand to more than they should. Whatever is damaged is a UserError that names file and field.
"""

from __future__ import annotations

import contextlib
import io
import math
import os
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import h5py
import numpy as np

from diffusion_rl.core.errors import UserError
from diffusion_rl.core.files import atomic_file, reading, require_file
from diffusion_rl.core.npz import Allowance

_CURE = "get the file again, or write it anew"
_MOST_LINKS = 16  # that one name may lead through
_NUMBERS = "biuf"
_FILTERS = {h5py.h5z.FILTER_DEFLATE, h5py.h5z.FILTER_SHUFFLE, h5py.h5z.FILTER_FLETCHER32, h5py.h5z.FILTER_LZF}
_SMALL_CHUNK = 1 << 16  # bytes; zlib expands to 1032 times as many at most


@contextlib.contextmanager
def open_hdf5(path: str | os.PathLike[str], what: str = "an HDF5 file") -> Iterator[Group]:
    """Opens the root of a file.

    Args:
        what: it should be, for messages.

    Raises:
        UserError: no such file, no HDF5, or damaged.

    """
    path = require_file(path)
    with reading(path, _CURE, f"is not {what}, or it is damaged"):
        file = h5py.File(path, "r")
    with file:
        yield Group(file, str(path), Allowance(path))


def write_hdf5(path: str | os.PathLike[str], arrays: Mapping[str, np.ndarray]) -> None:
    """Writes compressed arrays whole or not at all. Raises UserError where that is impossible.

    The file is made in memory: where a disk is full, the library cannot close what it has begun to write there.
    """
    buffer = io.BytesIO()
    with h5py.File(buffer, "w") as file:
        for name, array in arrays.items():
            file.create_dataset(name, data=array, compression="gzip")
    with atomic_file(path) as target:
        target.write(buffer.getbuffer())


class Group:
    """A group of a file.

    Attributes: where (file and path within it, for messages).
    """

    def __init__(self, node: h5py.Group, where: str, allowance: Allowance):
        self._node, self.where, self._allowance = node, where, allowance

    def _place(self, name: str) -> str:
        return f"{self.where}{': ' if self._node.name == '/' else '/'}{name}"

    def names(self) -> list[str]:
        """Lists what is in it, sorted."""
        with reading(self.where, _CURE):
            return sorted(self._node)

    def __contains__(self, name: str) -> bool:
        return self._find(name) is not None

    def group(self, name: str) -> Group | None:
        """Returns the group of that name ("a/b"); None where there is none or something else."""
        node = self._find(name)
        return Group(node, self._place(name), self._allowance) if isinstance(node, h5py.Group) else None

    def is_array(self, name: str) -> bool:
        """Whether there is an array of that name."""
        return isinstance(self._find(name), h5py.Dataset)

    def texts(self, name: str) -> list[str]:
        """Reads a list of short texts of a fixed length. Raises UserError where there is none or something else."""
        with reading(self._place(name), _CURE):
            return [text.decode() for text in self.array(name, kinds="S").read().ravel()]

    def array(self, name: str, kinds: str = _NUMBERS) -> Array:
        """Returns the array of that name ("a/b"). Raises UserError where there is none or something else.

        kinds: of numpy's types that it may hold.
        """
        where = self._place(name)
        node = self._find(name)
        if not isinstance(node, h5py.Dataset):
            raise UserError(f"{where} is {'missing' if node is None else 'no array'}: {_CURE}")
        with reading(where, _CURE):
            return Array(node, where, self._allowance, kinds)

    def _find(self, name: str) -> Any:
        """Finds a node, following links within the file one by one; None where nothing has this name."""
        with reading(self._place(name), _CURE):
            node, parts = self._node, name.split("/")
            for _ in range(_MOST_LINKS * len(parts)):
                part = parts.pop(0).encode()
                if not isinstance(node, h5py.Group) or not node.id.links.exists(part):
                    return None
                kind = node.id.links.get_info(part).type
                if kind == h5py.h5l.TYPE_HARD:
                    node = node[part]
                elif kind == h5py.h5l.TYPE_SOFT:
                    target = node.id.links.get_val(part).decode()
                    node = node.file if target.startswith("/") else node
                    parts = [name for name in target.split("/") if name not in ("", ".")] + parts
                else:
                    raise UserError(f"{self._place(name)} lies in another file: copy it into this one")
                if not parts:
                    return node
            raise ValueError("its links lead nowhere")


class Array:
    """An array of numbers in a file that is read only by `read`; has a `shape`, a `dtype` and `len`."""

    def __init__(self, node: h5py.Dataset, where: str, allowance: Allowance, kinds: str = _NUMBERS):
        self._node, self.where, self._allowance = node, where, allowance
        if node.is_virtual or node.external:
            raise UserError(f"{where} lies in another file: copy it into this one")
        if not node.shape:
            raise UserError(f"{where} is empty or a single value, not an array of rows")
        if node.dtype.kind not in kinds:
            raise UserError(f"{where} holds values of type {node.dtype}, not numbers")
        self.shape, self.dtype = node.shape, node.dtype

    @property
    def stored(self) -> h5py.Dataset:
        """Returns the data set of h5py, to read single rows of."""
        return self._node

    def __len__(self) -> int:
        return int(self.shape[0])

    def read(self) -> np.ndarray:
        """Reads all of it. Raises UserError where it claims to be larger than the file can hold, or is damaged."""
        with reading(self.where, _CURE):
            size = _bytes(self.shape, self.dtype)
            self._allowance.take(size, self._node.name)
            self._require_written(size)
            return self._node[()]

    def _require_written(self, size: int) -> None:
        """Raises UserError unless all of its `size` bytes were written, as such or compressed."""
        node = self._node
        filters = self._filters()
        if not filters and (there := node.id.get_storage_size()) < size:
            raise UserError(f"{self.where}: only {there} of its {size} bytes were ever written: {_CURE}")
        if filters:
            self._require_chunks(_bytes(node.chunks, self.dtype))

    def _filters(self) -> list[int]:
        """Returns the numbers of its chunks' filters. Raises UserError for others than those of `_FILTERS`."""
        plan = self._node.id.get_create_plist()
        filters = [plan.get_filter(i)[0] for i in range(plan.get_nfilters())] if self._node.chunks else []
        if not set(filters) <= _FILTERS or len(set(filters)) < len(filters):
            raise UserError(f"{self.where} is compressed by other means than gzip or lzf, once: h5repack -f GZIP=4")
        return filters

    def _require_chunks(self, size: int) -> None:
        """Raises UserError unless every chunk is there, and none expands to more than its `size` in bytes."""
        self._allowance.take(size, f"a chunk of {self._node.name}")
        expected = math.prod(-(-n // chunk) for n, chunk in zip(self.shape, self._node.chunks, strict=True))
        if (there := self._node.id.get_num_chunks()) < expected:
            raise UserError(f"{self.where}: only {there} of its {expected} parts were ever written: {_CURE}")
        self._node.id.chunk_iter(lambda chunk: self._require_bounded(chunk, size))

    def _require_bounded(self, chunk: Any, size: int) -> None:
        most = size + size // 8 + 1024  # incompressible data grow a little
        if chunk.size > most:
            raise ValueError(f"a chunk of {chunk.size} bytes, where {size} fit")
        if chunk.size > _SMALL_CHUNK and self._node.compression == "gzip":
            _, stored = self._node.id.read_direct_chunk(chunk.chunk_offset)
            unpacking = zlib.decompressobj()
            unpacking.decompress(stored, most)
            if unpacking.unconsumed_tail:
                raise ValueError(f"a chunk that expands to more than its {size} bytes")


def _bytes(shape: tuple[int, ...], dtype: np.dtype) -> int:
    """Returns the size of an array in Python's integers, which do not overflow."""
    return math.prod(map(int, shape)) * dtype.itemsize
