"""A copy of a rank's state in host memory, so that training goes on while it is written.

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


class Moment:
    """A point in a device's work."""

    def __init__(self, event: torch.cuda.Event | None) -> None:
        self.event = event

    @staticmethod
    def now(device: torch.device) -> Moment:
        return Moment(torch.cuda.current_stream(device).record_event() if device.type == "cuda" else None)


class Staging:
    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    def copy(self, tensors: Mapping[str, Tensor], *, after: Moment) -> dict[str, Tensor]:
        """The same views over copies, of what the tensors hold `after` then. They hold until the next call.

        On a GPU it goes through a stream of its own, beside the work of the next step.
        """
        devices = {local.device for local in map(local_memory, tensors.values()) if local.is_cuda}
        streams = {device: torch.cuda.Stream(device) for device in devices}
        for stream in streams.values():
            assert after.event is not None, "a GPU's tensors need a point in its work"
            stream.wait_event(after.event)
        copies = {}
        for name, view in tensors.items():
            source = local_memory(view)
            if name not in self._buffers:
                self._buffers[name] = torch.empty(source.shape, dtype=source.dtype, pin_memory=source.is_cuda)
            with torch.cuda.stream(streams.get(source.device)):  # None: as it is
                self._buffers[name].copy_(source, non_blocking=True)
            copies[name] = _with_memory(view, self._buffers[name])
        for stream in streams.values():
            stream.synchronize()
        return copies


def _with_memory(view: Tensor, memory: Tensor) -> Tensor:
    if isinstance(view, DTensor):
        return DTensor(memory, view._spec, requires_grad=False)  # type: ignore[call-arg, arg-type]
    return view.over(memory) if isinstance(view, FlatShard) else memory
