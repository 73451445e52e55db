"""Pools of gloo processes that stay: a job costs milliseconds, so hundreds of cases fit into a test run.

One pool a world size, started when first needed and stopped (SIGSTOP) between jobs: gloo's threads wake a hundred
times a second, and some forty idle ranks would take a fifth of a core from the tests. A rank that raises while others
wait in a collective would hang them, so a pool with a failure is killed, and the next job starts another.
"""

from __future__ import annotations

import atexit
import gc
import logging
import os
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch.distributed as dist

from distributed.forking import forking, leave_with_the_server

TIMEOUT = 240  # seconds of one job; those of the fast suite take ten at most on two quiet cores


class RankFailed(Exception):
    """A job raised on some rank; the text is that rank's traceback."""


class Pool:
    """`world_size` processes with one default process group: NCCL where each has a GPU, else gloo."""

    def __init__(self, world_size: int) -> None:
        self._folder = tempfile.TemporaryDirectory()
        context = forking()
        self._pipes: list[Connection] = []
        self._processes = []
        for rank in range(world_size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, world_size, self._folder.name, theirs), daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)

    def run(self, function: Callable[..., Any], *arguments: Any, **options: Any) -> list[Any]:
        """`function(*arguments, **options)` on every rank; results by rank. RankFailed if one raises or hangs."""
        self._signal(signal.SIGCONT)
        for pipe in self._pipes:
            pipe.send((function, arguments, options))
        results: dict[int, Any] = {}
        cleared: set[int] = set()  # ranks that have put away what the job left
        deadline = time.monotonic() + TIMEOUT
        while len(cleared) < len(self._pipes):
            waiting = [pipe for rank, pipe in enumerate(self._pipes) if rank not in cleared]
            ready = wait(waiting, timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                missing = [rank for rank in range(len(self._pipes)) if rank not in cleared]
                raise RankFailed(f"ranks {missing} gave no result within {TIMEOUT} s")
            for rank in [rank for rank, pipe in enumerate(self._pipes) if pipe in ready]:
                try:
                    told = self._pipes[rank].recv()
                except EOFError:
                    raise RankFailed(f"rank {rank} died") from None
                if rank in results:
                    cleared.add(rank)
                    continue
                good, results[rank] = told
                if not good:
                    raise RankFailed(f"rank {rank}:\n{results[rank]}")
        self._signal(signal.SIGSTOP)
        return [results[rank] for rank in range(len(self._pipes))]

    def _signal(self, number: signal.Signals) -> None:
        if torch.cuda.is_available():
            return  # NCCL's watchdog would take the pause for a hang
        for process in self._processes:
            assert process.pid is not None
            os.kill(process.pid, number)

    def kill(self) -> None:
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()
        self._folder.cleanup()


_POOLS: dict[int, Pool] = {}


def run_job(world_size: int, function: Callable[..., Any], *arguments: Any, **options: Any) -> list[Any]:
    """`function(*arguments, **options)` on the ranks of the pool of `world_size`."""
    pool = _POOLS.get(world_size) or _POOLS.setdefault(world_size, Pool(world_size))
    try:
        return pool.run(function, *arguments, **options)
    except BaseException:  # of a rank that died between jobs too, and of Ctrl-C, after which answers are left in pipes
        _POOLS.pop(world_size).kill()
        raise


@atexit.register
def _close() -> None:
    while _POOLS:
        _POOLS.popitem()[1].kill()


def _serve(rank: int, world_size: int, folder: str, pipe: Connection) -> None:
    leave_with_the_server()
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_RANK": str(rank)}
    os.environ["LOCAL_WORLD_SIZE"] = str(world_size)
    torch.set_num_threads(1)
    # Looking at whole tensors under tp × dp gathers twice, which is slow and of no account here.
    logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)
    backend = "gloo" if torch.cuda.device_count() < world_size else "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend, init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world_size)
    groups, library = _Groups(), dist.distributed_c10d
    library._new_group_with_tag = groups.lend(library._new_group_with_tag)
    while True:
        gc.freeze()  # mostly modules: going through them in every collection took a fifth of a job
        try:
            function, arguments, options = pipe.recv()
        except EOFError:
            os._exit(0)
        try:
            outcome = (True, function(*arguments, **options))
        except BaseException:
            outcome = (False, traceback.format_exc())
        pipe.send(outcome)
        del function, arguments, options, outcome
        groups.used.clear()
        _drop_engines()
        pipe.send(None)


class _Groups:
    """Every job is given the groups of the ones before, in place of new ones. A gloo group has threads that wake a
    hundred times a second for as long as anything refers to it (caches of DTensor, DeepSpeed's parameters): a few dozen
    on each of four ranks left no core to the tests, and destroying a group does not end them.

    So jobs share a group's timeout and whatever message nobody received; what needs a group of its own kind has
    processes of its own (ranks.py, launched.py)."""

    def __init__(self) -> None:
        self.used: Counter[str] = Counter()
        self._made: dict[tuple[str, int], Any] = {}

    def lend(self, make: Callable[..., Any]) -> Callable[..., Any]:
        """In place of torch's maker of groups: within a job none is given twice."""

        def lent(*arguments: Any, **options: Any) -> Any:
            alike = repr((arguments, sorted(options.items())))
            if " object at 0x" in alike:  # options whose text says where they lie, which may be elsewhere on a rank
                return make(*arguments, **options)
            key = (alike, self.used[alike])
            self.used[alike] += 1
            if key not in self._made:
                self._made[key] = make(*arguments, **options)
            return self._made[key]

        return lent


def _drop_engines() -> None:
    """DeepSpeed's are held in a ring through autograd's hooks, which no collector sees; its groups by its modules."""
    deepspeed = sys.modules.get("deepspeed")
    if deepspeed is not None:
        deepspeed.utils.groups._release_process_group_references()
        for engine in [found for found in gc.get_objects() if type(found) is deepspeed.DeepSpeedEngine]:
            if "optimizer" in vars(engine):
                engine.destroy()
                vars(engine.optimizer).clear()
                vars(engine).clear()
            del engine
    gc.collect()
