"""A copy of a rank's state in host memory, taken while the step waits, so that training goes on while it is written.

Never more than one: its buffers are made at the first save and used again by every later one. Pinned beside a GPU.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from sisa_dist.parallel.flat_shard import FlatShard


def local_memory(view: Tensor) -> Tensor:
    """The plain tensor that a view of `Engine.state_tensors` shows."""
    if isinstance(view, DTensor):
        return view.to_local()
    return view.as_subclass(Tensor) if isinstance(view, FlatShard) else view


def num_bytes(tensors: Mapping[str, Tensor]) -> int:
    """What a copy of them needs on this rank."""
    return sum(local.numel() * local.element_size() for local in map(local_memory, tensors.values()))


class Staging:
    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    def copy(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The same views over copies. They hold until the next call."""
        copies, on_gpu = {}, False
        for name, view in tensors.items():
            source = local_memory(view)
            on_gpu |= source.is_cuda
            if name not in self._buffers:
                self._buffers[name] = torch.empty(source.shape, dtype=source.dtype, pin_memory=source.is_cuda)
            self._buffers[name].copy_(source, non_blocking=True)
            copies[name] = _with_memory(view, self._buffers[name])
        if on_gpu:
            torch.cuda.synchronize()  # what is under way reads weights that the next step changes
        return copies


def _with_memory(view: Tensor, memory: Tensor) -> Tensor:
    if isinstance(view, DTensor):
        return DTensor(memory, view._spec, requires_grad=False)  # type: ignore[call-arg, arg-type]
    return view.over(memory) if isinstance(view, FlatShard) else memory
