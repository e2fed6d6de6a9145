"""A run's folder: configuration, metrics, checkpoints, resuming, and stopping on request without losing anything."""

from __future__ import annotations

import contextlib
import logging
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import DictConfig, OmegaConf

from diffusion_rl.core.errors import Interrupted, UserError
from diffusion_rl.core.files import atomic_file
from diffusion_rl.reports.metrics import MetricsWriter
from diffusion_rl.training.checkpoint import (
    Checkpoint,
    checkpoint_metadata,
    latest_checkpoint,
    load_checkpoint,
    not_finite,
    numbered_checkpoints,
    require_kind,
    save_checkpoint,
)
from diffusion_rl.training.locks import FolderLock
from diffusion_rl.training.run_facts import compare_settings
from diffusion_rl.training.signals import StopRequest

log = logging.getLogger(__name__)

CHECKPOINT_SECONDS = 60.0  # a passing checkpoint at least this far apart, beside those that are kept
State = tuple[int, Mapping[str, np.ndarray], Mapping[str, Any]]  # step, tensors, metadata


class RunFolder:
    """Everything that a training run leaves behind, in `cfg.logdir`.

    `cfg.resume` is "never" (default), "auto" (continue the newest run of the same name and seed that has a loadable
    checkpoint, in its own folder; start afresh if there is none), or the path of a run folder or checkpoint.

    Building one reads only; the caller restores `resumed`, which may fail, and then enters the folder, which is when
    files are written and signals are caught:

        folder = RunFolder(cfg, "itr", "dppo")
        if folder.resumed is not None: ...restore...
        with folder:
            for itr in ...:
                folder.metrics.write(row)
                folder.remember(itr, *snapshot, keep=itr % 100 == 0)
                folder.stop_if_requested()

    Args:
        cfg: the configuration; `logdir`, `seed`, `resume` and `wandb` are read here.
        step_key: what is counted, "itr" or "epoch".
        kind: of the checkpoints.
        another_folder, go_on: how the program spells these two cures; the default of `go_on` is resume=<folder>.
        may_change: patterns of keys with whose new values a run may be resumed; others must be what they were.
    """

    metrics: MetricsWriter

    def __init__(
        self,
        cfg: DictConfig,
        step_key: str,
        kind: str,
        another_folder: str = "name another logdir",
        go_on: str | None = None,
        may_change: Sequence[str] = ("*",),
    ):
        self.cfg, self.step_key, self.kind = cfg, step_key, kind
        self.another_folder, self.go_on = another_folder, go_on
        self.path = Path(cfg["logdir"])
        self.resumed: Checkpoint | None = None
        self.resumed_from: Path | None = None
        self._resume = str(cfg.get("resume", "never") or "never")
        self.resolved: dict[str, Any] = OmegaConf.to_container(OmegaConf.create(_plain(cfg)), resolve=True)  # type: ignore[assignment]
        self._find_resumed(self._resume)
        if self.resumed is not None and self.resumed_from is not None:
            compare_settings(self.resumed, self.resolved, self.resumed_from, may_change)
        self.checkpoints = self.path / "checkpoint"
        if self._resume != "auto" and (self.resumed_from is None or self.checkpoints != self.resumed_from.parent):
            self._refuse_used_folder()
        self._last_saved: Path | None = self.resumed_from
        self._unsaved: State | None = None
        self._saved_at = time.monotonic()
        self._passing: set[Path] = set()
        self._stop = StopRequest()

    # ---------- resuming ----------

    def _find_resumed(self, resume: str) -> None:
        if resume == "never":
            return
        found = self._newest_of_this_run() if resume == "auto" else _given(Path(resume))
        if found is None:
            log.info("resume=auto: no earlier run with a checkpoint beside %s; starting afresh", self.path)
            return
        checkpoint = load_checkpoint(found)
        require_kind(checkpoint, self.kind, found)
        if "train" not in checkpoint.metadata or self.step_key not in checkpoint.metadata:
            raise UserError(f"{found} holds weights only and cannot be resumed: pass it as base_policy_path instead")
        if found.parent.name == "checkpoint":  # else it is a lone file: the run goes on in a folder of its own
            empty, self.path = self.path, found.parent.parent
            if empty != self.path and empty.is_dir() and not any(empty.iterdir()):
                empty.rmdir()
        self.resumed, self.resumed_from = checkpoint, found
        log.info("resuming %s after %s %s", self.path, self.step_key, checkpoint.metadata.get(self.step_key))

    def _newest_of_this_run(self) -> Path | None:
        return next((c for c in map(_newest, [self.path, *_siblings(self.path)]) if c is not None), None)

    def _refuse_used_folder(self) -> None:
        metrics = self.path / "metrics.jsonl"
        if numbered_checkpoints(self.checkpoints) or (metrics.is_file() and metrics.stat().st_size):
            raise UserError(
                f"logdir={self.path} holds a run already: go on with it ({self.go_on or 'resume=auto'}) or "
                f"{self.another_folder}"
            )

    def _drop_what_follows(self) -> None:
        """Metrics and checkpoints of steps after the resumed one will come again; what was passing goes in time.

        Later checkpoints (damaged, or of a branch that is being left) are renamed, so that they are neither lost nor
        ever taken for this run's newest.
        """
        last = -1 if self.resumed is None else int(self.resumed.metadata[self.step_key])
        for number, path in numbered_checkpoints(self.checkpoints):
            if number > last:
                path.replace(path.with_name(f"set_aside_{path.name}"))
            elif checkpoint_metadata(path).get("keep") is False:
                self._passing.add(path)
        self.metrics.truncate(last)

    # ---------- checkpoints ----------

    def remember(self, step: int, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, Any], keep: bool) -> None:
        """Take the state after `step`: written now if it is to be kept or the last writing is a minute ago, else held
        for a signal or a failure.

        Raises:
            UserError: there is NaN in it, or the file cannot be written. What was saved before stays.
        """
        if bad := not_finite(tensors):
            raise UserError(
                f"{bad} is no longer finite after {self.step_key} {step}: the training has diverged, lower the "
                f"learning rates; {self.last_good()}"
            )
        self._unsaved = (step, tensors, metadata)
        if keep or time.monotonic() - self._saved_at > CHECKPOINT_SECONDS:
            self._save(keep)

    def _save(self, keep: bool) -> None:
        """Write `checkpoint/state_<step>.safetensors`; then those go that were not to be kept."""
        assert self._unsaved is not None
        step, tensors, metadata = self._unsaved
        path = self.checkpoints / f"state_{step}.safetensors"
        facts = {"kind": self.kind, **metadata, "config": self.resolved, self.step_key: step, "keep": keep}
        save_checkpoint(path, tensors, facts)
        for old in self._passing - {path}:
            old.unlink(missing_ok=True)
        self._passing = set() if keep else {path}
        self._last_saved, self._unsaved, self._saved_at = path, None, time.monotonic()

    def last_good(self) -> str:
        """Make sure that the last remembered state is on disk, and say where."""
        if self._unsaved is not None:
            self._save(keep=False)
        if self._last_saved is None:
            return "nothing had been saved yet"
        return f"the last good state is {self._last_saved}"

    # ---------- beginning and end ----------

    def __enter__(self) -> RunFolder:
        self._lock = FolderLock(self.path, self.another_folder)
        try:
            self._begin()
        except BaseException:
            self._lock.undo()
            raise
        self._stop.__enter__()
        return self

    def _begin(self) -> None:
        self.checkpoints.mkdir(exist_ok=True)
        write_config(self.path, self.resolved)
        self.metrics = MetricsWriter(
            self.path,
            tensorboard=bool(self.cfg.get("tensorboard", True)),
            wandb=self.resolved.get("wandb"),
            config=self.resolved,
        )
        self._drop_what_follows()

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: Any) -> None:
        try:
            if isinstance(error, Exception) and self._unsaved is not None:
                with contextlib.suppress(UserError):  # the disk may be what failed
                    self._save(keep=False)
            self.metrics.close()
        finally:
            self._lock.close()
            self._stop.__exit__()

    @property
    def stopping(self) -> bool:
        """Whether SIGINT or SIGTERM has arrived."""
        return self._stop.name is not None

    def stop_if_requested(self) -> None:
        """If SIGINT or SIGTERM has arrived: save what is remembered and end the run with `Interrupted`."""
        name = self._stop.name
        if name is None:
            return
        if self._unsaved is not None:
            self._save(keep=False)
        if self._last_saved is None:
            raise Interrupted(f"stopped by {name} before there was anything to save; start again")
        go_on = self.go_on or f"resume={self.path}"
        raise Interrupted(f"stopped by {name}; state saved in {self._last_saved}; go on with {go_on}")


def write_config(folder: Path, resolved: Mapping[str, Any]) -> None:
    """`config.yaml` of a run folder, whole or not at all."""
    with atomic_file(folder / "config.yaml") as file:
        file.write(OmegaConf.to_yaml(OmegaConf.create(dict(resolved))).encode())


def _given(path: Path) -> Path:
    if path.is_file():
        return path
    newest = _newest(path)
    if newest is None:
        raise UserError(f"resume={path}: no checkpoint there; give a run folder, a checkpoint, auto or never")
    return newest


def _newest(folder: Path) -> Path | None:
    return latest_checkpoint(folder / "checkpoint")


def _siblings(path: Path) -> list[Path]:
    """Folders of the same run name and seed, newest first: log/<suite>/<name>/<date>_<seed>."""
    seed = re.search(r"_(\d+)$", path.name)
    if seed is None or not path.parent.is_dir():
        return []
    return sorted((p for p in path.parent.glob(f"*_{seed[1]}") if p.is_dir() and p != path), reverse=True)


def _plain(cfg: Any) -> Any:
    return OmegaConf.to_container(cfg, resolve=True) if isinstance(cfg, DictConfig) else dict(cfg)
