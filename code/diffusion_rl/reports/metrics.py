"""Metrics of a run: JSON lines, CSV, TensorBoard and, if configured, Weights & Biases.

`metrics.jsonl` is the record; everything else is derived from it and can be rebuilt. A row is a flat mapping with

    itr (or epoch)    the iteration that the row belongs to
    kind              "train" or "eval"
    env_steps         environment steps taken so far (single simulator steps, all environments together)
    episode_return    mean undiscounted return of the episodes finished, where there were any
    …                 any other number or string

A line is one `write` to a file opened for appending, so a process that is killed leaves whole lines; should the
machine itself go down in the middle of one, the torn end is dropped when the run is opened again.
"""

from __future__ import annotations

import contextlib
import csv
import errno
import io
import json
import math
import os
import secrets
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextvars import ContextVar
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np

from diffusion_rl.core.errors import UserError
from diffusion_rl.core.files import read_bytes, write_bytes
from diffusion_rl.core.programs import GO_ON

Value = float | int | str | bool | None
Row = dict[str, Value]

STEP_KEYS = ("itr", "epoch")
_on_row: ContextVar[Callable[[Row], None] | None] = ContextVar("on_row", default=None)


@contextlib.contextmanager
def observed(on_row: Callable[[Row], None] | None) -> Iterator[None]:
    """Lets a function see every row that is written meanwhile."""
    token = _on_row.set(on_row)
    try:
        yield
    finally:
        _on_row.reset(token)


def plain_row(row: Mapping[str, Any]) -> Row:
    """Returns the row with plain Python values: numpy and TensorFlow scalars unpacked, NaN and infinities as None."""
    return {key: _plain(key, value) for key, value in row.items()}


def _plain(key: str, value: Any) -> Value:
    if value is None or isinstance(value, str | bool | int):
        return value
    array = np.asarray(value)
    if array.size != 1 or array.dtype.kind not in "fiub":
        raise TypeError(f"metric {key!r} must be a number, a string or None, not {value!r}")
    number = array.item()
    return None if isinstance(number, float) and not math.isfinite(number) else number


def read_rows(path: str | os.PathLike) -> list[Row]:
    """Returns all rows of a metrics.jsonl. A torn last line is left out; damage elsewhere is a UserError."""
    rows, _ = _parse(Path(path))
    return rows


def _parse(path: Path) -> tuple[list[Row], int]:
    """Returns the rows and the number of bytes that hold them (what follows is a torn line)."""
    rows: list[Row] = []
    good_bytes = 0
    damaged_line = None
    for number, line in enumerate(read_bytes(path).splitlines(keepends=True), start=1):
        row = _parse_line(line)
        if row is None:
            damaged_line = damaged_line or number
        elif damaged_line is not None:
            raise UserError(f"{path}, line {damaged_line} is damaged: restore the file or delete that line")
        else:
            rows.append(row)
            good_bytes += len(line)
    return rows, good_bytes


def _parse_line(line: bytes) -> Row | None:
    if not line.endswith(b"\n"):
        return None
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(row, dict) or any(isinstance(row.get(key), str | list | dict) for key in STEP_KEYS):
        return None
    return row


def step_of(row: Mapping[str, Any]) -> int | None:
    """Returns the iteration (or epoch) that a row belongs to."""
    return next((int(row[key]) for key in STEP_KEYS if row.get(key) is not None), None)


class MetricsWriter:
    """Appends rows to `run_dir/metrics.jsonl` and `metrics.csv`, to TensorBoard and to wandb.

    run_dir      the run folder; rows already there (of a run that goes on) are kept
    tensorboard  write event files to `run_dir/tensorboard`
    wandb        None, or a mapping with `entity`, `project`, `run` and `mode` (all optional). The package is imported
                 only if there is such a mapping and its mode is not "disabled".
    config       resolved configuration, passed to wandb

    A full disk raises UserError; the files then end with the last whole row.
    """

    def __init__(
        self,
        run_dir: str | os.PathLike,
        *,
        tensorboard: bool = True,
        wandb: Mapping[str, Any] | None = None,
        config: Mapping[str, Any] | None = None,
    ):
        self.run_dir = Path(run_dir)
        self.run_dir.mkdir(parents=True, exist_ok=True)
        self.jsonl_path = self.run_dir / "metrics.jsonl"
        self.csv_path = self.run_dir / "metrics.csv"
        self.rows = _repair(self.jsonl_path)
        self._jsonl = _AppendOnlyFile(self.jsonl_path)
        self._csv: _AppendOnlyFile | None = None
        self._columns: list[str] = []
        if self.rows:
            self._rewrite_csv()
        self._tensorboard = _TensorBoard(self.run_dir / "tensorboard") if tensorboard else None
        self._wandb = _start_wandb(self.run_dir, wandb, config)

    def write(self, row: Mapping[str, Any]) -> None:
        """Records one row everywhere. Values: numbers (numpy scalars too), strings, None."""
        plain = plain_row(row)
        self._jsonl.append(_json_line(plain))
        self.rows.append(plain)
        if self._csv is None or not self._known(plain):
            self._rewrite_csv()
        else:
            self._csv.append(_csv_lines(self._columns, [plain]))
        if self._tensorboard is not None:
            self._tensorboard.write(plain)
        if self._wandb is not None:
            self._wandb.log(_tagged(plain), step=step_of(plain))
        if (on_row := _on_row.get()) is not None:
            on_row(plain)

    def truncate(self, after_itr: int) -> None:
        """Drops the rows of iterations later than `after_itr`: a run that goes on writes them again."""
        kept = [row for row in self.rows if (step := step_of(row)) is None or step <= after_itr]
        if len(kept) == len(self.rows):
            return
        self._jsonl.close()
        write_bytes(self.jsonl_path, b"".join(_json_line(row) for row in kept))
        self._jsonl = _AppendOnlyFile(self.jsonl_path)
        self.rows = kept
        self._rewrite_csv()
        if self._tensorboard is not None:
            self._tensorboard.rebuild(kept)

    def close(self) -> None:
        """Closes all files. Further writes are an error."""
        self._jsonl.close()
        if self._csv is not None:
            self._csv.close()
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()
            self._wandb = None

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _known(self, row: Row) -> bool:
        return all(key in self._columns for key in row)

    def _rewrite_csv(self) -> None:
        """Writes the whole file anew, in one step, since a new column changes the header."""
        if self._csv is not None:
            self._csv.close()
        self._columns = list(dict.fromkeys(key for row in self.rows for key in row))
        header = _csv_lines(self._columns, [dict(zip(self._columns, self._columns, strict=True))])
        write_bytes(self.csv_path, header + _csv_lines(self._columns, self.rows))
        self._csv = _AppendOnlyFile(self.csv_path)


def _json_line(row: Row) -> bytes:
    return (json.dumps(row, allow_nan=False, ensure_ascii=False) + "\n").encode()


def _csv_lines(columns: list[str], rows: Iterable[Mapping[str, Any]]) -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    writer.writerows(rows)
    return text.getvalue().encode()


def _repair(path: Path) -> list[Row]:
    """Reads the rows and cuts off a torn end."""
    if not path.exists():
        return []
    rows, good_bytes = _parse(path)
    if good_bytes < path.stat().st_size:
        os.truncate(path, good_bytes)
    return rows


class _AppendOnlyFile:
    """A file that grows by whole records: one `write` system call each, taken back if the disk is full."""

    def __init__(self, path: Path):
        self._path = path
        self._fd: int | None = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)

    def append(self, record: bytes) -> None:
        if self._fd is None:
            raise ValueError(f"{self._path} has been closed")
        size = os.fstat(self._fd).st_size
        try:
            written = os.write(self._fd, record)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            written = 0
        if written < len(record):
            os.ftruncate(self._fd, size)
            raise UserError(f"{self._path}: the disk is full; free some space and run again with {GO_ON}")

    def close(self) -> None:
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None


def _tagged(row: Row) -> dict[str, Value]:
    """Returns names as TensorBoard and wandb group them: train/loss, eval/episode_return."""
    kind = row.get("kind") or "train"
    hidden = (*STEP_KEYS, "kind")
    return {f"{kind}/{key}": value for key, value in row.items() if value is not None and key not in hidden}


class _TensorBoard:
    """Scalars as event files, flushed row by row. TensorFlow is imported when the first row comes."""

    def __init__(self, directory: Path):
        self._directory = directory
        self._writer: Any = None

    def write(self, row: Row) -> None:
        self._add(row)
        self._writer.flush()

    def rebuild(self, rows: list[Row]) -> None:
        """Writes the event files, which cannot be cut, anew from the rows that are kept."""
        self.close()
        shutil.rmtree(self._directory, ignore_errors=True)
        for row in rows:
            self._add(row)
        if self._writer is not None:
            self._writer.flush()

    def _add(self, row: Row) -> None:
        import tensorflow as tf

        if self._writer is None:
            self._writer = tf.summary.create_file_writer(str(self._directory))
        with self._writer.as_default(step=step_of(row) or 0):
            for tag, value in _tagged(row).items():
                if not isinstance(value, str):
                    tf.summary.scalar(tag, float(value))  # type: ignore[arg-type]

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None


def wandb_is_on(wandb: Mapping[str, Any] | None) -> TypeGuard[Mapping[str, Any]]:
    """Returns whether a run with this `wandb` node of the configuration logs to wandb: there is one, and it is not
    disabled."""
    return wandb is not None and len(wandb) > 0 and wandb.get("mode") != "disabled"


def _start_wandb(run_dir: Path, settings: Mapping[str, Any] | None, config: Mapping[str, Any] | None) -> Any:
    if not wandb_is_on(settings):
        return None
    try:
        import wandb
    except ImportError:
        raise UserError("wandb is configured but not installed: pip install -e '.[wandb]', or wandb=null") from None
    # The run's identity lies in the run folder, so that a run that goes on continues the same wandb run.
    id_path = run_dir / "wandb_id"
    if not id_path.exists():
        id_path.write_text(secrets.token_hex(4) + "\n")
    try:
        return wandb.init(
            entity=settings.get("entity"),
            project=settings.get("project"),
            name=settings.get("run"),
            mode=settings.get("mode"),
            dir=str(run_dir),
            config=dict(config) if config else None,
            id=id_path.read_text().strip(),
            resume="allow",
        )
    except Exception as error:  # wandb's own errors: no login, no network, wrong entity
        reason = str(error).strip().splitlines() or [type(error).__name__]
        print(f"wandb did not start ({reason[0]}); the run logs locally", file=sys.stderr)
        return None
