"""Processes forked from one server, which has imported for all of them what takes each of them seconds.

The server is the first that any test starts, and the one there is: tests/conftest.py imports this before.
"""

from __future__ import annotations

import multiprocessing
from multiprocessing.context import ForkServerContext

import torch

_IMPORTED = ["torch", "torch._dynamo", "torch.distributed.fsdp", "torch.distributed.checkpoint"]
_IMPORTED += ["sisa_dist.engine", "sisa_dist.training.trainer"]
if not torch.cuda.is_available():  # its import settles for which accelerator, before a process can say
    _IMPORTED += ["deepspeed", "sisa_dist.engine.deepspeed"]
    # What it imports with its first engine: two seconds of every rank.
    _IMPORTED += ["deepspeed.module_inject.auto_ep_layer", "deepspeed.runtime.zero.muon.muon_optimizer"]
multiprocessing.get_context("forkserver").set_forkserver_preload(_IMPORTED)


def forking() -> ForkServerContext:
    """The context of that server. A module that cannot be imported there is left out without a word."""
    return multiprocessing.get_context("forkserver")
