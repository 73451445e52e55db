"""A run that broke ends soon, everywhere, with a line that names the rank that broke it.

A rank whose peer is gone may wait in a collective for the whole timeout (NCCL), or get an exception that names an
address (gloo). So each rank keeps a heartbeat, and a thread looks at two things: has the main thread been in one phase
for too long, is a rank of this host gone. Then it says who is to blame and ends the process. Killing the other
ranks is the launcher's work; a rank whose launcher died asks to stop.
"""

from __future__ import annotations

import os
import sys
import threading
import time
import traceback
from datetime import timedelta
from pathlib import Path
from types import FrameType, TracebackType

import torch.distributed as dist

from sisa_dist.config import UserError
from sisa_dist.parallel.mesh import Mesh
from sisa_dist.training.heartbeat import IN_COLLECTIVE, Beat, HeartbeatFile, blame, path_of, process_state, read_beats
from sisa_dist.training.signals import Leave, StopRequest

# Of the timeout: before NCCL's own watchdog aborts the process without a word of ours, and with time left to settle.
_LIMIT = 0.85
_COLLECTIVES = ("distributed/distributed_c10d.py", "distributed/_functional_collectives.py")


class Watchdog:
    """Guards the `with` block. Collective at its start.

    Ends the process with code 1 when the run hangs; an exception that leaves the block gets the verdict as a note.
    """

    def __init__(self, mesh: Mesh, run_folder: Path, *, timeout: timedelta, stop: StopRequest) -> None:
        self._mesh, self._stop = mesh, stop
        self._folder = run_folder / "heartbeats"
        self._limit = _LIMIT * timeout.total_seconds()
        self._interval = min(5.0, self._limit / 60)
        self._neighbours: list[Beat] = []
        self._parent = os.getppid()
        self._main = threading.main_thread().ident
        self._ended = threading.Event()
        self._telling = threading.Lock()

    def __enter__(self) -> Watchdog:
        rank = dist.get_rank()
        self._heartbeat = HeartbeatFile(self._folder, rank, self._mesh.pulse)
        if self._mesh.is_main:  # of an earlier, larger launch
            known = {path_of(self._folder, other) for other in range(self._mesh.world_size)}
            for stale in set(self._folder.glob("rank_*.json")) - known:
                stale.unlink(missing_ok=True)
        beats: list[Beat] = [self._heartbeat.now()] * self._mesh.world_size
        if self._mesh.world_size > 1:
            dist.all_gather_object(beats, self._heartbeat.now())
        self._other_hosts = len({beat.host for beat in beats}) > 1
        self._neighbours = [b for b in beats if b.rank != rank and process_state(b) == "running"]
        self._mesh.pulse.listener = self._heartbeat.write
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if error is not None and not isinstance(error, Leave):
            self._heartbeat.fail(f"{type(error).__name__}: {error}")
            if isinstance(error, Exception) and not isinstance(error, UserError) and self._mesh.world_size > 1:
                # The thread goes on beating while we look, and tells nothing of its own meanwhile.
                with self._telling:
                    error.add_note(self._verdict(f"failed with {type(error).__name__}: {_first_line(error)}"))
        self._ended.set()
        self._thread.join()
        self._mesh.pulse.listener = None
        self._heartbeat.close(well=error is None or isinstance(error, Leave))

    def _watch(self) -> None:
        patience = max(2.0, 4 * self._interval)  # for the main thread to see for itself what a lost peer does to it
        while not self._ended.wait(self._interval):
            stuck = time.monotonic() - self._mesh.pulse.since
            waits = stuck > 2 * self._interval and not self._telling.locked()
            self._heartbeat.at = self._where() if waits else ""
            self._heartbeat.write()
            if self._other_hosts:
                self._heartbeat.sync()
            if self._mesh.world_size > 1 and os.getppid() != self._parent:
                self._stop.ask("the end of its launcher")
            lost = [
                b for b in self._neighbours if process_state(b) == "gone" and path_of(self._folder, b.rank).exists()
            ]
            if stuck > self._limit:
                self._give_up(f"has not moved for {stuck:.0f} s (training.timeout_minutes)")
            elif lost and stuck > patience:
                self._give_up(f"waits for a rank that is gone ({', '.join(str(b.rank) for b in lost)})")

    def _give_up(self, why: str) -> None:
        if not self._telling.acquire(blocking=False):
            return  # the main thread is at it
        if (frame := self._main_frame()) is not None:
            traceback.print_stack(frame)
        self._heartbeat.gives_up = True  # so that nobody takes it for a rank that went of its own
        print(self._verdict(why), file=sys.stderr, flush=True)
        # Not sys.exit: the main thread cannot be reached, and exit handlers may wait for the rank that is gone.
        os._exit(1)

    def _main_frame(self) -> FrameType | None:
        return sys._current_frames().get(self._main or 0)

    def _where(self) -> str:
        """The collective that the main thread is in, by PyTorch's name for it, or else the line of code."""
        frames = [frame for frame, _ in traceback.walk_stack(self._main_frame())]  # innermost first
        collectives = [f.f_code.co_name for f in frames if f.f_code.co_filename.endswith(_COLLECTIVES)]
        if collectives:
            return IN_COLLECTIVE + collectives[-1]
        return f"{Path(frames[0].f_code.co_filename).name}:{frames[0].f_lineno}" if frames else ""

    def _verdict(self, why: str) -> str:
        before = read_beats(self._folder)
        for _ in range(3):  # until every living rank has beaten again
            time.sleep(self._interval)
            self._heartbeat.write()
        mine = self._heartbeat.now()
        suspect = blame(mine.rank, before, read_beats(self._folder))
        told = f"; suspect: {suspect}" if suspect else ""
        return f"sisa: {mine}: {why}{told}"


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "")
