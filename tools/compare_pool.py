"""Runs jobs of tools/compare.py side by side, each a process of its own; with one at a time, in this process.

A run that fails does not end the others. When this process is asked to leave, the runs are asked to save first.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from compare_plan import Job
from compare_run import execute
from rich.console import Console

from sisa_dist.config import UserError

_RUN = Path(__file__).with_name("compare_run.py")


def run_jobs(jobs: Sequence[Job], at_once: int, console: Console, *, what: str) -> dict[Job, str]:
    """Does them in order; returns those that failed and why. `what`: a word for the console."""
    failed: dict[Job, str] = {}
    if at_once == 1:
        for number, job in enumerate(jobs, 1):
            started = time.perf_counter()
            job.write()
            try:
                execute(job.folder)
            except UserError as error:
                failed[job] = str(error)
            _say(console, what, number, len(jobs), job, time.perf_counter() - started, failed.get(job))
        return failed
    return _beside(list(jobs), at_once, console, what)


def _beside(jobs: list[Job], at_once: int, console: Console, what: str) -> dict[Job, str]:
    waiting, done, failed = list(jobs), 0, {}
    running: dict[Job, tuple[subprocess.Popen[bytes], float]] = {}
    threads = max(1, (os.cpu_count() or 1) // at_once)
    # What the user set counts: he knows what else runs here.
    environment = {"OMP_NUM_THREADS": str(threads)} | dict(os.environ)
    try:
        while waiting or running:
            while waiting and len(running) < at_once:
                job = waiting.pop(0)
                job.write()
                with (job.folder / "log.txt").open("ab") as log:
                    # In a session of its own: Ctrl-C comes to us alone, and the run then saves.
                    process = subprocess.Popen(
                        [sys.executable, str(_RUN), str(job.folder)],
                        stdout=log,
                        stderr=subprocess.STDOUT,
                        env=environment,
                        start_new_session=True,
                    )
                running[job] = process, time.perf_counter()
            time.sleep(0.05)
            for job, (process, started) in list(running.items()):
                if process.poll() is None:
                    continue
                del running[job]
                done += 1
                if process.returncode:
                    failed[job] = _last_line(job.folder / "log.txt", process.returncode)
                _say(console, what, done, len(jobs), job, time.perf_counter() - started, failed.get(job))
    finally:
        for process, _ in running.values():
            process.terminate()
        for process, _ in running.values():
            process.wait()
    return failed


def _say(console: Console, what: str, done: int, total: int, job: Job, seconds: float, failed: str | None) -> None:
    ending = f"{seconds:,.0f} s" if failed is None else f"FAILED: {failed}"
    console.print(f"{what} {done}/{total}  {job.name}  {ending}", markup=False)


def _last_line(log: Path, code: int) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return f"{lines[-1] if lines else 'it said nothing'} (exit code {code}, see {log})"
