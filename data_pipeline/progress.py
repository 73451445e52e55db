"""How far a long job is and how long it will take: a bar on a terminal, a line now and then in a log."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

_LINE_SECONDS = 30.0


class Meter:
    """`total` units of work, of which `done` were done before. A total that proves too small is said to be unknown."""

    def __init__(self, console: Console, title: str, *, total: int, done: int = 0, unit: str = "B") -> None:
        self._console, self._title, self._unit = console, title, unit
        self._total, self._done, self._before = total, done, done
        self._started = self._last = time.monotonic()
        columns = TextColumn("{task.description:<25}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn()
        on_terminal = console.is_terminal and not console.quiet
        self._bar = Progress(*columns, console=console, disable=not on_terminal)
        self._task = self._bar.add_task(title, total=total or None, completed=done)
        self._lines = not on_terminal and not console.quiet

    def add(self, amount: int) -> None:
        self._done += amount
        self._bar.update(self._task, completed=self._done, total=self._total if self._done <= self._total else None)
        now = time.monotonic()
        if self._lines and now - self._last > _LINE_SECONDS:
            self._last = now
            self._console.print(self.line(now - self._started))

    def line(self, seconds: float) -> str:
        """Title, share, rate since the start, and the time left at that rate."""
        rate = (self._done - self._before) / seconds
        text = f"{self._title}: "
        if not 0 < self._done <= self._total:
            return f"{text}{self._done / 1e6:,.1f} M{self._unit}, {rate / 1e6:.2f} M{self._unit}/s"
        minutes = f"{(self._total - self._done) / rate / 60:.0f} min left" if rate else "stalled"
        return f"{text}{self._done / self._total:.1%} of {self._total / 1e6:,.1f} M{self._unit}, " + (
            f"{rate / 1e6:.2f} M{self._unit}/s, {minutes}"
        )

    def __enter__(self) -> Meter:
        self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._bar.stop()
