"""The loop of every training: advance, check, log, save, stop when asked."""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import numpy as np

from diffusion_rl.core.errors import UserError
from diffusion_rl.core.optimizers import AdamW
from diffusion_rl.core.typing import Rng, StatefulRng
from diffusion_rl.interop.torch_names import load_state_dict, state_dict
from diffusion_rl.reports.metrics import step_of
from diffusion_rl.reports.progress import Progress, say
from diffusion_rl.training.checkpoint import Checkpoint
from diffusion_rl.training.continuation import announce, fitting, program
from diffusion_rl.training.run_dir import Nowhere, RunDir

State = tuple[dict[str, np.ndarray], dict[str, Any]]  # tensors and JSON values
Losses = Mapping[str, Any]  # numbers or arrays [n] by name


class TrainingLoop(ABC):
    """Counts steps and does what is due after them: `run` stands here once, for all methods.

    Attributes:
        step: steps made (of some methods iterations or epochs).
        total: steps of the whole training, however often it is interrupted; schedules depend on it.
        run_dir: where everything goes.
        progress: shown to people while the loop runs.
    """

    UNIT = "step"  # what is counted, in messages
    LABEL = "training"  # beside the progress
    CURE = "lower the learning rate"  # for a loss that is not finite
    HELD_SECONDS = 5.0  # between two states that are held for a signal or a failure

    total: int
    step: int = 0
    run_dir: RunDir | Nowhere
    progress: Progress
    units = 1  # of the progress in a step

    # ---------- what methods say ----------

    @abstractmethod
    def advance(self, end: int) -> tuple[int, Losses]:
        """Makes the next steps, up to step `end` at most: returns how many, and what of them has to be finite."""

    @abstractmethod
    def state(self) -> State:
        """Returns everything that decides on the next step, as tensors and JSON values."""

    @abstractmethod
    def restore(self, checkpoint: Checkpoint) -> None:
        """Goes on where `state` was taken, `step` included."""

    @abstractmethod
    def due(self, what: str) -> bool:
        """Returns whether after the steps just made a row ("log") or a checkpoint that stays ("save") is due."""

    @abstractmethod
    def row(self) -> dict[str, Any]:
        """Returns the row of the metrics for the time since the last one."""

    @property
    def number(self) -> int:
        """Returns how rows call the last step that was made: counted from 1 unless a method counts from 0."""
        return self.step

    def label(self, keep: bool) -> int:
        """Returns what a state taken now is called in the folder."""
        return self.number

    def is_whole(self) -> bool:
        """Returns whether `state` holds everything now."""
        return True

    def visible(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Returns what people see of a row of the metrics, by heading: the number, the seconds, then the losses."""
        losses = {name: value for name, value in row.items() if name not in ("itr", "kind", "env_steps", "seconds")}
        return {self.UNIT: step_of(row), "seconds": row["seconds"], **losses}

    def begin(self) -> None:  # noqa: B027
        """Does what comes before the first step, once the folder is there."""

    def saved(self, keep: bool) -> None:  # noqa: B027
        """Does what comes after steps and their state: evaluations, observers."""

    def finish(self) -> None:  # noqa: B027
        """Looks back at the end of the training. Raises UserError if it was in vain."""

    # ---------- the loop ----------

    def run(self, until: int | None = None) -> list[dict[str, Any]]:
        """Trains to the end, to `stop_at` of the run's settings or to a signal; returns the rows of the metrics.

        Args:
            until: stop before this step instead; nothing is saved because of it.

        Raises:
            UserError: a loss or a weight is no longer finite, or a file cannot be written. What was saved stays.
            Interrupted: SIGINT or SIGTERM came; the state is saved.
        """
        with self.run_dir as run_dir:
            if run_dir.checkpoint is not None:
                with fitting(run_dir.source):
                    self.restore(run_dir.checkpoint)
                announce(run_dir.source, self.UNIT, self.step)
            run_dir.begin(self.number if run_dir.checkpoint is not None else -1)
            self._turns(self._phase_end if until is None else until)
            if self.step < self.total and until is None:
                run_dir.pause(self.UNIT, self.step, self.total)
        if self.step >= self.total and isinstance(run_dir, RunDir):
            self._conclude(run_dir)
        return run_dir.rows

    def _conclude(self, run_dir: RunDir) -> None:
        """Says what came out, where everything lies, and how to go on with it."""
        measured = [row for row in run_dir.rows if row.get("episode_return") is not None]
        evaluated = [row for row in measured if row["kind"] == "eval"]
        best = max(evaluated or measured, key=_return, default=None)
        number = "" if best is None else f"{_return(best):.1f}, in {self.UNIT} {step_of(best)} ({best['kind']})"
        path = str(run_dir.path)
        draw = program("script/make_figures.py", "learning_curve", path, "--output", f"{path}/learning_curve.png")
        lines = {"best return": number, "everything in": path, "to evaluate": self.evaluation(), "to draw": draw}
        say("".join(f"\n{name:<15}{text}" for name, text in lines.items() if text))

    def evaluation(self) -> str:
        """Returns the command that evaluates what was trained; empty where there is none."""
        return self.run_dir.spelling.evaluate if isinstance(self.run_dir, RunDir) else ""

    @property
    def _phase_end(self) -> int:
        return min(self.total, self.run_dir.stop_at or self.total)

    def _turns(self, end: int) -> None:
        start = self.step * self.units
        self._row_began, self._held_at = time.monotonic(), -math.inf
        total = self.total * self.units
        with Progress(total, self.LABEL, unit=self.UNIT, units=self.units, start=start) as self.progress:
            self.progress.doing("compiling")
            self.begin()
            while self.step < end:
                count, losses = self.advance(end)
                self.step += count
                self.check_finite(losses, self.number)
                self.progress.doing()
                self.progress.update(max(0, self.step * self.units - self.progress.done))
                self._log()
                self._save()
                self.run_dir.stop_if_requested()
        if self.step >= self.total:
            self.finish()

    def _log(self) -> None:
        if not self.due("log"):
            return
        now = time.monotonic()
        row = {**self.row(), "seconds": now - self._row_began}
        self.progress.row(self.visible(row))
        self.run_dir.log(row)
        self._row_began = now

    def _save(self) -> None:
        """Hands the state to the folder: at the end, where it is due, now and then, and when the run is to stop."""
        keep = self.step in (self.total, self.run_dir.stop_at) or self.due("save")
        waited = self.run_dir.stopping or time.monotonic() - self._held_at > self.HELD_SECONDS
        if keep or (waited and self.is_whole()):
            self.run_dir.remember(self.label(keep), *self.state(), keep=keep)
            self._held_at = time.monotonic()
        self.saved(keep)

    def check_finite(self, losses: Losses, number: int) -> None:
        """Raises UserError if a loss is NaN or infinite, once the last good state is on disk."""
        for name, value in losses.items():
            values = np.atleast_1d(np.asarray(value, np.float64))
            if not np.isfinite(values).all():
                worst = values[~np.isfinite(values)][0]
                last_good = self.run_dir.last_good()
                raise UserError(f"{name} is {worst} in {self.UNIT} {number}: {self.CURE}; {last_good}")


def _return(row: Mapping[str, Any]) -> float:
    return float(row["episode_return"])


def part_tensors(parts: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Returns what networks and optimizers hold, as `<name of the part>.<name in it>`."""
    return {f"{name}.{k}": v for name, part in parts.items() for k, v in _held_by(part).items()}


def restore_parts(parts: Mapping[str, Any], checkpoint: Checkpoint) -> None:
    """Takes back what `part_tensors` returned."""
    for name, part in parts.items():
        tensors = checkpoint.select(f"{name}.")
        part.restore(tensors) if isinstance(part, AdamW) else load_state_dict(part, tensors)


def _held_by(part: Any) -> dict[str, np.ndarray]:
    return part.state() if isinstance(part, AdamW) else state_dict(part)


def rng_state(rng: Rng) -> Any:
    """Returns the state of a source of randomness; None for a recorded tape, which has none."""
    return rng.state() if isinstance(rng, StatefulRng) else None


def restore_rng(rng: Rng, state: Any) -> None:
    """Continues a source of randomness where `rng_state` was taken; a recorded tape cannot."""
    assert isinstance(rng, StatefulRng)
    rng.restore(state)
