"""A run's folder: configuration, metrics, checkpoints, resuming, and stopping on request without losing anything."""

from __future__ import annotations

import logging
import os
import re
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import DictConfig, OmegaConf

from diffusion_rl.core.errors import Interrupted, UserError
from diffusion_rl.loops.run_state import Checkpoint, latest_checkpoint, load_checkpoint, save_checkpoint
from diffusion_rl.reports.metrics import MetricsWriter

log = logging.getLogger(__name__)


class RunFolder:
    """Everything that a training run leaves behind, in `cfg.logdir`.

    `cfg.resume` is "never" (default), "auto" (continue the newest run of the same name and seed that has a loadable
    checkpoint, in its own folder; start afresh if there is none), or the path of a run folder or checkpoint.

    Args:
        cfg: the configuration; `logdir`, `seed`, `resume` and `wandb` are read here.
        step_key: what is counted, "itr" or "epoch".
    """

    def __init__(self, cfg: DictConfig, step_key: str):
        self.cfg, self.step_key = cfg, step_key
        self.path = Path(cfg["logdir"])
        self.resumed: Checkpoint | None = None
        self._find_resumed(str(cfg.get("resume", "never") or "never"))
        self.checkpoints = self.path / "checkpoint"
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        self.resolved = OmegaConf.to_container(OmegaConf.create(_plain(cfg)), resolve=True)
        OmegaConf.save(OmegaConf.create(self.resolved), self.path / "config.yaml")
        self.metrics = MetricsWriter(
            self.path,
            tensorboard=bool(cfg.get("tensorboard", True)),
            wandb=self.resolved.get("wandb"),
            config=self.resolved,
        )
        if self.resumed is not None:
            self.metrics.truncate(self.resumed.metadata[step_key])
        self._passing: Path | None = None
        self._signal: int | None = None
        self._before: dict[int, Any] = {}

    def _find_resumed(self, resume: str) -> None:
        if resume == "never":
            return
        if resume == "auto":
            candidates = [self.path, *_siblings(self.path)]
            found = next((c for c in map(_newest, candidates) if c is not None), None)
            if found is None:
                log.info("resume=auto: no earlier run with a checkpoint beside %s; starting afresh", self.path)
                return
        else:
            given = Path(resume)
            if given.is_file():
                found = given
            elif (newest := _newest(given)) is not None:
                found = newest
            else:
                raise UserError(f"resume={resume}: no checkpoint there; give a run folder, a checkpoint, auto or never")
        checkpoint = load_checkpoint(found)
        if "train" not in checkpoint.metadata:
            raise UserError(f"{found} holds weights only and cannot be resumed: pass it as base_policy_path instead")
        empty, self.path = self.path, found.parent.parent
        if empty != self.path and empty.is_dir() and not any(empty.iterdir()):
            empty.rmdir()
        self.resumed = checkpoint
        log.info("resuming %s after %s %s", self.path, self.step_key, checkpoint.metadata.get(self.step_key))

    # ---------- checkpoints ----------

    def save(self, n: int, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, Any], keep: bool) -> Path:
        """Write `checkpoint/state_<n>.safetensors`; one that is not to be kept goes when the next is written."""
        path = self.checkpoints / f"state_{n}.safetensors"
        save_checkpoint(path, tensors, {**metadata, "config": self.resolved, self.step_key: n})
        if self._passing is not None and self._passing != path:
            self._passing.unlink(missing_ok=True)
        self._passing = None if keep else path
        return path

    # ---------- stopping on request ----------

    def __enter__(self) -> RunFolder:
        for number in (signal.SIGINT, signal.SIGTERM):
            try:
                self._before[number] = signal.signal(number, self._on_signal)
            except ValueError:  # not in the main thread: signals are somebody else's
                break
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self.metrics.close()

    def _on_signal(self, number: int, frame: Any) -> None:
        if self._signal is not None:  # the second time at once
            raise KeyboardInterrupt
        self._signal = number

    @property
    def stop_requested(self) -> bool:
        """Whether SIGINT or SIGTERM has arrived; the loop then saves and calls `stop`."""
        return self._signal is not None

    def stop(self, saved: Path | None) -> None:
        """End the run after a signal."""
        name = signal.Signals(self._signal or signal.SIGINT).name
        where = f"state saved in {saved}" if saved else "nothing to save yet"
        raise Interrupted(f"stopped by {name}; {where}; go on with resume={self.path}")


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


def memory_in_gigabytes() -> float:
    """Peak resident memory of this process."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def seed_everything(seed: int) -> None:
    """Nothing of ours draws from global generators; libraries that do get a seed all the same."""
    os.environ.setdefault("PYTHONHASHSEED", str(seed))
    np.random.seed(seed)
