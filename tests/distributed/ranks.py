"""Runs a function on real gloo processes: a preloaded forkserver, a file as rendezvous, no ports."""

from __future__ import annotations

import os
import pickle
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from distributed.forking import forking, leave_with_the_server

TIMEOUT = 180


def run_ranks(function: Callable[..., Any], world_size: int, folder: Path, *arguments: Any) -> list[Any]:
    """`function(*arguments)` on every rank; their results by rank. Fails with the first rank's traceback."""
    folder.mkdir(parents=True, exist_ok=True)
    context = forking()
    processes = [
        context.Process(target=_rank, args=(rank, world_size, folder, function, arguments))
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(TIMEOUT)
        if process.is_alive():
            process.kill()
    results = []
    for rank in range(world_size):
        path = folder / f"result{rank}"
        assert path.exists(), f"rank {rank} wrote no result within {TIMEOUT} s"
        good, value = pickle.loads(path.read_bytes())
        assert good, f"rank {rank}:\n{value}"
        results.append(value)
    return results


def _rank(rank: int, world_size: int, folder: Path, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    leave_with_the_server()
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_RANK": str(rank)}
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world_size)
    try:
        outcome = (True, function(*arguments))
    except BaseException:
        outcome = (False, traceback.format_exc())
    beside = folder / f".result{rank}"
    beside.write_bytes(pickle.dumps(outcome))
    beside.rename(folder / f"result{rank}")
    if outcome[0]:
        dist.barrier()
    # A rank may abort in a library's exit handler after right results; what it wrote is what counts.
    os._exit(0)
