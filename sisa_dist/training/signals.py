"""Being asked to stop: SIGTERM and SIGUSR1 set a flag, and the run ends at the next step with a checkpoint.

A scheduler that preempts, or whose time limit nears, sends one of them to some rank or to all. The flag travels to the
other ranks in the step's own reduction; what to save and when is the training loop's.
"""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any

REQUEUE = os.EX_TEMPFAIL  # 75: saved, not finished; the same command goes on from there
NEXT_STAGE = 76  # a stage is done and saved; the next wants processes of its own, which launch.sh starts
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class Leave(SystemExit):
    """The run has saved all it did and leaves with a code that says what next. Uncaught, it exits with that code."""

    exit_code: int

    def __init__(self, message: str) -> None:
        super().__init__(self.exit_code)
        self.message = message

    def __str__(self) -> str:
        return self.message


class Requeue(Leave):
    """It was asked to stop, and wants to be started again."""

    exit_code = REQUEUE


class NextStage(Leave):
    """A stage is done, and this process cannot train the next."""

    exit_code = NEXT_STAGE


class StopRequest:
    """Inside the `with`, both signals are only noted. In a thread that is not the main one Python can note none.

    A handler runs between two bytecodes: a rank that waits inside a collective notes the signal when it returns.
    """

    def __init__(self) -> None:
        self.why: str | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __bool__(self) -> bool:
        return self.why is not None

    def ask(self, why: str) -> None:
        self.why = self.why or why

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        # Once asked, the process is on its way out. A launcher that sees the first rank leave sends the others SIGTERM,
        # which must not change the code they leave with.
        if not self:
            for number, handler in self._before.items():
                signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.ask(signal.Signals(number).name)
