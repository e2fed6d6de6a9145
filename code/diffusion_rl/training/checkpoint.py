"""Checkpoints: the whole state of a run in one file.

A checkpoint is a safetensors file. The entry "metadata" of its header is JSON: what this checkpoint is (kind, resolved
config, normalization, counters, state of the noise, …) and, under "file", the tensors' names in the order they were
given and a sha256 of the metadata, the names, and every tensor's type, shape and bytes.

Tensors are called `model.<reference name>`, `ema.<…>`, `optimizer.<which>.{exp_avg,exp_avg_sq}.<…>` and `train.<…>`.
Nothing is executed on loading, and what loads is what was saved, to the bit (a compact policy: `in_eight_bits`).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from diffusion_rl.config.targets import modernize
from diffusion_rl.core.errors import UserError, one_line
from diffusion_rl.core.files import atomic_file, read_bytes, require_file
from diffusion_rl.data.normalizers import KEYS

log = logging.getLogger(__name__)

FORMAT = 1
SCALE = ".scale of 8 bits"  # behind a tensor's name: one number for each of its rows
_DTYPES = {
    "BOOL": "?",
    "U8": "u1",
    "U16": "<u2",
    "U32": "<u4",
    "U64": "<u8",
    "I8": "i1",
    "I16": "<i2",
    "I32": "<i4",
    "I64": "<i8",
    "F16": "<f2",
    "F32": "<f4",
    "F64": "<f8",
    "C64": "<c8",
}
_COUNTS = ("obs_dim", "action_dim", "horizon_steps", "denoising_steps", "ft_denoising_steps", "cond_steps")
_TABLES = ("config", "config.train", "train", "normalization", "networks", "sampling", "sizes", "noise", "reference")
_FACTS: dict[type, Sequence[str]] = {  # None stands for a fact that is not known
    str: ("kind", "mode"),
    int: ("format", "epoch", "itr", "step", "steps", "position", *_COUNTS),
    dict: (*_TABLES, *(f"description{part}" for part in ("", ".dataset", ".model", ".diffusion"))),
}
_SAVABLE = {np.dtype(code).name for code in _DTYPES.values()} | {"bfloat16"}
_STATE_FILE = re.compile(r"state_(\d+)\.safetensors")


@dataclasses.dataclass
class Checkpoint:
    """What a file holds: arrays as they were saved (writable copies, in saved order), and JSON metadata."""

    tensors: dict[str, np.ndarray]
    metadata: dict[str, Any]

    @property
    def largest_dimension(self) -> int:
        """Returns the largest dimension of its tensors: what its facts say of sizes cannot be more."""
        return max((size for value in self.tensors.values() for size in value.shape), default=1)

    def select(self, prefix: str) -> dict[str, np.ndarray]:
        """Returns the tensors under `prefix` ("model.", say), named without it."""
        return {name[len(prefix) :]: value for name, value in self.tensors.items() if name.startswith(prefix)}


def save_checkpoint(
    path: str | os.PathLike[str], tensors: Mapping[str, np.ndarray], metadata: Mapping[str, Any]
) -> None:
    """Writes a checkpoint whole or not at all; the file that was there stays until the new one is complete.

    Args:
        path: `*.safetensors`, or `*.pt` for the reference's own format (weights and counter only).
        tensors: Arrays of any shape (0-d too); bool, (u)int8…64, float16…64, bfloat16, complex64.
        metadata: JSON values, numpy scalars and arrays (they load as numbers and lists), NaN and infinities included.

    Raises:
        UserError: the file cannot be written (a full disk, say), a tensor is of another type, or the suffix is unknown.
        TypeError: metadata that JSON cannot hold.
    """
    suffix = _suffix(path)
    if suffix == ".pt":
        from diffusion_rl.interop import reference_checkpoint, torch_checkpoint

        torch_checkpoint.write_pt(path, reference_checkpoint.to_reference(tensors, metadata))
        return
    payload = _encode(tensors, {"format": FORMAT, **metadata})
    with atomic_file(path) as file:
        file.write(payload)


def load_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Reads a checkpoint of ours (`*.safetensors`) or of the reference (`*.pt`), executing nothing.

    Raises:
        UserError: the file is missing, damaged, or not a checkpoint.
    """
    if _suffix(path) == ".pt":
        from diffusion_rl.interop import reference_checkpoint, torch_checkpoint

        data = torch_checkpoint.read_pt(path)
        return Checkpoint(*reference_checkpoint.from_reference(data, name=str(path)))
    return _decode(read_bytes(path, f"no checkpoint at {path}: check the path"), str(path))


def latest_checkpoint(directory: str | os.PathLike[str]) -> Path | None:
    """Returns the `state_<n>.safetensors` of the highest n that loads; None when there is none (or no such folder).

    Damaged ones are skipped, with one warning that names them all.
    """
    return newest_loadable(path for _, path in reversed(numbered_checkpoints(directory)))


def newest_loadable(paths: Iterable[Path]) -> Path | None:
    """Returns the first checkpoint that loads; those before it are skipped, with one warning that names them all."""
    skipped: list[str] = []
    newest = None
    for path in paths:
        try:
            load_checkpoint(path)
        except UserError as error:
            skipped.append(str(error))
            continue
        newest = path
        break
    if skipped:
        log.warning("skipped %s; continuing with %s", "; ".join(skipped), newest or "no checkpoint")
    return newest


def numbered_checkpoints(directory: str | os.PathLike[str]) -> list[tuple[int, Path]]:
    """Returns (n, path) of every `state_<n>.safetensors`, whole or not, by n."""
    folder = Path(directory)
    matches = ((_STATE_FILE.fullmatch(path.name), path) for path in (folder.iterdir() if folder.is_dir() else ()))
    return sorted((int(match[1]), path) for match, path in matches if match)


def checkpoint_metadata(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads the metadata of a checkpoint of ours, unchecked and without its tensors; {} where they cannot be read."""
    try:
        with open(require_file(path), "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            return json.loads(json.loads(file.read(min(length, 1 << 26)))["__metadata__"]["metadata"])
    except (UserError, OSError, ValueError, LookupError, TypeError, RecursionError):
        return {}


def require_kind(checkpoint: Checkpoint, kinds: str | Sequence[str], path: str | os.PathLike[str]) -> None:
    """Refuses a checkpoint that is not of (one of) the wanted kinds.

    Raises:
        UserError: names the file, what it is and what was needed.
    """
    wanted = [kinds] if isinstance(kinds, str) else list(kinds)
    kind = checkpoint.metadata.get("kind", "unknown")
    if kind not in wanted:
        raise UserError(f'{path} is a checkpoint of kind "{kind}"; needed here: {" or ".join(wanted)}')


def finite_weights(name: str, value: np.ndarray) -> bool:
    """Returns whether a tensor [...] is finite throughout; an eta that begins at a limit keeps an infinite logit."""
    return not np.isnan(value).any() if name.endswith("eta_logit") else bool(np.isfinite(value).all())


def not_finite(tensors: Mapping[str, np.ndarray]) -> str | None:
    """Returns the first weight or moment of an optimizer that is NaN or infinite, named as in a checkpoint; None: all
    are fine.

    What stands under "train." and "normalizer." comes from environments and data and is not looked at.
    """
    for name, value in tensors.items():
        if not name.startswith(("train.", "normalizer.")) and not finite_weights(name, value):
            return f"{'moment' if 'optimizer.' in name else 'weight'} {name}"
    return None


def require_finite(weights: Mapping[str, np.ndarray], path: Any) -> None:
    """Raises UserError for weights that were read from `path` if some are NaN or infinite."""
    if bad := not_finite(weights):
        raise UserError(f"{path}: {bad} is not finite (a training diverged); use an earlier checkpoint")


def _suffix(path: str | os.PathLike[str]) -> str:
    suffix = Path(path).suffix
    if suffix not in (".safetensors", ".pt"):
        raise UserError(f"{path}: a checkpoint is called *.safetensors (ours) or *.pt (the PyTorch reference's)")
    return suffix


def _encode(tensors: Mapping[str, np.ndarray], metadata: Mapping[str, Any]) -> bytes:
    # "C" order rather than ascontiguousarray, which would turn 0-d arrays into 1-d ones.
    arrays = {name: _little_endian(np.asarray(value, order="C")) for name, value in tensors.items()}
    for name, array in arrays.items():
        if array.dtype.name not in _SAVABLE or name == "__metadata__" or not name.isprintable():
            raise UserError(f"a checkpoint cannot hold the tensor {name!r} of type {array.dtype}")
    plain = _plain(metadata, "metadata")
    if "file" in plain:
        raise TypeError('the metadata key "file" is taken by the checkpoint itself')
    file = {"tensors": list(arrays), "sha256": _digest(plain, arrays)}
    return safetensors.numpy.save(arrays, {"metadata": json.dumps({**plain, "file": file})})


def _decode(payload: bytes, name: str) -> Checkpoint:
    try:
        length = int.from_bytes(payload[:8], "little")
        header = json.loads(payload[8 : 8 + length]).get("__metadata__") or {}
        arrays = {key: _array(**stored) for key, stored in safetensors.deserialize(payload)}
        if "metadata" not in header:
            raise UserError(
                f"{name} is a safetensors file, but no checkpoint of this package: its header says nothing; give the "
                "state_<n>.safetensors that a training wrote"
            )
        metadata = json.loads(header["metadata"])
        file = metadata.pop("file")
        arrays = {key: arrays.pop(key) for key in file["tensors"]} | arrays
        if _digest(metadata, arrays) != file["sha256"]:
            raise ValueError("its contents do not match their checksum")
        newer = metadata.get("format", FORMAT) > FORMAT
        modernize(metadata.get("config"))
    except (safetensors.SafetensorError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        reason = f"{len(payload)} bytes; {one_line(error)}"
        raise UserError(f"{name} is damaged ({reason}): use another, or delete it") from error
    if newer:
        raise UserError(f"{name} is of format {metadata['format']}, newer than this package's {FORMAT}: update it")
    _check_facts(metadata, name)
    return Checkpoint(_widened(arrays, name), metadata)


def in_eight_bits(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns the tensors as a compact policy stores them, a quarter of the size.

    Matrices become int8, with a float32 scale [rows] for each row (its largest weight is 127); the rest has 16 bits.
    """
    compact = {}
    for name, value in tensors.items():
        if value.ndim < 2:
            compact[name] = value.astype(np.float16)
            continue
        scale = np.maximum(
            np.abs(value).reshape(len(value), -1).max(axis=1, initial=0) / 127, np.finfo(np.float32).tiny
        )
        rows = scale.reshape(-1, *[1] * (value.ndim - 1))
        compact |= {name: np.rint(value / rows).astype(np.int8), name + SCALE: scale.astype(np.float32)}
    return compact


def _widened(tensors: dict[str, np.ndarray], file: str) -> dict[str, np.ndarray]:
    """Returns the tensors of a file with those of a compact policy as float32."""
    wide = {}
    for name, value in tensors.items():
        scale = tensors.get(name + SCALE)
        if scale is not None and value.dtype == np.int8:
            if value.ndim < 2 or scale.shape != value.shape[:1]:
                raise UserError(f"{file} is damaged: the scale of {name} is not one for each of its rows; use another")
            value = value * scale.astype(np.float32).reshape(-1, *[1] * (value.ndim - 1))
        elif name.endswith(SCALE):
            of = tensors.get(name.removesuffix(SCALE))
            if of is None or of.dtype != np.int8:
                raise UserError(f"{file} is damaged: {name} belongs to no tensor of 8 bits; use another")
            continue
        wide[name] = value
    return wide


def _check_facts(metadata: Mapping[str, Any], name: str) -> None:
    """Raises UserError for a fact of another type than it has in a checkpoint that this package wrote."""
    for kind, keys in _FACTS.items():
        for key in keys:
            value: Any = metadata
            for part in key.split("."):
                value = value.get(part) if isinstance(value, dict) else None
            if value is not None and (not isinstance(value, kind) or (kind is int and isinstance(value, bool))):
                wrong = f"its {key} is a {type(value).__name__}, not a {kind.__name__}"
                raise UserError(f"{name} is no checkpoint of this package, {wrong}: use another")
    bounds = metadata.get("normalization") or {}
    for key in KEYS:
        vector = bounds.get(key, [])
        if not isinstance(vector, list) or not all(type(x) in (int, float) and math.isfinite(x) for x in vector):
            raise UserError(f"{name}: its normalization.{key} is no list of finite numbers: use another checkpoint")


def _array(dtype: str, shape: list[int], data: bytes) -> np.ndarray:
    """Returns one stored tensor, as a copy: a view of the file's bytes would be read-only."""
    if dtype == "BF16":
        import ml_dtypes  # comes with TensorFlow; numpy itself has no such type

        numpy_dtype = np.dtype(ml_dtypes.bfloat16)
    else:
        numpy_dtype = np.dtype(_DTYPES[dtype])
    return np.frombuffer(data, numpy_dtype).reshape(shape).copy()


def _digest(metadata: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> str:
    digest = hashlib.sha256(json.dumps([metadata, list(arrays)]).encode())
    for array in arrays.values():
        digest.update(f"{array.dtype.name}{array.shape}".encode())
        digest.update(array.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def _little_endian(array: np.ndarray) -> np.ndarray:
    return array.astype(array.dtype.newbyteorder("<"), copy=False)


def _plain(value: Any, where: str) -> Any:
    """Returns JSON values for `value`. Raises TypeError naming the place of what has none."""
    if value is None or isinstance(value, (str, bool, int, float)):
        return value
    if isinstance(value, np.generic):
        return _plain(value.item(), where)
    if isinstance(value, np.ndarray):
        return _plain(value.tolist(), where)
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, (list, tuple)):
        return [_plain(item, f"{where}[{i}]") for i, item in enumerate(value)]
    if isinstance(value, Mapping):
        if odd := [key for key in value if not isinstance(key, str)]:
            raise TypeError(f"{where} has the key {odd[0]!r}: JSON would turn it into a string")
        return {key: _plain(item, f"{where}.{key}") for key, item in value.items()}
    raise TypeError(f"{where} is a {type(value).__name__}, which JSON cannot hold")
