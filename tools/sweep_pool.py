"""Runs of a sweep side by side, on this machine or over hosts by ssh: each a sweep_job.py of its own.

A run that fails does not end the others. A host that cannot be reached leaves the pool and its run goes to another.
Every job saves and leaves when its stdin ends, so it does when we are asked to stop, and when we are killed.
"""

from __future__ import annotations

import signal
import subprocess
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from rich.console import Console
from sweep_job import AGAIN
from sweep_results import State, state_of
from sweep_rules import SweepRun
from sweep_slots import Slot

_UNREACHABLE = 255  # ssh's own exit code


class StopAsked:
    """Inside the `with`, SIGTERM, SIGINT, SIGHUP and SIGUSR1 are noted; the pool then lets its runs save."""

    def __init__(self) -> None:
        self.noted = False
        self._before: dict[signal.Signals, Any] = {}

    def __bool__(self) -> bool:
        return self.noted

    def __enter__(self) -> StopAsked:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
            if signal.getsignal(number) is not signal.SIG_IGN:  # nohup's choice stands
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.noted = True


def run_all(
    sweep: Path, runs: Sequence[SweepRun], slots: Sequence[Slot], console: Console, stop: StopAsked, *, launch: bool
) -> list[str]:
    """Trains `runs` in order; returns what was wrong with hosts. How each run ended stands in its State."""
    waiting, free, lost = deque(runs), list(slots), []
    running: dict[SweepRun, tuple[subprocess.Popen[bytes], Slot, float]] = {}
    done = 0
    while running or (waiting and free and not stop):
        while waiting and free and not stop:
            run, slot = waiting.popleft(), free.pop(0)
            process = subprocess.Popen(
                slot.command(sweep, run.name, launch=launch),
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE if slot.host else None,
                env=slot.environment(),
                start_new_session=True,  # Ctrl-C comes to us alone
            )
            running[run] = process, slot, time.perf_counter()
        time.sleep(0.1)
        if stop:
            _end_stdin(process for process, _, _ in running.values())
        for run, (process, slot, started) in list(running.items()):
            if process.poll() is None:
                continue
            del running[run]
            _end_stdin([process])
            if process.returncode == _UNREACHABLE and slot.host is not None:
                said = (process.stderr.read().decode(errors="replace").strip() if process.stderr else "").splitlines()
                lost.append(f"{slot.host}: {said[-1] if said else 'ssh failed'}: left out")
                console.print(lost[-1], markup=False)
                waiting.appendleft(run)
                continue
            free.append(slot)
            if process.returncode != AGAIN:
                done += 1
            seconds = time.perf_counter() - started
            _say(console, f"{done}/{len(runs)}", run, state_of(sweep, run), process.returncode, seconds, slot)
    return lost


def _end_stdin(processes: Any) -> None:
    for process in processes:
        if process.stdin is not None and not process.stdin.closed:
            process.stdin.close()


def _say(console: Console, done: str, run: SweepRun, state: State, code: int, seconds: float, slot: Slot) -> None:
    at = f" on {slot.host}" if slot.host else ""
    if state.status == "finished":
        ending = f"{seconds:,.0f} s"
    elif state.status == "failed":
        ending = f"FAILED: {state.why}"
    else:
        ending = f"saved at step {state.step}" if code == AGAIN else f"ended with exit code {code}"
    console.print(f"{done}  {run.name}{at}  {ending}", markup=False)
