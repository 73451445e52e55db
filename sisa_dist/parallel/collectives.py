"""The collectives of tensor and of expert parallelism as autograd functions.

Each is the other's transpose (Shoeybi et al. 2019, f and g; Korthikanti et al. 2022, g and ḡ for sequences), the
exchange of rows its own (Lepikhin et al. 2020):

    copy      forward identity                backward all-reduce
    reduce    forward all-reduce              backward identity
    gather    forward all-gather              backward reduce-scatter      along the sequence
    scatter   forward reduce-scatter          backward all-gather          along the sequence
    exchange  forward all-to-all              backward all-to-all back     of rows

With one rank in the group they are the identity. Tensors are made contiguous before they are sent: gloo sends the
storage of a strided tensor in memory order, without a word.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# torch 2.13 renamed both; 2.11 has the old names only.
_all_gather_single = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
_reduce_scatter_single = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)

SEQUENCE = 1  # the dimension of [B, T, …] that sequence parallelism shards


def copy(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Into a region where each rank computes with its own slice: x on every rank, its gradients summed."""
    return x if group.size() == 1 else _Copy.apply(x, group)


def reduce(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Out of such a region: the sum of the ranks' partial results, on every rank."""
    return x if group.size() == 1 else _Reduce.apply(x, group)


def gather(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[B, T/tp, …] of each rank → the whole [B, T, …]; gradients are summed and cut again."""
    return x if group.size() == 1 else _Gather.apply(x, group)


def scatter(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Partial results [B, T, …] → this rank's [B, T/tp, …] of their sum."""
    return x if group.size() == 1 else _Scatter.apply(x, group)


def exchange(x_MD: Tensor, group: dist.ProcessGroup, *, sent: Sequence[int], received: Sequence[int]) -> Tensor:
    """Rows to other ranks: the first sent[0] go to rank 0, the next sent[1] to rank 1; as ordered, received[r] come
    from rank r. [sum(sent), D] → [sum(received), D]; either may be 0. Gradients go the way back."""
    return _Exchange.apply(x_MD, group, sent, received)


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return all_reduce(grad, ctx.group), None


class _Reduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        return all_reduce(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return grad, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return all_gather(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return reduce_scatter(grad, ctx.group), None


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return reduce_scatter(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return all_gather(grad, ctx.group), None


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_MD: Tensor, group: dist.ProcessGroup, sent: Sequence[int], received: Sequence[int]
    ) -> Tensor:
        ctx.group, ctx.sent, ctx.received = group, sent, received
        return all_to_all(x_MD, group, sent=sent, received=received)

    @staticmethod
    def backward(ctx: Any, grad_MD: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        return all_to_all(grad_MD, ctx.group, sent=ctx.received, received=ctx.sent), None, None, None


def all_to_all(x: Tensor, group: dist.ProcessGroup, *, sent: Sequence[int], received: Sequence[int]) -> Tensor:
    """`exchange` without a gradient, of rows of any shape and dtype."""
    x = x.contiguous()
    found = x.new_empty(sum(received), *x.shape[1:])
    dist.all_to_all_single(found, x, list(received), list(sent), group=group)
    return found


def all_reduce(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The sum over the group as a new tensor: the argument may be needed by another node of the graph."""
    total, running = start_all_reduce(x, group)
    running.wait()
    return total


def start_all_reduce(x: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, dist.Work]:
    """A tensor that holds the sum over the group once the work is waited for."""
    total = x.clone(memory_format=torch.contiguous_format)
    return total, dist.all_reduce(total, group=group, async_op=True)


def start_pass_on(x: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, list[dist.Work]]:
    """Round the ring: x goes to the next rank, and the tensor holds the one before's once the works are waited for."""
    x, rank, size = x.contiguous(), group.rank(), group.size()
    found = torch.empty_like(x)
    to, source = (dist.get_global_rank(group, (rank + step) % size) for step in (1, -1))
    sends = [dist.P2POp(dist.isend, x, to, group), dist.P2POp(dist.irecv, found, source, group)]
    return found, dist.batch_isend_irecv(sends)


def pass_on(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """`start_pass_on`, waited for."""
    found, running = start_pass_on(x, group)
    for work in running:
        work.wait()
    return found


def all_gather(x: Tensor, group: dist.ProcessGroup, *, dim: int = SEQUENCE) -> Tensor:
    """The ranks' tensors, of one shape, side by side along `dim`."""
    x = x.contiguous()
    parts = x.new_empty(group.size(), *x.shape)
    _all_gather_single(parts.flatten(), x.flatten(), group=group)  # gloo refuses an extra leading dim
    return parts.movedim(0, dim).flatten(dim, dim + 1)


def reduce_scatter(x: Tensor, group: dist.ProcessGroup, *, dim: int = SEQUENCE) -> Tensor:
    """This rank's part, along `dim`, of the sum over the group. The group's size divides that dimension."""
    mine, running, _ = start_reduce_scatter(x, group, dim=dim)
    running.wait()
    return mine


def start_reduce_scatter(
    x: Tensor, group: dist.ProcessGroup, *, dim: int = SEQUENCE
) -> tuple[Tensor, dist.Work, Tensor]:
    """A tensor that holds `reduce_scatter`'s result once the work is waited for; the last must live until then."""
    parts = x.unflatten(dim, (group.size(), -1)).movedim(dim, 0).contiguous()
    mine = torch.empty_like(parts[0])
    running = _reduce_scatter_single(mine.flatten(), parts.flatten(), group=group, async_op=True)
    return mine, running, parts
