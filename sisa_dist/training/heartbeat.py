"""What each rank last did, in one small file a rank, and who is to blame by them when a run breaks.

RUN/heartbeats/rank_00003.json outlives a kill: it is written as a phase is entered (one write into the page cache, a
few microseconds) and again by the watchdog's thread, so that a stopped process can be told from one that waits.
The verdict is a guess from a distance: over a file system that is slow to show other hosts' writes, or between clocks
that are minutes apart, the oldest heartbeat may be the wrong one.
"""

from __future__ import annotations

import json
import os
import socket
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from sisa_dist.parallel.mesh import Pulse

IN_COLLECTIVE = "collective "
_WIDTH = 1024  # bytes of a file; one write of fixed length is never seen half


@dataclass(frozen=True)
class Beat:
    rank: int
    host: str
    pid: int
    step: int
    phase: str
    entered: float  # seconds since the epoch
    beat: float  # of the last sign of life
    at: str = ""  # once it has not moved for a while: the collective it is in, or the line of code
    failed: str | None = None  # its exception, in one line
    failed_at: float = 0.0
    gave_up: bool = False  # it ends because it waited in vain

    def __str__(self) -> str:
        at = f" ({self.at})" if self.at else ""
        return f"rank {self.rank} on host {self.host} (pid {self.pid}), in step {self.step}, {self.phase}{at}"


class HeartbeatFile:
    """This rank's file. `write` may be called from any thread."""

    def __init__(self, folder: Path, rank: int, pulse: Pulse) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = path_of(folder, rank)
        self._rank, self._pulse, self._host = rank, pulse, socket.gethostname()
        self._file = os.open(self.path, os.O_CREAT | os.O_TRUNC | os.O_WRONLY, 0o644)
        self._failed: str | None = None
        self._failed_at = 0.0
        self.at, self.gives_up = "", False
        self.write()

    def write(self) -> None:
        # No lock: should two threads write at once, the later of two records microseconds apart may lose.
        with suppress(OSError):  # a full disk must not end a run by way of its heartbeat
            os.pwrite(self._file, _encode(self.now()), 0)

    def sync(self) -> None:
        """Hand what was written to the file system, which shows it to other hosts. May take long on a busy disk."""
        with suppress(OSError):
            os.fsync(self._file)

    def fail(self, why: str) -> None:
        self._failed, self._failed_at = " ".join(why.split())[:300], time.time()
        self.write()
        self.sync()

    def now(self) -> Beat:
        pulse, now = self._pulse, time.time()
        entered = now - (time.monotonic() - pulse.since)
        return Beat(
            rank=self._rank,
            host=self._host,
            pid=os.getpid(),
            step=pulse.step,
            phase=pulse.phase[:80],
            entered=entered,
            beat=now,
            at=self.at[:80],
            failed=self._failed,
            failed_at=self._failed_at,
            gave_up=self.gives_up,
        )

    def close(self, *, well: bool) -> None:
        """A rank that ended well leaves no file."""
        if well:
            self.path.unlink(missing_ok=True)
        os.close(self._file)


def path_of(folder: Path, rank: int) -> Path:
    return folder / f"rank_{rank:05d}.json"


def read_beats(folder: Path) -> dict[int, Beat]:
    """By rank; ranks that ended well have none."""
    beats = {}
    for path in sorted(folder.glob("rank_*.json")):
        try:
            beat = Beat(**json.loads(path.read_bytes()))
        except (OSError, ValueError, TypeError):  # being made, or removed as we look
            continue
        beats[beat.rank] = beat
    return beats


def blame(mine: int, before: dict[int, Beat], after: dict[int, Beat]) -> str | None:
    """Which rank broke the run and why it is thought so, as rank `mine` sees it; None if no other is suspect.

    `before` and `after` are the heartbeats at two moments, far enough apart for every living rank to beat in between.
    """
    others = [beat for rank, beat in after.items() if rank != mine]
    unexplained = [beat for beat in others if beat.failed is None and not beat.gave_up]
    for beat in unexplained:
        if (state := process_state(beat)) in ("gone", "stopped"):
            return f"{beat}: its process is {state}"
    silent = [beat for beat in unexplained if beat.rank in before and beat.beat <= before[beat.rank].beat]
    if silent:
        oldest = min(silent, key=lambda beat: beat.beat)
        return f"{oldest}: no sign of life for {time.time() - oldest.beat:.0f} s"
    failed = [beat for beat in after.values() if beat.failed is not None]
    if failed:
        first = min(failed, key=lambda beat: beat.failed_at)
        return None if first.rank == mine else f"{first}: it failed first, with {first.failed}"
    # Who is in a collective waits for somebody who is not.
    outside = [beat for beat in after.values() if beat.at and not beat.at.startswith(IN_COLLECTIVE)]
    behind = min(outside or after.values(), key=lambda beat: (beat.step, beat.entered), default=None)
    if behind is None or behind.rank == mine:
        return None
    return f"{behind}: it lives, but is furthest behind, {time.time() - behind.entered:.0f} s in that phase"


def process_state(beat: Beat) -> str:
    """gone, stopped, running, or unknown where the process is another host's (or another container's)."""
    if beat.host != socket.gethostname():
        return "unknown"
    try:
        # The state follows the command's name, which may itself hold spaces and brackets.
        state = (
            Path(f"/proc/{beat.pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[0]
        )
    except (OSError, IndexError):
        return "gone" if Path("/proc/self/stat").exists() else "unknown"
    return {"Z": "gone", "X": "gone", "T": "stopped", "t": "stopped"}.get(state, "running")


def _encode(beat: Beat) -> bytes:
    return json.dumps(asdict(beat)).encode().ljust(_WIDTH - 1) + b"\n"
