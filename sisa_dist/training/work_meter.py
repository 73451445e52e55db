"""What operators compute and move while a step is played: FLOPs of matrix products, bytes of arguments and results.

Bytes are what an operator is given and gives, each tensor once, as if nothing stayed in a cache; a view is free, and
what is expanded counts as what is stored. Our own custom operators count as one, as the fused kernels they stand for:
they are Python, and are run once a shape for the products inside. FLOPs are by PyTorch's formulas and by those our
operators register, where causal scores are T(T+1)/2 pairs.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from sisa_dist.training.inside import call_key, is_ours, run_inside
from sisa_dist.training.work import Phase, Work

_NAMESPACES = ("c10d", "_c10d_functional", "prim")  # messages are traffic; prim::device asks, and moves nothing
_OVERWRITTEN = ("aten::copy_", "aten::zero_", "aten::fill_")  # their first argument is not read
_CPU_FLASH = "aten::_scaled_dot_product_flash_attention_for_cpu"
_INSIDE: dict[Any, float] = {}  # FLOPs of our operators, once learnt for all meters


class Call(NamedTuple):
    """What is counted as one: of one kind, dtype and size."""

    phase: Phase
    operator: str
    dtype: str
    flops: float
    nbytes: int


class WorkMeter(TorchDispatchMode):
    """Counts while entered. What runs in a backward is `backward`, in a checkpoint's second forward `recomputation`
    (pass `checkpoint_contexts` as its `context_fn`), after `optimizer = True` that; all else is `forward`.

    `times`: how many calls each one that is seen stands for, from now on.
    """

    def __init__(self) -> None:
        super().__init__()
        self.times = 1
        self.optimizer = False
        self._recomputing = False
        self.calls: Counter[Call] = Counter()

    def work(self) -> tuple[Work, ...]:
        """Of all that was counted, in the order it first came."""
        return tuple(
            Work(call.phase, call.operator, call.dtype, times, call.flops, call.nbytes)
            for call, times in self.calls.items()
        )

    def checkpoint_contexts(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), self._recomputation()

    @contextmanager
    def _recomputation(self) -> Iterator[None]:
        self._recomputing = True
        try:
            yield
        finally:
            self._recomputing = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = func.name().split(".")[0]
        if name.split("::")[0] not in _NAMESPACES and not _is_view(func):
            given = [_local(x) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
            flops, nbytes = _flops(func, name, args, kwargs, result), _moved(func, name, args, kwargs, result)
            if is_ours(name):
                flops = flops or self._done_inside(name, args)
            if flops or nbytes:
                floats = [x.dtype for x in (*given, *_tensors(result)) if x.is_floating_point()]
                dtype = str(floats[0] if floats else given[0].dtype if given else torch.int64).removeprefix("torch.")
                self.calls[Call(self._phase(), name, dtype, flops, nbytes)] += self.times
        return result

    def _phase(self) -> Phase:
        if self._recomputing:
            return "recomputation"
        if torch._C._current_graph_task_id() != -1:
            return "backward"
        return "optimizer" if self.optimizer else "forward"

    def _done_inside(self, name: str, args: tuple[Any, ...]) -> float:
        key = call_key(name, args)
        if key not in _INSIDE:
            inner = WorkMeter()
            run_inside(name, args, inner)
            _INSIDE[key] = sum(w.calls * w.flops for w in inner.work())
        return _INSIDE[key]


def _flops(func: Any, name: str, args: Any, kwargs: Any, result: Any) -> float:
    if name.startswith(_CPU_FLASH):
        return _cpu_flash_flops(func, args, kwargs)
    packet = func.overloadpacket
    if name.endswith("_"):  # in place: addmm_ as addmm
        packet = getattr(getattr(torch.ops, func.namespace), name.split("::")[1].removesuffix("_"), packet)
    formula = flop_registry.get(packet)
    return 0.0 if formula is None else float(formula(*args, **kwargs, out_val=result))


def _cpu_flash_flops(func: Any, args: Any, kwargs: Any) -> float:
    """PyTorch has no formula for it. Two products forward; five backward, with the scores made again."""
    backward = func.name().split(".")[0].endswith("_backward")
    given = dict(zip((argument.name for argument in func._schema.arguments), args, strict=False)) | kwargs
    q, k, v = given["query"], given["key"], given["value"]
    rows, keys = q.shape[2], k.shape[2]
    pairs = rows * (rows + 1) / 2 if given.get("is_causal", False) else rows * keys
    d, d_v = q.shape[-1], v.shape[-1]
    return 2.0 * q.shape[0] * q.shape[1] * pairs * (3 * d + 2 * d_v if backward else d + d_v)


def _moved(func: Any, name: str, args: Any, kwargs: Any, result: Any) -> int:
    """Bytes read and written, by the operator's schema."""
    read = written = 0
    arguments = _arguments(func)
    for number, argument in enumerate(arguments):
        size = _nbytes(args[number] if number < len(args) else kwargs.get(argument.name))
        read += size * argument.read
        written += size * argument.written
    return read + (written if any(argument.written for argument in arguments) else _nbytes(result))


class _Argument(NamedTuple):
    name: str
    read: bool
    written: bool


@functools.cache
def _arguments(func: Any) -> tuple[_Argument, ...]:
    name = func.name().split(".")[0]
    found = []
    for number, argument in enumerate(func._schema.arguments):
        written = argument.alias_info is not None and argument.alias_info.is_write
        if name == "aten::_fused_adamw_" and argument.name == "grads":
            written = False  # it would, to scale them
        overwritten = written and (argument.is_out or (name in _OVERWRITTEN and number == 0))
        found.append(_Argument(argument.name, not overwritten, written))
    return tuple(found)


@functools.cache
def _is_view(func: Any) -> bool:
    """It returns what it was given, under another shape."""
    returned = [value.alias_info for value in func._schema.returns]
    return func.is_view or bool(returned and all(alias is not None and not alias.is_write for alias in returned))


def _nbytes(value: Any) -> int:
    return sum(_stored(x) for x in _tensors(value))


def _tensors(value: Any) -> Iterable[Tensor]:
    return (_local(x) for x in tree_leaves(value) if isinstance(x, Tensor))


def _local(tensor: Tensor) -> Tensor:
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


def _stored(x: Tensor) -> int:
    """An expanded dimension is read once."""
    sizes = zip(x.shape, x.stride(), strict=True)
    return x.itemsize * math.prod(size if stride or not size else 1 for size, stride in sizes)
