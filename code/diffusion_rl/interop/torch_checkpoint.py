"""PyTorch's `.pt` files, read and written without PyTorch.

A `.pt` file is a zip archive of uncompressed records: `<name>/data.pkl`, a pickle in which every tensor is a call that
refers to a storage by key, and `<name>/data/<key>`, the raw elements of that storage. A pickle is a program. This one
is not run by Python's unpickler, which calls what the program names, but by an interpreter (`core.pickles`) that has no
means to import or to call anything: it knows the dozen names that tensors and dictionaries are made with, builds plain
values for them itself, and refuses the file at the first other name.

Types: float16/32/64, bfloat16, int8…64, uint8…64, bool, complex64/128. Views keep their values and lose their strides.
Tensors of torch's "meta" device have a type and a shape but no elements: `MetaTensor`.
"""

from __future__ import annotations

import collections
import io
import math
import os
import pickle
import struct
import sys
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from diffusion_rl.core.errors import UserError, one_line
from diffusion_rl.core.files import read_bytes, write_bytes
from diffusion_rl.core.pickles import Interpreter, Refused, scalar_key

# torch's storage classes, and the newer element types that have none and are kept as untyped bytes.
_STORAGES = {
    "FloatStorage": "float32",
    "DoubleStorage": "float64",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
    "ComplexFloatStorage": "complex64",
    "ComplexDoubleStorage": "complex128",
}
_UNTYPED = "torch.storage UntypedStorage"
_NEWER_DTYPES = ("uint16", "uint32", "uint64")
_STORAGE_CLASSES = {f"torch {name}": dtype for name, dtype in _STORAGES.items()} | {_UNTYPED: "uint8"}
_DTYPE_NAMES = {f"torch {dtype}" for dtype in (*_STORAGES.values(), *_NEWER_DTYPES)}

_MAX_PICKLE_BYTES = 8_000_000
_MAX_DIMENSIONS = 32
_ALIGNMENT = 64
_LEGACY_START = pickle.dumps(0x1950A86A20F9469CFC6C, protocol=2)


@dataclass(frozen=True)
class MetaTensor:
    """A tensor without elements; its type's name ("float32") and its shape are all there is."""

    dtype: str
    shape: tuple[int, ...]


def read_pt(path: str | os.PathLike[str]) -> Any:
    """Returns what `torch.save` wrote to `path`, with numpy arrays for the tensors; nothing in the file is executed.

    Dictionaries (ordered ones too), lists, tuples, strings, numbers, bools and None come back as themselves, a
    `torch.Size` as a tuple, a `Parameter` as an array, a `torch.dtype` or device as a string, tensors without elements
    as `MetaTensor`. Tensors that are the same view of one storage come back as one array.

    Raises:
        UserError: the file is missing, damaged, of another format, or its pickle wants more than the above.
    """
    name, payload = str(path), read_bytes(path, f"no checkpoint at {path}: check the path")
    if payload.startswith(_LEGACY_START):
        raise UserError(
            f"{name} has the format of torch before 1.6: write it anew with torch.save(torch.load(path, "
            "weights_only=True), path) under a newer torch"
        )
    if not payload.startswith(b"PK"):
        raise UserError(
            f"{name} refused: it is not the zip archive that torch.save writes; nothing in it was executed; give the "
            "state_<n>.pt that a training wrote"
        )
    try:
        archive = _Archive(payload)
        return _Interpreter(archive).run(archive.read("data.pkl"))
    except Refused as error:
        raise UserError(f"{name} refused: {one_line(error)}; nothing in it was executed") from error
    except _DAMAGE as error:
        raise UserError(f"{name} is damaged ({one_line(error)}): use another copy") from error


# What zipfile, pickletools, numpy and the interpreter's own checks raise on contents that make no sense.
_DAMAGE = (
    *(zipfile.BadZipFile, struct.error, ValueError, LookupError, TypeError, ArithmeticError, EOFError),
    *(RuntimeError, AssertionError, AttributeError, MemoryError),
)


class _Archive:
    """The records of a `.pt` file. None can hold more bytes than the file itself, nor can all of them together."""

    def __init__(self, payload: bytes):
        self.size = len(payload)
        self._unread = len(payload)
        self._zip = zipfile.ZipFile(io.BytesIO(payload))
        names = self._zip.namelist()
        pickles = [name for name in names if name.endswith("/data.pkl") and name.count("/") == 1]
        if len(pickles) != 1 or len(set(names)) != len(names):
            raise Refused("it is a zip archive, but not of the form that torch.save writes")
        self._prefix = pickles[0].removesuffix("data.pkl")
        if f"{self._prefix}constants.pkl" in names:
            raise Refused("it is a TorchScript archive (a program); save the model's state_dict instead")
        self.byteorder = self.read("byteorder").decode() if f"{self._prefix}byteorder" in names else "little"
        if self.byteorder not in ("little", "big"):
            raise ValueError("unknown byte order")
        self._storages: dict[str, bytes] = {}

    def read(self, record: str) -> bytes:
        info = self._zip.getinfo(self._prefix + record)
        if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size:
            raise Refused("its records are compressed, which torch.save never does")
        self._unread -= info.file_size
        if self._unread < 0 or (record == "data.pkl" and info.file_size > _MAX_PICKLE_BYTES):
            raise Refused(f"its records claim more bytes than a file of {self.size} bytes can hold")
        return self._zip.read(info)

    def storage(self, key: str, dtype: np.dtype, numel: int) -> np.ndarray:
        """Returns all elements of a storage, [numel], read-only."""
        if key not in self._storages:
            self._storages[key] = self.read(f"data/{key}")
        stored = self._storages[key]
        if len(stored) != numel * dtype.itemsize:
            raise ValueError(f"storage {key} holds {len(stored)} bytes, not {numel} elements of {dtype}")
        elements = np.frombuffer(stored, dtype) if stored else np.empty(0, dtype)
        return elements if self.byteorder == sys.byteorder else elements.byteswap()


class _Global(str):
    """A name the pickle may use, as "module name". A label: it is never looked up, so it cannot be called."""


class _Storage:
    """What a persistent id stands for."""

    def __init__(self, key: str, dtype: str, numel: int):
        self.key, self.dtype, self.numel = key, dtype, numel


class _Interpreter(Interpreter):
    """Knows tensors, and what else torch writes."""

    WRITER = "torch.save"

    def __init__(self, archive: _Archive):
        super().__init__()
        self._archive = archive
        self._tensors: dict[tuple[Any, ...], np.ndarray] = {}
        # Views can repeat elements: what they add up to is kept in proportion to the file.
        self._allowance = 16_000_000 + 4 * archive.size

    def run(self, program: bytes) -> Any:
        result = super().run(program)
        _require_plain(result)
        return result

    def find(self, name: str) -> Any:
        if name in _DTYPE_NAMES:
            return name.replace(" ", ".")
        if name in _FUNCTIONS or name in _STORAGE_CLASSES:
            return _Global(name)
        raise Refused(f"this pickle wants {name.replace(' ', '.')}, which has no place in a checkpoint")

    def call(self, function: Any, arguments: tuple[Any, ...]) -> Any:
        if type(function) is not _Global or function not in _FUNCTIONS:
            raise Refused(f"this pickle wants to call a {type(function).__name__}")
        return _FUNCTIONS[function](self, *arguments)

    def build(self, target: Any, state: Any) -> None:
        """Drops the state of a state_dict, its modules' version numbers. Nothing else has attributes."""
        if type(target) is not collections.OrderedDict or type(state) is not dict:
            raise Refused(f"this pickle wants to set the state of a {type(target).__name__}")

    def persistent(self, pid: Any) -> Any:
        kind, storage_class, key, _location, numel = pid
        if kind != "storage" or type(storage_class) is not _Global or storage_class not in _STORAGE_CLASSES:
            raise Refused("this pickle refers to something that is not a storage")
        if type(key) is not str:
            raise ValueError("a storage's key is not a string")
        return _Storage(key, _STORAGE_CLASSES[storage_class], _natural(numel))

    # The functions a pickle may "call".

    def _ordered_dict(self, items: Any = ()) -> collections.OrderedDict[Any, Any]:
        self.spend(len(items))
        return collections.OrderedDict([(scalar_key(key), value) for key, value in items])

    def _tensor_v2(self, storage: Any, offset: Any, size: Any, stride: Any, *rest: Any) -> np.ndarray:
        if len(rest) > 2 and rest[2]:  # after requires_grad and hooks
            raise Refused("it holds a lazily conjugated or negated tensor: save tensor.resolve_conj().resolve_neg()")
        return self._view(storage, offset, size, stride)

    def _tensor_v3(
        self, storage: Any, offset: Any, size: Any, stride: Any, grad: Any, hooks: Any, dtype: Any, *rest: Any
    ) -> np.ndarray:
        if type(dtype) is not str or dtype.replace(".", " ") not in _DTYPE_NAMES:
            raise ValueError("unknown element type")
        element = _dtype(dtype.removeprefix("torch."))
        typed = _Storage(storage.key, element.name, storage.numel // element.itemsize)
        return self._tensor_v2(typed, offset, size, stride, grad, hooks, *rest)

    def _meta_tensor(self, dtype: Any, size: Any, _stride: Any, _grad: Any) -> MetaTensor:
        if type(dtype) is not str or dtype.replace(".", " ") not in _DTYPE_NAMES or len(size) > _MAX_DIMENSIONS:
            raise ValueError("a tensor without elements whose type or size makes no sense")
        return MetaTensor(dtype.removeprefix("torch."), tuple(map(_natural, size)))

    def _parameter(self, data: Any, *_: Any) -> np.ndarray | MetaTensor:
        if type(data) not in (np.ndarray, MetaTensor):
            raise ValueError("a parameter that is not a tensor")
        return data

    def _size(self, dimensions: Any) -> tuple[Any, ...]:
        if len(dimensions) > _MAX_DIMENSIONS:
            raise ValueError("a size of too many dimensions")
        return tuple(dimensions)

    def _device(self, *parts: Any) -> str:
        return ":".join(str(part)[:20] for part in parts[:2] if type(part) in (str, int))

    def _view(self, storage: Any, offset: Any, size: Any, stride: Any) -> np.ndarray:
        """Returns the tensor of shape `size`, contiguous. One array for one and the same view."""
        if len(size) != len(stride) or len(size) > _MAX_DIMENSIONS or type(storage) is not _Storage:
            raise ValueError("a tensor's size, stride and storage do not fit together")
        shape, strides = tuple(map(_natural, size)), tuple(map(_natural, stride))
        view = (storage.key, storage.dtype, _natural(offset), shape, strides)
        if view not in self._tensors:
            dtype, count = _dtype(storage.dtype), math.prod(shape)
            elements = self._archive.storage(storage.key, dtype, storage.numel)
            last = offset + sum((n - 1) * step for n, step in zip(shape, strides, strict=True))
            if count and last >= storage.numel:
                raise Refused(f"a tensor reaches element {last} of a storage of {storage.numel}")
            self._allowance -= count * dtype.itemsize
            if self._allowance < 0:
                raise Refused(f"its tensors claim more bytes than a file of {self._archive.size} bytes can hold")
            self._tensors[view] = _copy_view(elements[offset:], shape, strides) if count else np.empty(shape, dtype)
        return self._tensors[view]


_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "collections OrderedDict": _Interpreter._ordered_dict,
    "torch._utils _rebuild_tensor": _Interpreter._tensor_v2,
    "torch._utils _rebuild_tensor_v2": _Interpreter._tensor_v2,
    "torch._utils _rebuild_tensor_v3": _Interpreter._tensor_v3,
    "torch._utils _rebuild_meta_tensor_no_storage": _Interpreter._meta_tensor,
    "torch._utils _rebuild_parameter": _Interpreter._parameter,
    "torch._utils _rebuild_parameter_with_state": _Interpreter._parameter,
    "torch Size": _Interpreter._size,
    "torch device": _Interpreter._device,
}


def _natural(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 2**63:
        raise ValueError("a size, stride or offset that is not a natural number")
    return value


def _dtype(name: str) -> np.dtype:
    if name == "bfloat16":
        import ml_dtypes  # comes with TensorFlow; numpy itself has no such type

        name = ml_dtypes.bfloat16
    dtype: np.dtype = np.dtype(name)
    return dtype


def _copy_view(elements: np.ndarray, shape: tuple[int, ...], strides: tuple[int, ...]) -> np.ndarray:
    """Returns a contiguous copy of the strided view (strides in elements; the caller has checked that it stays
    inside)."""
    steps = [step * elements.itemsize for step in strides]
    # Strides along dimensions of length 1 are arbitrary: torch writes them, numpy need not be able to hold them.
    steps = [step if n > 1 else 0 for n, step in zip(shape, steps, strict=True)]
    return np.lib.stride_tricks.as_strided(elements, shape, steps, writeable=False).copy(order="C")


def _require_plain(result: Any) -> None:
    """Refuses results that still hold a stand-in. Each object is visited once, however often it is referred to."""
    pending, seen = [result], set()
    while pending:
        value = pending.pop()
        if isinstance(value, (_Global, _Storage)):
            raise Refused("it holds a bare class, function or storage where a value should be")
        if isinstance(value, (dict, list, tuple)) and id(value) not in seen:
            seen.add(id(value))
            pending.extend([*value.keys(), *value.values()] if isinstance(value, dict) else value)


def write_pt(path: str | os.PathLike[str], data: Any) -> None:
    """Writes `data` so that `torch.load(path, weights_only=True)` gives it back with tensors for the arrays.

    The file is written whole or not at all. An array object that occurs several times is stored once and loads as
    tensors that share it, as torch itself does. The same data give the same bytes.

    Args:
        data: Dictionaries, lists, tuples, strings, numbers, bools, None, `MetaTensor`s, and arrays of the types listed
            above.

    Raises:
        UserError: the file cannot be written, or `data` holds something else.
    """
    writer = _Writer()
    writer.value(data)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        _add_record(archive, "archive/data.pkl", b"\x80\x02" + bytes(writer.program) + b".")
        _add_record(archive, "archive/byteorder", b"little")
        for key, array in enumerate(writer.arrays):
            stored = np.asarray(array, order="C")
            stored = stored.astype(stored.dtype.newbyteorder("<"), copy=False)
            _add_record(archive, f"archive/data/{key}", stored.tobytes())
        _add_record(archive, "archive/version", b"3\n")
    write_bytes(path, buffer.getbuffer())


def _add_record(archive: zipfile.ZipFile, name: str, contents: bytes) -> None:
    """Adds a record whose contents begin at a multiple of 64 bytes, as torch has it for memory mapping."""
    info = zipfile.ZipInfo(name)  # with the date 1980-01-01
    assert archive.fp is not None
    begin = archive.fp.tell() + 30 + len(name) + 4
    padding = -begin % _ALIGNMENT
    info.extra = b"FB" + struct.pack("<H", padding) + b"Z" * padding
    archive.writestr(info, contents)


class _Writer:
    """Emits the pickle of plain values (protocol 2, without memo) and collects the arrays to store."""

    def __init__(self) -> None:
        self.program = bytearray()
        self.arrays: list[np.ndarray] = []
        self._keys: dict[int, int] = {}
        self._depth = 0

    def value(self, value: Any) -> None:
        self._depth += 1
        if self._depth > 100:
            raise UserError("cannot write values nested more than 100 deep (or within themselves) to a .pt file")
        if isinstance(value, np.generic):
            value = value.item()
        if value is None or isinstance(value, (bool, int, float, str)):
            self.program += _literal(value)
        elif isinstance(value, np.ndarray):
            self._tensor(value)
        elif isinstance(value, MetaTensor):
            self._meta_tensor(value)
        elif isinstance(value, Mapping):
            ordered = isinstance(value, collections.OrderedDict)
            self.program += _name("collections OrderedDict") + b")R" if ordered else b"}"
            self._items((part for item in value.items() for part in item), b"u")
        elif isinstance(value, list):
            self.program += b"]"
            self._items(value, b"e")
        elif isinstance(value, tuple):
            self._items(value, b"t")
        else:
            raise UserError(f"a .pt file cannot hold a {type(value).__name__} here: only arrays and plain values")
        self._depth -= 1

    def _items(self, items: Any, end: bytes) -> None:
        self.program += b"("
        for item in items:
            self.value(item)
        self.program += end

    def _tensor(self, array: np.ndarray) -> None:
        key = self._keys.setdefault(id(array), len(self._keys))
        if key == len(self.arrays):
            self.arrays.append(array)
        untyped = array.dtype.name in _NEWER_DTYPES
        if untyped:
            storage_class, length = _UNTYPED, array.nbytes
        elif array.dtype.name in _STORAGES.values():
            classes = {dtype: name for name, dtype in _STORAGES.items()}
            storage_class, length = f"torch {classes[array.dtype.name]}", array.size
        else:
            raise UserError(f"a .pt file cannot hold an array of type {array.dtype}")
        self.program += _name(f"torch._utils _rebuild_tensor_v{3 if untyped else 2}") + b"("
        self.program += b"(" + _literal("storage") + _name(storage_class) + _literal(str(key)) + _literal("cpu")
        self.program += _literal(length) + b"tQ" + _literal(0)
        self.value(array.shape)
        self.value(_contiguous_strides(array.shape))
        self.program += _literal(False) + _name("collections OrderedDict") + b")R"
        self.program += (_name(f"torch {array.dtype.name}") if untyped else b"") + b"tR"

    def _meta_tensor(self, tensor: MetaTensor) -> None:
        self.program += _name("torch._utils _rebuild_meta_tensor_no_storage") + b"(" + _name(f"torch {tensor.dtype}")
        self.value(tensor.shape)
        self.value(_contiguous_strides(tensor.shape))
        self.program += _literal(False) + b"tR"


def _contiguous_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Returns strides in elements; dimensions of length 0 count as 1, as in torch."""
    return tuple(math.prod(max(n, 1) for n in shape[i + 1 :]) for i in range(len(shape)))


def _name(name: str) -> bytes:
    return b"c" + name.replace(" ", "\n").encode() + b"\n"


def _literal(value: bool | float | str | None) -> bytes:
    if value is None:
        return b"N"
    if isinstance(value, bool):
        return b"\x88" if value else b"\x89"
    if isinstance(value, int):
        if -(2**31) <= value < 2**31:
            return b"J" + struct.pack("<i", value)
        encoded = pickle.encode_long(value)
        if len(encoded) > 255:
            raise UserError("a .pt file cannot hold an integer of more than 255 bytes")
        return b"\x8a" + bytes([len(encoded)]) + encoded
    if isinstance(value, float):
        return b"G" + struct.pack(">d", value)
    text = value.encode("utf-8", "surrogatepass")
    return b"X" + struct.pack("<I", len(text)) + text
