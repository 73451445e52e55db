"""Runs of a sweep side by side, on this machine or over hosts by ssh: each a sweep_job.py of its own.

A run that fails does not end the others. A host that cannot be reached leaves the pool and its run goes to another.
Every job saves and leaves when its stdin ends, so it does when we are asked to stop, and when we are killed.
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from rich.console import Console
from sweep_job import AGAIN
from sweep_results import State, state_of
from sweep_rules import SweepRun

from sisa_dist.config import UserError

_JOB = Path(__file__).resolve().with_name("sweep_job.py")
_UNREACHABLE = 255  # ssh's own exit code


@dataclass(frozen=True)
class Slot:
    """A place where one run at a time trains."""

    host: str | None = None  # None: here
    devices: str | None = None  # CUDA_VISIBLE_DEVICES here
    processes: int = 1
    threads: int | None = None

    def command(self, sweep: Path, name: str, *, launch: bool) -> list[str]:
        job = [sys.executable, str(_JOB), str(sweep.resolve()), name, "--until-eof"] + (["--launch"] if launch else [])
        return job if self.host is None else ["ssh", "-o", "BatchMode=yes", self.host, f"exec {shlex.join(job)}"]

    def environment(self) -> dict[str, str]:
        found = dict(os.environ)
        if self.threads is not None:
            found.setdefault("OMP_NUM_THREADS", str(self.threads))  # what the user set counts
        if self.devices is not None:
            found |= {"CUDA_VISIBLE_DEVICES": self.devices, "NPROC": str(self.processes)}
        return found


def local_slots(at_once: int, devices: int) -> list[Slot]:
    """`devices` of each run. Raises UserError where there are not so many."""
    have = torch.cuda.device_count()
    if not have:
        threads = max(1, (os.cpu_count() or 1) // at_once)
        return [Slot(processes=devices, threads=threads)] * at_once
    if at_once * devices > have:
        raise UserError(
            f"{at_once} run(s) at a time of {devices} device(s) each, and there are {have} here: lower --jobs or "
            "machine.devices"
        )
    shares = [range(first, first + devices) for first in range(0, at_once * devices, devices)]
    return [Slot(devices=",".join(map(str, share)), processes=devices) for share in shares]


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
