"""The files of a run folder that hold its states. A method whose originals lay files out otherwise derives its own."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from diffusion_rl.training.checkpoint import (
    Checkpoint,
    newest_loadable,
    numbered_checkpoints,
    require_finite,
    require_kind,
)
from diffusion_rl.training.continuation import compare_settings, require_state

_DATED = re.compile(r"\d{4}-\d\d-\d\d\S*_(\d+)")


class StateFiles:
    """States as `checkpoint/state_<n>.safetensors`, n being the last iteration (or epoch).

    Args:
        kind: of the checkpoints.
        settings: of the run, plain and resolved; checkpoints record them.
        step_key: what is counted, "itr" or "epoch".
        may_change: patterns of settings with whose new values a run may go on; others must be what they were.
    """

    starts_over = False  # whether a folder that holds a run may be used for another one
    HINT = ""  # added to the line about a state that is not there
    FOLDERS = True  # states lie in a folder of their own, in run folders called by dates and seeds

    def __init__(
        self, kind: str, settings: Mapping[str, Any], step_key: str = "itr", may_change: Sequence[str] = ("*",)
    ):
        self.kind, self.settings, self.step_key, self.may_change = kind, settings, step_key, may_change

    def folder(self, run: Path) -> Path:
        """Returns where in the run folder the states lie."""
        return run / "checkpoint" if self.FOLDERS else run

    def home(self, path: Path) -> Path | None:
        """Returns the run folder in which a state goes on; None: in the folder that the settings name."""
        return path.parent.parent if self.FOLDERS and path.parent.name == "checkpoint" else None

    def path(self, run: Path, number: int, keep: bool) -> Path:
        """Returns the file of a state; `keep` is False for one that goes when a newer one is there."""
        return self.folder(run) / f"state_{number}.safetensors"

    def existing(self, run: Path) -> list[tuple[int, Path]]:
        """Returns (number, path) of every state, whole or not, the newest last."""
        return numbered_checkpoints(self.folder(run))

    def newest(self, run: Path) -> Path | None:
        """Returns the newest state that loads; damaged ones are skipped with a warning."""
        return newest_loadable(path for _, path in reversed(self.existing(run)))

    def earlier_runs(self, run: Path) -> list[Path]:
        """Returns folders of the same run name and seed, newest first: log/<suite>/<name>/<date>_<seed>."""
        dated = _DATED.fullmatch(run.name)
        if dated is None or not run.parent.is_dir() or not self.FOLDERS:
            return []
        return sorted((p for p in run.parent.glob(f"*_{dated[1]}") if p.is_dir() and p != run), reverse=True)

    def facts(self, number: int) -> dict[str, Any]:
        """Returns what a checkpoint says of itself beside the loop's own facts."""
        return {"kind": self.kind, "config": dict(self.settings), self.step_key: number}

    def check(self, checkpoint: Checkpoint, path: Path) -> None:
        """Raises UserError unless this run can go on with a checkpoint: its kind, its contents, its settings."""
        require_kind(checkpoint, self.kind, path)
        require_state(checkpoint, self.step_key, path)
        require_finite(checkpoint.tensors, path)
        compare_settings(checkpoint, self.settings, path, self.may_change)

    def begin(self, run: Path, last: int) -> None:
        """Writes what stands in the folder from the beginning; rows after `last` will come again."""
        self.folder(run).mkdir(exist_ok=True)

    def write_beside(self, run: Path, number: int) -> None:
        """Writes what stands beside a state that is kept."""

    def copy(self, run: Path) -> None:
        """Copies the folder elsewhere, after a state that is kept and at the end."""
