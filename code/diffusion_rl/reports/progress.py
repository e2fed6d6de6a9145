"""Progress for people: a line for each row of the metrics above a bar; without a terminal the lines alone."""

from __future__ import annotations

import contextlib
import shutil
import sys
import time
import warnings
from collections.abc import Mapping
from typing import Any, TextIO

from tqdm import TqdmWarning, tqdm

with warnings.catch_warnings():
    warnings.simplefilter("ignore", TqdmWarning)  # in a notebook, of widgets that are not used here
    from tqdm.contrib.logging import logging_redirect_tqdm

LINE_SECONDS = 10.0  # without a terminal: a line about the progress at least so long after any line …
LINE_SHARE = 0.05  # … and after this share of the time since the beginning
WARM_UP = 2  # turns that no estimate is made from: what they compile is not compiled again
FIRST, COLUMN = 6, 9  # letters of the first column and of the others, at least
HEADING_EVERY = 30  # lines
COMPILING = "compiling"  # what begins so is shown at once


class Progress:
    """Counts up to `total` and shows how far it is, and how long it will take once that can be told.

    On a terminal: a bar that is redrawn and fits its width. Otherwise (a file, a pipe, a CI log): a plain line now and
    then, less often in long runs.

        with Progress(total=30, label="fine-tuning", unit="iteration") as progress:
            progress.update()
            progress.row({"itr": 0, "return": 1432.1, "loss": 0.02})

    Args:
        total: of what `update` counts.
        unit: what people count; none: nothing but the share is shown.
        units: of `total` in each of these.
        start: what was done earlier.
        stream: of the bar; default: stderr. Rows and notes go to stdout.
    """

    def __init__(
        self, total: int, label: str, *, unit: str = "", units: int = 1, start: int = 0, stream: TextIO | None = None
    ):
        self.total, self.label, self.unit, self.units, self.done = total, label, unit, units, start
        self._stream = stream if stream is not None else sys.stderr
        self._began = self._line_time = time.monotonic()
        self._turns, self._warm = 0, (self._began, start)  # time and count after which nothing is compiled any more
        self._doing, self._whole = "", start  # done in whole turns
        self._columns: list[str] = []
        self._lines = 0  # since the heading
        self._redirected = contextlib.ExitStack()
        self._bar: tqdm | None = None
        if self._stream.isatty():
            shape = "{desc} {percentage:3.0f}%|{bar}| {elapsed}{postfix}"
            look: dict[str, Any] = {"bar_format": shape, "dynamic_ncols": True, "leave": False}
            self._bar = tqdm(total=total, initial=start, desc=self._where(), file=self._stream, **look)
            self._redirected.enter_context(logging_redirect_tqdm())

    def update(self, n: int = 1, turn: bool = True) -> None:
        """Counts `n` more as done. turn: a whole turn of the loop is over, with all that each of them does."""
        self.done += n
        now = time.monotonic()
        self._turns += turn
        self._whole = self.done if turn else self._whole
        if turn and self._turns == WARM_UP:
            self._warm = (now, self.done)
        if self._bar is not None:
            self._bar.set_description_str(self._where(), refresh=False)
            left = self._left()
            self._bar.set_postfix_str("" if left is None else f"about {duration(left)} left", refresh=False)
            self._bar.update(n)
        elif now - self._line_time >= max(LINE_SECONDS, LINE_SHARE * (now - self._began)):
            self._print_line()

    def doing(self, text: str = "") -> None:
        """Says what takes time now, such as "compiling …"; nothing: the usual."""
        if text == self._doing:
            return
        self._doing = text
        if self._bar is not None:
            waited = time.time() - self._bar.last_print_t > self._bar.mininterval  # loops may turn fast
            self._bar.set_description_str(self._where(), refresh=waited or text.startswith(COMPILING))
        elif text.startswith(COMPILING):
            self._print_line()

    def row(self, values: Mapping[str, Any]) -> None:
        """Prints values below headings, where the line fits the terminal: what does not is left out at its end.

        Columns that an earlier row had stay in their place.
        """
        new = [name for name in values if name not in self._columns]
        self._columns += new
        width = shutil.get_terminal_size().columns if sys.stdout.isatty() else sys.maxsize
        widths = [max(COLUMN if i else FIRST, len(name) + 1) for i, name in enumerate(self._columns)]
        shown = [i for i in range(len(widths)) if sum(widths[: i + 1]) < width]
        if new or self._lines >= HEADING_EVERY:
            self.note("".join(f"{self._columns[i]:>{widths[i]}}" for i in shown))
            self._lines = 0
        self.note("".join(f"{_short(values.get(self._columns[i])):>{widths[i]}}" for i in shown))
        self._lines += 1

    def note(self, text: str) -> None:
        """Prints a line without disturbing the bar."""
        say(text)
        self._line_time = time.monotonic()

    def close(self) -> None:
        """Removes the bar; without a terminal, says the end. Closing twice is fine."""
        if self._bar is not None:
            self._redirected.close()
            self._bar.close()
            self._bar = None
        elif self._turns:
            self._print_line()
        self._turns = 0

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _where(self) -> str:
        whole = -(-self.total // self.units)
        counted = f", {self.unit} {min(self._whole // self.units + 1, whole)} of {whole}" if self.unit else ""
        return f"{self.label}{counted}{self._doing and f', {self._doing}'}"

    def _left(self) -> float | None:
        """Returns the seconds that are left; None while there is nothing to estimate them from."""
        seconds, count = time.monotonic() - self._warm[0], self.done - self._warm[1]
        if self._turns <= WARM_UP or count <= 0 or self.done >= self.total:
            return None
        return seconds / count * (self.total - self.done)

    def _print_line(self) -> None:
        share = f"{self.done / self.total:.0%}, " if self.total else ""
        left = self._left()
        text = f"{self._where()}: {share}{duration(time.monotonic() - self._began)} elapsed"
        print(text + ("" if left is None else f", about {duration(left)} left"), file=self._stream, flush=True)
        self._line_time = time.monotonic()


def say(text: str) -> None:
    """Prints a line on stdout, above the bar if there is one."""
    tqdm.write(text, file=sys.stdout)
    sys.stdout.flush()


def _short(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, str | bool | int):
        return str(value)
    number = float(value)
    usual, shorter = (".1f", ".0f") if abs(number) >= 100 else (".3g", ".2g")
    text = format(number, usual)
    return text if len(text) < COLUMN else format(number, shorter)  # else columns touch


def duration(seconds: float) -> str:
    """Returns 1:02:03, 4:05 or 12 s."""
    whole = int(round(seconds))
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
