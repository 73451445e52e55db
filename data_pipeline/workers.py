"""Worker processes for `sisa prepare`: one job each at a time, over a pipe of their own, dead as soon as the parent is.

They are plain children that run this module, not multiprocessing's: those run the caller's main module again (a script
without a guard would start itself over), and outlive a parent that is killed. What is sent is pickled between a parent
and its own children. With no workers the jobs run here, one after the other, and nothing else differs.
"""

from __future__ import annotations

import errno
import json
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection, wait
from typing import Any, NamedTuple

from data_pipeline.building import Interrupted
from sisa_dist.config import UserError

Report = Callable[[int], None]  # called now and then with what was done since the last time, for the progress bar
Function = Callable[[Any, Any, Report], Any]  # (setup, argument, report) -> result
_START = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from data_pipeline.workers import serve; serve()"
_REPORT_SECONDS = 0.2


class Job(NamedTuple):
    """`name` says in an error what was being done."""

    name: str
    argument: Any


class Workers:
    """Processes that start with the first jobs for them and stay for the next ones; 0: none, all is done here.

    A context manager: at its end, however it comes, they are killed.
    """

    def __init__(self, number: int) -> None:
        self.number = number
        self._pool: list[_Worker] = []

    def run(
        self,
        function: Function,
        setup: Any,
        jobs: Iterable[Job],
        *,
        done: Callable[[Job, Any], None],
        report: Report = lambda amount: None,
    ) -> None:
        """`function` of every job; `done` is called with each result as it comes.

        `function` is importable by its name; `setup` goes to each worker once. `jobs` is drawn from only when a worker
        is free. Raises the first UserError of a job, and Interrupted where a worker dies or the disk is full.
        """
        iterator = iter(jobs)
        if self.number == 0:
            for job in iterator:
                with _disk(job.name):
                    result = function(setup, job.argument, report)
                done(job, result)
            return
        busy: dict[Connection, tuple[_Worker, Job]] = {}
        free = list(self._pool)
        ready_for: set[_Worker] = set()

        def deal() -> None:
            while (free or len(self._pool) < self.number) and (job := next(iterator, None)) is not None:
                if not free:
                    free.append(_Worker())
                    self._pool.append(free[-1])
                worker = free.pop()
                if worker not in ready_for:
                    ready_for.add(worker)
                    worker.send(("setup", (function, setup)))
                worker.send(("job", job.argument))
                busy[worker.connection] = worker, job

        deal()
        while busy:
            for ready in wait(list(busy)):
                assert isinstance(ready, Connection)
                worker, job = busy[ready]
                kind, value = worker.receive(job)
                if kind == "report":
                    report(value)
                    continue
                del busy[ready]
                if kind == "refused":
                    raise value
                if kind == "failed":
                    raise RuntimeError(f"{job.name}: a worker failed:\n{value}")
                done(job, value)
                free.append(worker)
            deal()

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *exception: object) -> None:
        for worker in self._pool:
            worker.connection.close()
            worker.process.kill()
        for worker in self._pool:
            worker.process.wait()
        self._pool = []


def serve() -> None:
    """The worker's side: jobs come in, results go out, and when the parent is gone so is this process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent has it too, and ends us
    connection = Connection(int(sys.argv[2]))
    jobs: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def receive() -> None:
        try:
            while True:
                jobs.put(connection.recv())
        except (EOFError, OSError):
            os._exit(0)

    # Daemon: it must not keep the process, and it ends it when the pipe closes, whatever the main thread is at.
    threading.Thread(target=receive, daemon=True).start()
    function: Function | None = None
    setup: Any = None
    while True:
        kind, argument = jobs.get()
        if kind == "setup":
            function, setup = argument
            continue
        assert function is not None
        amount, last = 0, time.monotonic()

        def report(more: int) -> None:
            nonlocal amount, last
            amount += more
            if time.monotonic() - last > _REPORT_SECONDS:
                connection.send(("report", amount))
                amount, last = 0, time.monotonic()

        try:
            with _disk("a worker"):
                answer: tuple[str, Any] = ("done", function(setup, argument, report))
        except UserError as error:
            answer = "refused", error
        except BaseException:
            answer = "failed", traceback.format_exc()
        connection.send(("report", amount))
        connection.send(answer)


class _Worker:
    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            command = [sys.executable, "-c", _START, json.dumps(sys.path), str(theirs.fileno())]
            # One thread each: the cores are shared out by processes.
            single = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1"}
            self.process = subprocess.Popen(
                command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, env=os.environ | single
            )
        self.connection = Connection(ours.detach())

    def send(self, message: tuple[str, Any]) -> None:
        with suppress(OSError):  # it died; receive() says so
            self.connection.send(message)

    def receive(self, job: Job) -> tuple[str, Any]:
        try:
            answer: tuple[str, Any] = self.connection.recv()
        except (EOFError, OSError):
            code = self.process.wait()
            how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
            why = " (out of memory?)" if code == -signal.SIGKILL else ""
            raise Interrupted(
                f"{job.name}: a worker process {how}{why}: run it again, it continues where it stopped; fewer "
                "data.workers take less memory"
            ) from None
        return answer


@contextmanager
def _disk(name: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise Interrupted(
            f"{name}: the disk is full ({error.filename or error.strerror}): make room and run it again, it continues "
            "where it stopped"
        ) from None
