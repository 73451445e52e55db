"""Pools of gloo processes that stay: a job costs milliseconds, so hundreds of cases fit into a test run.

One pool a world size, started when first needed. A rank that raises while others wait in a collective would hang
them, so a pool with a failure is killed, and the next job starts another.
"""

from __future__ import annotations

import atexit
import gc
import logging
import os
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

from distributed.forking import forking

TIMEOUT = 240  # seconds of one job; those of the fast suite take ten at most on two quiet cores
_THREADS = 80  # of a rank, from which a pool makes room for another


class RankFailed(Exception):
    """A job raised on some rank; the text is that rank's traceback."""


class Pool:
    """`world_size` processes with one default process group: NCCL where each has a GPU, else gloo."""

    def __init__(self, world_size: int) -> None:
        self._folder = tempfile.TemporaryDirectory()
        context = forking()
        self._pipes: list[Connection] = []
        self._processes = []
        self.worn = False
        for rank in range(world_size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, world_size, self._folder.name, theirs), daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)

    def run(self, function: Callable[..., Any], *arguments: Any, **options: Any) -> list[Any]:
        """`function(*arguments, **options)` on every rank; results by rank. RankFailed if one raises or hangs."""
        for pipe in self._pipes:
            pipe.send((function, arguments, options))
        results: dict[int, Any] = {}
        threads: dict[int, int] = {}  # of each rank that has cleared away what the job left
        deadline = time.monotonic() + TIMEOUT
        while len(threads) < len(self._pipes):
            waiting = [pipe for rank, pipe in enumerate(self._pipes) if rank not in threads]
            ready = wait(waiting, timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                missing = [rank for rank in range(len(self._pipes)) if rank not in threads]
                raise RankFailed(f"ranks {missing} gave no result within {TIMEOUT} s")
            for rank in [rank for rank, pipe in enumerate(self._pipes) if pipe in ready]:
                try:
                    told = self._pipes[rank].recv()
                except EOFError:
                    raise RankFailed(f"rank {rank} died") from None
                if rank in results:
                    threads[rank] = told
                    continue
                good, results[rank] = told
                if not good:
                    raise RankFailed(f"rank {rank}:\n{results[rank]}")
        self.worn = max(threads.values()) > _THREADS
        return [results[rank] for rank in range(len(self._pipes))]

    def kill(self) -> None:
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()
        self._folder.cleanup()


_POOLS: dict[int, Pool] = {}


def run_job(world_size: int, function: Callable[..., Any], *arguments: Any, **options: Any) -> list[Any]:
    """`function(*arguments, **options)` on the ranks of the pool of `world_size`."""
    if world_size in _POOLS and _POOLS[world_size].worn:
        _POOLS.pop(world_size).kill()
    pool = _POOLS.get(world_size) or _POOLS.setdefault(world_size, Pool(world_size))
    try:
        return pool.run(function, *arguments, **options)
    except RankFailed:
        _POOLS.pop(world_size).kill()
        raise


@atexit.register
def _close() -> None:
    while _POOLS:
        _POOLS.popitem()[1].kill()


def _serve(rank: int, world_size: int, folder: str, pipe: Connection) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_RANK": str(rank)}
    os.environ["LOCAL_WORLD_SIZE"] = str(world_size)
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    # Looking at whole tensors under tp × dp gathers twice, which is slow and of no account here.
    logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)
    backend = "gloo" if torch.cuda.device_count() < world_size else "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend, init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world_size)
    groups, library = _Groups(), dist.distributed_c10d
    library._new_group_with_tag = groups.lend(library._new_group_with_tag)
    gc.freeze()  # the modules: each job ends in a collection
    while True:
        try:
            function, arguments, options = pipe.recv()
        except EOFError:
            os._exit(0)
        try:
            outcome = (True, function(*arguments, **options))
        except BaseException:
            outcome = (False, traceback.format_exc())
        pipe.send(outcome)
        del outcome
        groups.used.clear()
        _drop_engines()
        pipe.send(len(os.listdir("/proc/self/task")))


class _Groups:
    """Every job is given the groups of the ones before. A gloo group has threads that wake a hundred times a second for
    as long as anything refers to it (caches of DTensor, DeepSpeed's parameters): a few dozen on each of four ranks left
    no core to the tests."""

    def __init__(self) -> None:
        self.used: Counter[str] = Counter()
        self._made: dict[tuple[str, int], Any] = {}

    def lend(self, make: Callable[..., Any]) -> Callable[..., Any]:
        """In place of torch's maker of groups: within a job none is given twice."""

        def lent(*arguments: Any, **options: Any) -> Any:
            alike = repr((arguments, sorted(options.items())))
            key = (alike, self.used[alike])
            self.used[alike] += 1
            if key not in self._made:
                self._made[key] = make(*arguments, **options)
            return self._made[key]

        return lent


def _drop_engines() -> None:
    """DeepSpeed's are held in a ring through autograd's hooks, which no collector sees."""
    deepspeed = sys.modules.get("deepspeed")
    if deepspeed is not None:
        for engine in [found for found in gc.get_objects() if type(found) is deepspeed.DeepSpeedEngine]:
            if "optimizer" in vars(engine):
                engine.destroy()
                vars(engine.optimizer).clear()
                vars(engine).clear()
    gc.collect()
