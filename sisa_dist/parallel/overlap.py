"""Hides the backward collective at a region's entrance behind the weight gradients of its column layers.

The all-reduce (under sequence parallelism the reduce-scatter) of the input's gradient needs every column layer's dx but
no dW. So the layers' backward makes dx only, the collective starts, the dW are made while it runs, and then it is
waited for. Autograd runs, of the nodes that are ready, the one made last; hence the order of making in a forward:

    wait(x) · delay(W₁) … delay(Wₙ) · start(x) · the layers        backward: layers, start, delays, wait

Measured over gloo at tp 2 on two quiet cores (`tools/benchmark.py overlap`): a whole quickstart step takes 0.96 to 1.00
of the synchronous time, the backward of such a region alone 0.90 to 0.98.
Not under torch.compile, which may not see what passes between nodes on the side, nor where an engine gathers a weight
only for its owner's forward.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sisa_dist.parallel import collectives
from sisa_dist.parallel.layers import Border


class _Slot(NamedTuple):
    """A column layer in one call of its region: its weight behind a delay, and what dW will be made of."""

    weight: Tensor
    made_of: list[Tensor]  # x and dy, between the layer's backward and the delay's


class _Delay(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, made_of: list[Tensor]) -> Tensor:
        ctx.made_of = made_of
        ctx.set_materialize_grads(False)  # the layer hands back None: dW does not come by the edge
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, nothing: None) -> tuple[Tensor, None]:  # type: ignore[override]
        x, dy = (tensor.flatten(0, -2) for tensor in ctx.made_of)
        ctx.made_of.clear()
        return dy.t() @ x, None


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, made_of: list[Tensor]) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.made_of = made_of
        return F.linear(x, weight)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        assert not ctx.made_of, "a column layer was called twice in its region: set engine.overlap to false"
        ctx.made_of[:] = x, dy
        return dy @ weight, None, None


class _Start(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, border: Border, running: list[Any]) -> Tensor:
        ctx.border, ctx.running = border, running
        return collectives.all_gather(x, border.group) if border.sequence_parallel else x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        start = collectives.start_reduce_scatter if ctx.border.sequence_parallel else collectives.start_all_reduce
        total, *running = start(grad, ctx.border.group)
        ctx.running[:] = running
        return total, None, None


class _Wait(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, running: list[Any]) -> Tensor:
        ctx.running = running
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        ctx.running[0].wait()
        ctx.running.clear()
        return grad, None


@functools.cache
def _delaying(cls: type[nn.Linear]) -> type[nn.Linear]:
    """`cls` with a dW that may be delayed. A module takes it on by changing its class; it may have a class of its own
    already, where its kv heads are held whole."""

    def forward(module: nn.Linear, x: Tensor) -> Tensor:
        slot: _Slot | None = module.__dict__.get("slot")
        return cls.forward(module, x) if slot is None else _Linear.apply(x, slot.weight, slot.made_of)

    return type(cls.__name__, (cls,), {"forward": forward, "__module__": cls.__module__})


def enter_overlapped(region: nn.Module, columns: list[nn.Linear], border: Border) -> None:
    """As `layers.enter_before`, with the collective of the backward behind the dW of `columns`, layers of `region`."""
    for column in columns:
        assert column.bias is None, "a column layer's bias is not delayed: leave the layer out"
        column.__class__ = _delaying(type(column))  # type: ignore[arg-type]

    def forget(*_: Any) -> None:
        for column in columns:
            column.__dict__.pop("slot", None)

    def before(module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        x_BTD = arguments[0]
        forget()  # what a recomputation left: it ends by an exception inside the region
        if not (torch.is_grad_enabled() and x_BTD.requires_grad):
            return (border.enter(x_BTD), *arguments[1:])
        running: list[Any] = []
        x_BTD = _Wait.apply(x_BTD, running)
        for column in columns:
            made_of: list[Tensor] = []
            column.__dict__["slot"] = _Slot(_Delay.apply(column.weight, made_of), made_of)
        return (_Start.apply(x_BTD, border, running), *arguments[1:])

    region.register_forward_pre_hook(before)
    region.register_forward_hook(forget, always_call=True)
