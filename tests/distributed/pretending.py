"""A process apart for what brings its own pretended process group, which cannot stand beside the tests' real ones."""

from __future__ import annotations

import functools
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any

from distributed.forking import forking, leave_with_the_server


def alone(function: Callable[..., Any], *arguments: Any, timeout: float = 300, **options: Any) -> Any:
    """`function(*arguments, **options)` in the one process that stays; what it raises is raised here."""
    return _executor().submit(function, *arguments, **options).result(timeout=timeout)


@functools.cache
def _executor() -> ProcessPoolExecutor:
    return ProcessPoolExecutor(1, mp_context=forking(), initializer=_one_thread)


def _one_thread() -> None:
    import torch

    leave_with_the_server()
    torch.set_num_threads(1)
