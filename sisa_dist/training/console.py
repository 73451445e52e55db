"""Progress on the terminal: a bar where there is one, plain lines where there is not."""

from __future__ import annotations

import sys

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class Console:
    """`quiet` prints nothing. Lines come every `every` steps, the bar moves every step."""

    def __init__(self, steps: int, *, every: int, quiet: bool) -> None:
        self._steps, self._every, self._quiet = steps, every, quiet
        self._bar: Progress | None = None
        if sys.stdout.isatty() and not quiet:
            columns = (TextColumn("training"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self._bar = Progress(*columns, TextColumn("{task.description}"))
            self._task = self._bar.add_task("", total=steps)
            self._bar.start()

    def step(self, step: int, *, loss: float, lr: float, grad_norm: float, tokens_per_second: float) -> None:
        text = f"loss {loss:.4f}  lr {lr:.2e}  norm {grad_norm:.2f}  {tokens_per_second:,.0f} tok/s"
        if self._bar:
            self._bar.update(self._task, completed=step, description=text)
        if step % self._every == 0 or step in (1, self._steps):
            self._print(f"step {step:>6}/{self._steps}  {text}")

    def note(self, step: int, text: str) -> None:
        self._print(f"step {step:>6}/{self._steps}  {text}")

    def close(self) -> None:
        if self._bar:
            self._bar.stop()

    def _print(self, text: str) -> None:
        if self._bar:
            self._bar.console.print(text, highlight=False)
        elif not self._quiet:
            print(text, flush=True)
