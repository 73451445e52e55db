"""Processes forked from one server, which has imported for all of them what takes each of them seconds.

The server is the first that any test starts, and the one there is: tests/conftest.py imports this before.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext

import torch

IMPORTED = ["torch", "torch._dynamo", "torch.distributed.fsdp", "torch.distributed.checkpoint"]
IMPORTED += ["sisa_dist.engine", "sisa_dist.training.trainer"]
if not torch.cuda.is_available():  # its import settles for which accelerator, before a process can say
    IMPORTED += ["deepspeed", "sisa_dist.engine.deepspeed"]
    # What it imports with its first engine: two seconds of every rank.
    IMPORTED += ["deepspeed.module_inject.auto_ep_layer", "deepspeed.runtime.zero.muon.muon_optimizer"]
multiprocessing.get_context("forkserver").set_forkserver_preload(IMPORTED)


def forking() -> ForkServerContext:
    """The context of that server."""
    return multiprocessing.get_context("forkserver")


def leave_with_the_server() -> None:
    """Of a forked process that would not see by itself that pytest is gone, as a stopped one: it dies with the server
    (PR_SET_PDEATHSIG), which leaves when nobody holds the other end of its own pipe, of which each child is given one.
    """
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    os.close(forkserver._forkserver._forkserver_alive_fd)  # type: ignore[attr-defined]
