"""Live bytes of tensor storages, followed operator by operator, by purpose and by moment of a training step.

It sees what an operator is given and what it returns, on real or fake tensors, so it works where an allocator keeps no
statistics (the CPU) and where nothing is allocated at all. Of what a kernel takes and gives back inside one call it
knows the few large cases of `_WORKSPACE`; our own custom operators are Python, and are run once per shape to learn it.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any, Literal, Self
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sisa_dist.training.inside import call_key, is_ours, run_inside

Purpose = Literal["states", "gradients", "gathered", "rest"]


def _cast_for_norm(xs: list[Tensor], *rest: Any, **named: Any) -> int:
    dtypes = [value for value in (*rest, *named.values()) if isinstance(value, torch.dtype)]
    return max(x.numel() for x in xs) * dtypes[0].itemsize if dtypes and dtypes[0] != xs[0].dtype else 0


# Bytes a kernel of PyTorch's takes beyond what it returns, found with the profiler's memory events (torch 2.13):
# e^(x − max) of all of x; one tensor at a time in the norm's own dtype.
_WORKSPACE: dict[str, Callable[..., int]] = {
    "aten::logsumexp": lambda x, *_, **__: x.nbytes,
    "aten::_foreach_norm": _cast_for_norm,
}

_DEVICE_OF = torch.ops.prim.device.default

_INSIDE: dict[Any, int] = {}  # bytes our operators take beyond arguments and results, once learnt for all meters

_GATHERING = ("fsdp::all_gather_copy_in", "fsdp::split_with_sizes_copy")  # their buffers are gathered weights


class MemoryMeter(TorchDispatchMode):
    """Counts while entered. `live`: bytes now, by purpose. `starts`, `peaks`: what was live when a moment first began,
    and at most in it, in order.

    `states` and `gradients` are what `mark` was told, `gathered` what FSDP2's all-gathers made, `rest` everything else:
    activations, temporaries and gradients on their way. Every storage counts once, however many tensors view it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[str, int] = {"states": 0, "gradients": 0, "gathered": 0, "rest": 0}
        self.starts: dict[str, dict[str, int]] = {}
        self.peaks: dict[str, dict[str, int]] = {}
        self.on_host = 0  # bytes of activations that wait in host memory, which a rehearsal fills in
        self._storages: dict[int, tuple[weakref.ref[torch.UntypedStorage], int, Purpose]] = {}
        self._moment = ""

    def __enter__(self) -> Self:
        # FSDP2 frees and refills gathered weights by resizing their storages, which is no operator.
        real, meter = torch.UntypedStorage.resize_, self

        def resize_(storage: torch.UntypedStorage, size: int) -> Any:
            result = real(storage, size)
            meter._see(storage, "gathered")
            return result

        self._patch = mock.patch.object(torch.UntypedStorage, "resize_", resize_)
        self._patch.start()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._patch.stop()

    def begin(self, moment: str) -> None:
        """From here on peaks are those of `moment`; it may come again."""
        self._moment = moment
        self.starts.setdefault(moment, dict(self.live))
        self._note(0)

    def mark(self, tensors: Iterable[Tensor], purpose: Purpose) -> None:
        """This is what they are for."""
        for tensor in tensors:
            self._see(_storage(tensor), purpose)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is _DEVICE_OF and isinstance(args[0], FakeTensor):  # half of all calls; at length 0.3 ms
            return args[0].fake_device
        kwargs = kwargs or {}
        name = func.name().split(".")[0]
        if is_ours(name):
            self._note(self._taken_inside(name, args))
        elif name in _WORKSPACE:
            self._note(_WORKSPACE[name](*args, **kwargs))
        result = func(*args, **kwargs)
        purpose: Purpose = "gathered" if name in _GATHERING else "rest"
        for tensor in tree_leaves((args, kwargs, result)):
            if isinstance(tensor, Tensor):
                self._see(_storage(tensor), purpose)
        return result

    def _taken_inside(self, name: str, args: tuple[Any, ...]) -> int:
        key = call_key(name, args)
        if key not in _INSIDE:
            inner = MemoryMeter()
            inner.mark((a for a in args if isinstance(a, Tensor)), "states")
            run_inside(name, args, inner)
            _INSIDE[key] = inner.peaks[""]["rest"]
        return _INSIDE[key]

    def _see(self, storage: torch.UntypedStorage, purpose: Purpose) -> None:
        key, size = storage._cdata, storage.nbytes()
        known = self._storages.get(key)
        if known is not None and known[0]() is storage:
            reference, before, was = known
            purpose = was if purpose == "rest" or was == "states" else purpose
            if (before, was) == (size, purpose):
                return
            self.live[was] -= before
        else:
            reference = weakref.ref(storage, lambda _: self._forget(key))
        self._storages[key] = reference, size, purpose
        self.live[purpose] += size
        self._note(0)

    def _forget(self, key: int) -> None:
        _, size, purpose = self._storages.pop(key)
        self.live[purpose] -= size

    def _note(self, more: int) -> None:
        """`more` bytes beyond what is live exist for an instant."""
        peak = self.peaks.get(self._moment)
        if peak is None or sum(self.live.values()) + more > sum(peak.values()):
            self.peaks[self._moment] = {**self.live, "rest": self.live["rest"] + more}


def _storage(tensor: Tensor) -> torch.UntypedStorage:
    return (tensor._local_tensor if isinstance(tensor, DTensor) else tensor).untyped_storage()
