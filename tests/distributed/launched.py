"""Ranks that a test may kill: real processes whose exit codes and last words count, as a launcher would start them."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from distributed.forking import forking, leave_with_the_server

TIMEOUT = 120


def start_ranks(function: Callable[..., Any], world_size: int, folder: Path, *arguments: Any) -> list[BaseProcess]:
    """`function(*arguments)` on every rank, over gloo; stderr goes to folder/stderrN, a SystemExit into the code."""
    folder.mkdir(parents=True)
    context = forking()
    processes: list[BaseProcess] = [
        context.Process(target=_rank, args=(rank, world_size, folder, function, arguments))
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    return processes


def exit_codes(processes: list[BaseProcess], timeout: float = TIMEOUT) -> list[int | None]:
    """Codes by rank, negative for a signal; None and killed where a rank did not end in time."""
    deadline = time.monotonic() + timeout
    codes = []
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
        codes.append(process.exitcode)
    for process in processes:
        process.kill()
    return codes


def said(folder: Path, rank: int) -> str:
    return (folder / f"stderr{rank}").read_text(encoding="utf-8")


def wait_for(happened: Callable[[], bool], timeout: float = 120) -> None:
    deadline = time.monotonic() + timeout
    while not happened():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.01)


def _rank(rank: int, world_size: int, folder: Path, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    leave_with_the_server()
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_RANK": str(rank)}
    import torch
    import torch.distributed as dist

    os.dup2(os.open(folder / f"stderr{rank}", os.O_CREAT | os.O_WRONLY), 2)
    torch.set_num_threads(1)
    if world_size > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world_size)
    code = 0
    try:
        function(*arguments)
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1
    except BaseException:
        import traceback

        traceback.print_exc()
        code = 1
    sys.stderr.flush()
    os._exit(code)
