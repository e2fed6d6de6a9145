"""A run's folder: configuration, metrics, states, and stopping on request without losing anything."""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from diffusion_rl.config.compose import to_yaml
from diffusion_rl.core.errors import Interrupted, UserError
from diffusion_rl.core.files import atomic_file
from diffusion_rl.reports.metrics import MetricsWriter
from diffusion_rl.training.checkpoint import (
    Checkpoint,
    checkpoint_metadata,
    load_checkpoint,
    not_finite,
    save_checkpoint,
)
from diffusion_rl.training.continuation import AUTO, NEVER, Spelling, asked_state, find_state
from diffusion_rl.training.locks import FolderLock
from diffusion_rl.training.signals import StopRequest
from diffusion_rl.training.state_files import StateFiles

CHECKPOINT_SECONDS = 60.0  # a passing checkpoint at least this far apart, beside those that are kept
Held = tuple[int, Mapping[str, np.ndarray], Mapping[str, Any]]  # number, tensors, metadata
Row = dict[str, Any]


class RunDir:
    """Everything that a training run leaves behind: `config.yaml`, `metrics.jsonl` and what is derived from it, states.

    Entering it locks the folder and finds the state to go on from; nothing else is written before `begin`:

        with RunDir(path, settings, StateFiles("dppo", settings)) as run_dir:
            if run_dir.checkpoint is not None: ...restore...
            run_dir.begin(last_row)
            for itr in ...:
                run_dir.log(row)
                run_dir.remember(itr, *state, keep=itr % 100 == 0)
                run_dir.stop_if_requested()

    Args:
        path: of the folder; another one where the settings ask to go on with a run that lies elsewhere.
        settings: of the run, resolved. Read here: what to go on from (`continuation.asked_state`), `stop_at`,
            `tensorboard`, `wandb`.
        files: where the states lie.
        spelling: how the program writes what its user can do.

    Attributes:
        checkpoint, source: the state to go on from and its path; None: the run begins.
        stop_at: the step at which this part of the run ends; None: at the end.
    """

    metrics: MetricsWriter

    def __init__(
        self, path: str | Path, settings: Mapping[str, Any], files: StateFiles, spelling: Spelling | None = None
    ):
        self.path, self.settings, self.files, self.spelling = Path(path), settings, files, spelling or Spelling()
        asked_state(settings)
        train = settings.get("train")
        stop_at = settings.get("stop_at") or (train.get("stop_at") if isinstance(train, Mapping) else None)
        self.stop_at = None if stop_at is None else int(stop_at)
        self._clear()

    def _clear(self) -> None:
        self.checkpoint: Checkpoint | None = None
        self.source: Path | None = None
        self._last_saved: Path | None = None
        self._held: Held | None = None
        self._saved_at = time.monotonic()
        self._passing: set[Path] = set()
        self._begun = False
        self._stop = StopRequest()

    @property
    def rows(self) -> list[Row]:
        """Returns all rows of the metrics."""
        return self.metrics.rows

    # ---------- beginning ----------

    def __enter__(self) -> RunDir:
        self._clear()
        self._lock = FolderLock(self.path, self.spelling.anew)
        try:
            self._find()
        except BaseException:
            self._lock.undo()
            raise
        return self

    def _find(self) -> None:
        """Chooses the state to go on from, and moves to its folder."""
        asked = asked_state(self.settings)
        source = find_state(asked, self.path, self.files)
        home = None if source is None else self.files.home(source)
        if home is not None and home != self.path:
            self._lock.undo()
            with contextlib.suppress(OSError):
                self.path.rmdir()  # if it is there and empty
            self.path = home
            self._lock = FolderLock(self.path, self.spelling.anew)
        elif asked != AUTO and (asked in NEVER or not self._holds(source)):
            self._refuse_used_folder()
        if source is not None:
            checkpoint = load_checkpoint(source)
            self.files.check(checkpoint, source)
            self.checkpoint, self.source, self._last_saved = checkpoint, source, source

    def _holds(self, source: Path | None) -> bool:
        return source is None or source.parent == self.files.folder(self.path)

    def _refuse_used_folder(self) -> None:
        metrics = self.path / "metrics.jsonl"
        used = self.files.existing(self.path) or (metrics.is_file() and metrics.stat().st_size)
        if used and not self.files.starts_over:
            raise UserError(
                f"{self.path} holds a run already: go on with it ({self.spelling.again}) or {self.spelling.anew}"
            )

    def begin(self, last: int = -1) -> None:
        """Writes the configuration, opens the metrics without their rows after `last`, catches signals from now on."""
        write_config(self.path, self.settings)
        self.files.begin(self.path, last)
        self.metrics = MetricsWriter(
            self.path,
            tensorboard=bool(self.settings.get("tensorboard", True)),
            wandb=self.settings.get("wandb"),
            config=self.settings,
        )
        self._set_later_ones_aside()
        self.metrics.truncate(last)
        self._begun = True
        self._stop.__enter__()

    def _set_later_ones_aside(self) -> None:
        """Renames states after the one that the run goes on from: they are neither lost nor taken for its newest.

        They are damaged, or of a branch that is being left. Those that were to pass go in time.
        """
        states = self.files.existing(self.path)
        last = next((number for number, path in states if path == self.source), -1)
        for number, path in states:
            if number > last:
                path.replace(path.with_name(f"set_aside_{path.name}"))
            elif checkpoint_metadata(path).get("keep") is False:
                self._passing.add(path)

    # ---------- rows and states ----------

    def log(self, row: Mapping[str, Any]) -> None:
        """Writes a row of the metrics."""
        self.metrics.write(row)

    def remember(self, number: int, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, Any], keep: bool) -> None:
        """Takes the state `number`: written now if it is to be kept or the last writing is a minute ago, else held for
        a signal or a failure.

        Raises:
            UserError: there is NaN in it, or the file cannot be written. What was saved before stays.
        """
        if bad := not_finite(tensors):
            raise UserError(
                f"{bad} is no longer finite after {self.files.step_key} {number}: the training has diverged, lower the "
                f"learning rates; {self.last_good()}"
            )
        self._held = (number, tensors, metadata)
        if keep or time.monotonic() - self._saved_at > CHECKPOINT_SECONDS:
            self._save(keep)

    def _save(self, keep: bool) -> None:
        """Writes the held state and removes those that were not to be kept."""
        assert self._held is not None
        number, tensors, metadata = self._held
        if keep:
            self.files.write_beside(self.path, number)
        path = self.files.path(self.path, number, keep)
        save_checkpoint(path, tensors, {**self.files.facts(number), **metadata, "keep": keep})
        for old in self._passing - {path}:
            old.unlink(missing_ok=True)
        self._passing = set() if keep else {path}
        self._last_saved, self._held, self._saved_at = path, None, time.monotonic()
        if keep:
            self.files.copy(self.path)

    def last_good(self) -> str:
        """Makes sure that the last state is on disk, and says where."""
        if self._held is not None:
            self._save(keep=False)
        if self._last_saved is None:
            return "nothing had been saved yet"
        return f"the last good state is {self._last_saved}"

    # ---------- the end ----------

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: Any) -> None:
        if not self._begun:
            self._lock.undo()
            return
        try:
            if isinstance(error, Exception) and self._held is not None:
                with contextlib.suppress(UserError):  # the disk may be what failed
                    self._save(keep=False)
            self.metrics.close()
            if error is None or isinstance(error, Interrupted):
                self.files.copy(self.path)
        finally:
            if isinstance(error, Exception) and self._last_saved is None and not self.rows:
                self._leave_nothing()
            self._lock.close()
            self._stop.__exit__()

    def _leave_nothing(self) -> None:
        """Removes what `begin` wrote for a run that ended before its first row: an empty run is no run."""
        for name in ("config.yaml", "metrics.jsonl", "metrics.csv"):
            (self.path / name).unlink(missing_ok=True)
        shutil.rmtree(self.path / "tensorboard", ignore_errors=True)
        with contextlib.suppress(OSError):
            self.files.folder(self.path).rmdir()  # where there is nothing else in it
        self._lock.undo()

    @property
    def stopping(self) -> bool:
        """Returns whether SIGINT or SIGTERM has arrived."""
        return self._stop.name is not None

    def stop_if_requested(self) -> None:
        """Saves what is held and ends the run with `Interrupted` if SIGINT or SIGTERM has arrived."""
        name = self._stop.name
        if name is None:
            return
        if self._held is not None:
            self._save(keep=False)
        if self._last_saved is None:
            raise Interrupted(f"stopped by {name} before there was anything to save; start again")
        go_on = self.spelling.go_on(self.path)
        raise Interrupted(f"stopped by {name}; state saved in {self._last_saved}; go on with {go_on}")

    def pause(self, unit: str, step: int, total: int) -> None:
        """Says that this part of the run has ended where `stop_at` asks for it, and how to go on."""
        go_on = self.spelling.go_on(self.path)
        print(
            f"stopped after {step} of {total} {unit}s, as stop_at says; state saved in {self._last_saved}; go on with "
            f"{go_on} and a later stop_at, or none",
            flush=True,
        )


class Nowhere:
    """Stands for a run folder where a loop only computes: rows stay in memory, nothing is saved, nothing stops it."""

    path = Path()
    checkpoint: Checkpoint | None = None
    source: Path | None = None
    stop_at: int | None = None
    stopping = False

    def __init__(self) -> None:
        self.rows: list[Row] = []

    def __enter__(self) -> Nowhere:
        return self

    def __exit__(self, *error: Any) -> None:
        pass

    def log(self, row: Mapping[str, Any]) -> None:
        """Keeps a row in memory."""
        self.rows.append(dict(row))

    def remember(self, number: int, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, Any], keep: bool) -> None:
        """Forgets a state."""

    def last_good(self) -> str:
        """Says that nothing was saved."""
        return "nothing is saved"

    def _nothing(self, *args: Any) -> None:
        pass

    begin = stop_if_requested = pause = _nothing


def write_config(folder: Path, resolved: Mapping[str, Any]) -> None:
    """Writes `config.yaml` of a run folder, whole or not at all."""
    with atomic_file(folder / "config.yaml") as file:
        file.write(to_yaml(resolved).encode())
