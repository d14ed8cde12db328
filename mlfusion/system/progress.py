"""Shows the progress of long work on standard error: nothing for two seconds, then a bar with rate and time left.

On a terminal the bar is live; in a log it is a line every ten seconds.
"""

import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from mlfusion.system.text import one_line

SILENCE = 2.0  # seconds before anything is shown
LOG_EVERY = 10.0  # seconds between lines in a log

_quiet = False


def set_quiet(quiet: bool) -> None:
    """Turn the display of progress off or on for the whole process."""
    global _quiet
    _quiet = quiet


@contextmanager
def hidden() -> Iterator[None]:
    """Context in which nothing is displayed."""
    before = _quiet
    set_quiet(True)
    try:
        yield
    finally:
        set_quiet(before)


class Bar:
    """One piece of work, counted in `unit`s."""

    def __init__(self, title: str, total: int, unit: str) -> None:
        self.title, self.total, self.unit = one_line(title), total, unit  # names are a stranger's
        self.done = 0
        self.note = ""  # shown after the rate
        self._start = time.monotonic()
        self._shown_at = self._start + SILENCE - LOG_EVERY
        self._live: Progress | None = None
        self._console = Console(stderr=True)

    def advance(self, count: int = 1) -> None:
        """Report `count` more units as done."""
        self.to(self.done + count)

    def to(self, done: int, total: int | None = None) -> None:
        """Report `done` units as done, of `total`."""
        self.done, self.total = done, total or self.total
        now = time.monotonic()
        if _quiet or now - self._start < SILENCE:
            return
        if self._console.is_terminal:
            if self._live is None:
                self._live = Progress(
                    TextColumn("{task.description}", markup=False),
                    BarColumn(),
                    TextColumn("{task.completed:,.0f}/{task.total:,.0f}"),
                    TextColumn("{task.fields[rate]}", style="progress.data.speed", markup=False),
                    TimeRemainingColumn(),
                    console=self._console,
                    transient=True,
                )
                self._live.add_task(self.title, total=self.total, rate="")
                self._live.start()
            rate = f"{self.rate:,.1f} {self.unit}/s{self.note and f', {one_line(self.note)}'}"
            self._live.update(self._live.task_ids[0], completed=self.done, total=self.total, rate=rate)
        elif now - self._shown_at >= LOG_EVERY:
            self._shown_at = now
            left = (self.total - self.done) / max(self.rate, 1e-9)
            sys.stderr.write(
                f"{self.title}: {self.done:,} of {self.total:,} {self.unit}, {self.rate:,.1f} {self.unit}/s, "
                f"{duration(left)} left{self.note and f'; {one_line(self.note)}'}\n"
            )

    @property
    def rate(self) -> float:
        """Units per second since the start."""
        return self.done / max(time.monotonic() - self._start, 1e-9)

    def close(self) -> None:
        """Remove the bar."""
        if self._live is not None:
            self._live.stop()


def track(title: str, total: int, unit: str) -> closing[Bar]:
    """A bar that is removed when the with statement ends, even by an error."""
    return closing(Bar(title, total, unit))


def duration(seconds: float) -> str:
    """0.42 → '0.4 s', 75 → '1 min 15 s', 4000 → '1 h 7 min'."""
    if seconds < 59.5:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s" if rest else f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60} min"
