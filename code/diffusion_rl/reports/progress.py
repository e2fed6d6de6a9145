"""Progress for people: a bar on a terminal, a few plain lines anywhere else."""

from __future__ import annotations

import sys
import time
from typing import Any, TextIO

from tqdm import tqdm

LINE_SECONDS = 10.0  # a plain line at least this long after the previous one …
LINE_SHARE = 0.1  # … or when this share of the whole has been done since …
LEAST_SECONDS = 5.0  # … but not sooner than this


class Progress:
    """Counts up to `total` and shows how far it is, how long it will take and the latest values.

    On a terminal: a bar that is redrawn. Otherwise (a file, a pipe, a CI log): a plain line every tenth of the way or
    after ten seconds, less often in long runs, at least five seconds apart, and one at the end.

        with Progress(total=30, label="fine-tuning") as progress:
            progress.update(episode_return=1432.1, loss=0.02)
    """

    def __init__(self, total: int, label: str, *, start: int = 0, stream: TextIO | None = None):
        self.total = total
        self.label = label
        self.done = start
        self._first = start
        self._stream = stream if stream is not None else sys.stderr
        self._began = self._line_time = time.monotonic()
        self._line_done = start
        self._news = False  # whether there is anything that no line has shown yet
        self._values: dict[str, Any] = {}
        self._bar: tqdm | None = None
        if self._stream.isatty():
            self._bar = tqdm(
                total=total, initial=start, desc=label, file=self._stream, dynamic_ncols=True, smoothing=0.1
            )

    def update(self, n: int = 1, **live: Any) -> None:
        """Counts `n` more as done and shows `live` values, the latest of each name."""
        self.done += n
        self._values.update(live)
        self._news = True
        if self._bar is not None:
            self._bar.set_postfix_str(self._live_text(), refresh=False)
            self._bar.update(n)
        elif self._line_is_due():
            self._print_line()

    def note(self, text: str) -> None:
        """Prints a line without disturbing the bar."""
        if self._bar is not None:
            self._bar.write(text, file=self._stream)
        else:
            print(text, file=self._stream, flush=True)

    def close(self) -> None:
        """Shows the end, reached or not; closing twice is fine."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None
        elif self._news:
            self._print_line()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _line_is_due(self) -> bool:
        since_line = time.monotonic() - self._line_time
        if since_line < LEAST_SECONDS:
            return False
        patience = max(LINE_SECONDS, (time.monotonic() - self._began) / 20)
        return since_line >= patience or self.done - self._line_done >= LINE_SHARE * self.total

    def _print_line(self) -> None:
        elapsed = time.monotonic() - self._began
        done_here = self.done - self._first
        left = elapsed / done_here * max(self.total - self.done, 0) if done_here > 0 else None
        parts = [f"{self.label}: {self.done}/{self.total}", f"{duration(elapsed)} elapsed"]
        if left:
            parts.append(f"about {duration(left)} left")
        if self._values:
            parts.append(self._live_text())
        print(", ".join(parts), file=self._stream, flush=True)
        self._line_time = time.monotonic()
        self._line_done = self.done
        self._news = False

    def _live_text(self) -> str:
        return ", ".join(f"{key.replace('_', ' ')} {_short(value)}" for key, value in self._values.items())


def _short(value: Any) -> str:
    if isinstance(value, str | bool | int) or value is None:
        return str(value)
    number = float(value)
    return f"{number:.1f}" if abs(number) >= 100 else f"{number:.3g}"


def duration(seconds: float) -> str:
    """Returns 1:02:03, 4:05 or 12 s."""
    whole = int(round(seconds))
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
