"""One run of a sweep: `sisa train` to its last step, then `sisa eval` on more held-out text, each as a user would.

    python tools/sweep_job.py SWEEP NAME [--launch] [--until-eof]

Trains SWEEP/configs/NAME.yaml and leaves SWEEP/runs/NAME/final.json; what was said goes to SWEEP/logs/NAME.txt, how it
ended to SWEEP/jobs/NAME.json. Started again it goes on from the run's checkpoint. SIGTERM, SIGINT and SIGUSR1 ask the
run to save: exit code 75, "run me again". Other codes are those of the command that failed.

It imports neither torch nor the package: it waits beside every run, on every host, and reads nothing of it.
"""

from __future__ import annotations

import argparse
import ctypes
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import IO

ROOT = Path(__file__).resolve().parents[1]
AGAIN = os.EX_TEMPFAIL  # 75: asked to stop and saved
_PATIENCE = 120.0  # seconds for one that was told to save to leave the run to us
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sweep", type=Path)
    parser.add_argument("name")
    parser.add_argument("--launch", action="store_true", help="by ./launch.sh, on all devices that it finds")
    parser.add_argument("--until-eof", action="store_true", help="save and leave when stdin ends")
    arguments = parser.parse_args(argv)
    return Job(arguments.sweep, arguments.name, launch=arguments.launch).run(until_eof=arguments.until_eof)


class Job:
    def __init__(self, sweep: Path, name: str, *, launch: bool) -> None:
        self.config, self.run_folder = sweep / "configs" / f"{name}.yaml", sweep / "runs" / name
        self.final = self.run_folder / "final.json"
        self.log, self.ended = sweep / "logs" / f"{name}.txt", sweep / "jobs" / f"{name}.json"
        self.lock = sweep / "jobs" / f"{name}.lock"
        sisa = [str(ROOT / "launch.sh")] if launch else [sys.executable, "-m", "sisa_dist.cli"]
        self.train = [*sisa, "train", str(self.config)]
        self.evaluate = [*sisa, "eval", str(self.run_folder), "--out", str(self.final)]
        if launch:
            self.evaluate.append("--set=parallel={}")  # on one process, however many trained
        self.asked: int | None = None  # the signal
        self.child: subprocess.Popen[bytes] | None = None

    def run(self, *, until_eof: bool) -> int:
        for path in (self.log, self.ended):
            path.parent.mkdir(parents=True, exist_ok=True)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, self._hand_on)
        if until_eof:
            threading.Thread(target=_tell_of_eof, daemon=True).start()
        with self.lock.open("w") as lock, self.log.open("ab") as log:
            if not _lock(lock, lambda: self.asked is not None):  # what it ends with, who holds it will say
                return AGAIN if self.asked is not None else 2
            code, why = self._locked(log)
        if code != AGAIN:
            beside = self.ended.with_suffix(".tmp")
            beside.write_text(json.dumps({"code": code, "why": why, "host": socket.gethostname()}), encoding="utf-8")
            os.replace(beside, self.ended)
        return code

    def _locked(self, log: IO[bytes]) -> tuple[int, str]:
        """(exit code, why)."""
        self.ended.unlink(missing_ok=True)  # of an earlier try
        if self.final.is_file():
            return 0, ""
        for command in (self.train, self.evaluate):
            if self.asked is not None:
                return AGAIN, ""
            said = log.tell()
            code = self._command(command, log)
            if self.asked is not None and code:
                return AGAIN, ""
            if code:
                return (code if code > 0 else 128 - code), _last_line(self.log, said, code)
        return 0, ""

    def _command(self, command: list[str], log: IO[bytes]) -> int:
        log.write(f"+ {' '.join(command)}\n".encode())
        log.flush()
        # In a session of its own: what the terminal sends comes to us alone, and we hand it on once.
        self.child = subprocess.Popen(
            command,
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=_leave_with_the_parent,
        )
        if self.asked is not None:  # between the last look and now
            self.child.send_signal(self.asked)
        code = self.child.wait()
        log.seek(0, os.SEEK_END)
        return code

    def _hand_on(self, number: int, frame: FrameType | None) -> None:
        first, self.asked = self.asked is None, number if number != signal.SIGINT else signal.SIGTERM
        if first and self.child is not None:
            with suppress(ProcessLookupError):
                self.child.send_signal(self.asked)


def _lock(file: IO[str], asked: Callable[[], bool]) -> bool:
    """False where another holds it for longer than a save takes."""
    until = time.monotonic() + _PATIENCE
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() > until or asked():
                return False
            time.sleep(0.5)
        except OSError:  # a network file system without locks: `sisa train` says so too
            return True


def _tell_of_eof() -> None:
    while os.read(0, 1024):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


def _leave_with_the_parent() -> None:
    """SIGTERM, which saves, when this process is killed. Linux; elsewhere the run goes on to its end."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _last_line(log: Path, since: int, code: int) -> str:
    with log.open("rb") as file:
        file.seek(since)
        lines = [line for line in file.read().decode(errors="replace").splitlines() if line.strip()]
    return f"{lines[-1].strip() if len(lines) > 1 else 'it said nothing'} (exit code {code}, see {log})"


if __name__ == "__main__":
    raise SystemExit(main())
