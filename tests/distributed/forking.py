"""Processes forked from one server, which has imported for all of them what takes each of them seconds."""

from __future__ import annotations

import multiprocessing
from multiprocessing.context import ForkServerContext

_IMPORTED = ["torch", "torch._dynamo", "torch.distributed.fsdp", "torch.distributed.checkpoint", "deepspeed"]
_IMPORTED += ["sisa_dist.engine", "sisa_dist.training.trainer"]


def forking() -> ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_IMPORTED)
    return context
