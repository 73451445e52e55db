"""Recurrent mixers under context parallelism: what one stretch needs of the others, as modules in a mixer's places.

Every stretch is scanned from an empty state, on all ranks at once; then all ranks gather what each stretch left and
what it kept of a state before it, and each adds to its own tokens what the state that came in still gives
(ops/passing.py). So no rank waits for another's scan. Besides, tokens look at neighbours: a convolution at those
before, Mamba-3's trapezoidal step at the next, and these are sent between the two ranks that hold them.

In each direction a rank sends for B windows in each layer, where R is cp; a state has S numbers a row and its decay V
(Mamba-2 and 3: a row is a head, S = d_state · head_dim, V = 1; Mamba: a channel, S = V = d_state); and E edges between
stretches are its own and another rank's, 1 on the first rank and on the last, else 2:

    states          (R − 1) · 2·B·rows·(S + V)          fp32        back: their gradients, reduce-scattered
    convolution     E · B·(taps − 1)·channels           x's dtype   of each
    next step       E · B·heads                         fp32        Mamba-3
    phase           (R − 1) · 2·B·heads·d_state/4       fp64        Mamba-3

Stretches shorter than a convolution reaches, as of short texts that are scored, are gathered whole instead.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sisa_dist.model.mixers.mamba2 import CausalConv
from sisa_dist.model.mixers.scans import NextStep, RunningPhase, SelectiveScan, Ssd
from sisa_dist.ops import selective_scan, ssd
from sisa_dist.ops.passing import same_document, states_before, stretch_turns
from sisa_dist.ops.precision import no_autocast, work_dtype
from sisa_dist.ops.shards import document_starts, first_sums, suffix_sums_from, sums_beyond
from sisa_dist.parallel import collectives
from sisa_dist.parallel.context_group import Context


class ContextConv(CausalConv):
    """The convolution of this rank's positions; doc_ids `[B, T]` are of whole windows."""

    context: Context

    @torch.compiler.disable
    def forward(self, x_BtD: Tensor, doc_ids: Tensor | None, before_BkD: Tensor | None) -> tuple[Tensor, Tensor]:
        assert before_BkD is None, "decoding is not done under context parallelism"
        x, docs = _cut(x_BtD, 1), _documents(doc_ids, self.context)
        before = _tokens_before(x, self.taps - 1, self.context)
        if docs is not None:
            seen = self.context.own(same_document(docs, self.taps - 1))
            before = before.masked_fill(~seen[..., None], 0.0)
        y, before_BkD = super().forward(x.flatten(0, 1), _own_rows(docs, self.context), before.flatten(0, 1))
        return _joined(y, 1), before_BkD


class ContextSsd(nn.Module):
    """In the place of `Ssd`, of this rank's positions."""

    def __init__(self, context: Context, scan: Ssd) -> None:
        super().__init__()
        self.context, self.chunk, self.rank = context, scan.chunk, scan.rank

    @torch.compiler.disable
    def forward(self, *terms: Tensor, diagonal: Tensor | None = None, doc_ids: Tensor | None) -> Tensor:
        docs = _documents(doc_ids, self.context)
        rows = [_cut(z, 2).flatten(0, 1) for z in terms]
        y, _ = ssd(
            *rows,  # type: ignore[arg-type]
            diagonal=None if diagonal is None else _cut(diagonal, 2).flatten(0, 1),
            rank=self.rank,
            chunk=self.chunk,
            doc_ids=_own_rows(docs, self.context),
            state=_passing(docs, self.context),
        )
        return _joined(y, 2)


class ContextSelectiveScan(nn.Module):
    """In the place of `SelectiveScan`, of this rank's positions."""

    def __init__(self, context: Context, scan: SelectiveScan) -> None:
        super().__init__()
        self.context, self.chunk = context, scan.chunk

    @torch.compiler.disable
    def forward(self, x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, *, doc_ids: Tensor | None) -> Tensor:
        docs = _documents(doc_ids, self.context)
        x, delta, B, C = (_cut(z, 1).flatten(0, 1) for z in (x, delta, B, C))
        own, state = _own_rows(docs, self.context), _passing(docs, self.context)
        y, _ = selective_scan(x, delta, A, B, C, chunk=self.chunk, doc_ids=own, state=state)
        return _joined(y, 1)


class ContextNextStep(nn.Module):
    """In the place of `NextStep`, of this rank's positions."""

    def __init__(self, context: Context, inner: NextStep) -> None:
        super().__init__()
        self.context, self.inner = context, inner

    @torch.compiler.disable
    def forward(self, x_BHt: Tensor, doc_ids: Tensor | None) -> Tensor:
        x, docs = _cut(x_BHt, 2), _documents(doc_ids, self.context)
        x = torch.cat((x, _to_neighbours(x[..., :1], self.context, back=True)), -1)
        if docs is not None:  # what follows the window is 0 whatever its document
            docs = torch.cat((docs, torch.cat((docs[1:, :, :1], docs[-1:, :, -1:]))), -1)
        return _joined(self.inner(x.flatten(0, 1), _own_rows(docs, self.context))[..., :-1], 2)


class ContextPhase(nn.Module):
    """In the place of `RunningPhase`, of this rank's positions: counted from the document's first, wherever it lies."""

    def __init__(self, context: Context) -> None:
        super().__init__()
        self.context = context

    @torch.compiler.disable
    def forward(self, theta_BHtm: Tensor, doc_ids: Tensor | None) -> Tensor:
        with no_autocast(theta_BHtm.device):
            return _Phase.apply(theta_BHtm, doc_ids, self.context)


class _Phase(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, theta_BHtm: Tensor, doc_ids: Tensor | None, context: Context) -> Tensor:
        docs = _documents(doc_ids, context)
        own = None if docs is None else context.own(docs)
        work = work_dtype(theta_BHtm.dtype)
        turns = stretch_turns(_cut(theta_BHtm, 2), own, work=work)
        ends = context.in_order(turns[..., -1, :])
        one = ends.new_ones(len(ends), 1) if docs is None else (docs[..., 0] == docs[..., -1]).to(ends.dtype)
        before = context.own(states_before(ends, one[:, :, None, None], docs))[:, :, :, None]
        if own is not None:
            before = torch.where((own == own[..., :1])[:, :, None, :, None], before, 0.0)
        turns = turns + before
        ctx.docs, ctx.own, ctx.context = docs, own, context
        return _joined(((turns - turns.round()) * (2 * math.pi)).to(work), 2, folded=False)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        """Sums over all that follows in the document, as of `running_phase`."""
        x, context = _cut(grad, 2), ctx.context
        beyond = sums_beyond(context.in_order(first_sums(x, ctx.own)), ctx.docs, context.held_by(context.rank))
        starts = document_starts(ctx.docs, x.new_empty(2 * context.size, x.shape[1], x.shape[3]))
        found = suffix_sums_from(x, beyond, ctx.own, context.own(starts))
        return _joined(found.to(grad.dtype), 2, folded=False), None, None


# --- what is sent


class _InOrder(torch.autograd.Function):
    """`Context.in_order`, with a gradient: the sum of the ranks' goes back to who holds the stretch."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, context: Context) -> Tensor:
        ctx.context = context
        return context.in_order(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return collectives.reduce_scatter(ctx.context.dealt(grad), ctx.context.group, dim=0), None


def place_in_mixer(module: nn.Module, context: Context) -> None:
    """What stands in `module` for looking at other tokens now looks at those of other ranks too."""
    if type(module) is CausalConv:
        module.__class__ = ContextConv
        module.context = context  # type: ignore[assignment]
    for name, child in list(module.named_children()):
        if isinstance(child, Ssd):
            setattr(module, name, ContextSsd(context, child))
        elif isinstance(child, SelectiveScan):
            setattr(module, name, ContextSelectiveScan(context, child))
        elif isinstance(child, NextStep):
            setattr(module, name, ContextNextStep(context, child))
        elif isinstance(child, RunningPhase):
            setattr(module, name, ContextPhase(context))


def _passing(docs: Tensor | None, context: Context) -> Callable[[Tensor, Tensor], Tensor]:
    """The function `state` of `ssd` and `selective_scan`, whose rows are this rank's two stretches of B windows."""

    def before(left: Tensor, kept: Tensor) -> Tensor:
        sizes = left[0, 0].numel(), kept[0, 0].numel()
        sent = torch.cat((left.flatten(2), kept.flatten(2)), -1).unflatten(0, (2, -1))
        every_left, every_kept = _InOrder.apply(sent, context).split(sizes, -1)
        states = states_before(every_left, every_kept, docs)
        return context.own(states).flatten(0, 1).view_as(left)

    return before


def _tokens_before(x: Tensor, count: int, context: Context) -> Tensor:
    """The `count` tokens before each own stretch of x `[2, B, h, D]`, zeros before the window: `[2, B, count, D]`."""
    length = x.shape[2]
    if count <= length:
        return _to_neighbours(x[:, :, length - count :], context)
    whole = F.pad(_InOrder.apply(x, context).movedim(0, 1).flatten(1, 2), (0, 0, count, 0))
    starts = [stretch * length for stretch in context.held_by(context.rank)]
    return torch.stack([whole[:, start : start + count] for start in starts])


def _to_neighbours(x: Tensor, context: Context, *, back: bool = False) -> Tensor:
    """x `[2, ...]` of each own stretch to who holds the next, `back`: to who holds the one before.

    Returns what came for each own stretch, zeros where the window ends.
    """
    rank, last = context.rank, context.size - 1
    # Outwards from the window's middle, which the last rank has on both sides: its early stretch is before its late.
    below, above = max(rank - 1, 0), min(rank + 1, last)
    counts = [0] * context.size
    counts[above] += 1
    if rank:
        counts[below] += 1
    early, late = x
    # By receiver: the late one goes to the rank below, if there is one, and the early one above; `back` the other way.
    rows = (early, late) if back else (late, early)
    given = torch.stack(rows if rank else rows[1:])
    found = collectives.exchange(given, context.group, sent=counts, received=counts)
    if not rank:
        found = torch.cat((torch.zeros_like(found), found))
    return found.flip(0) if back else found


# --- how positions lie


def _cut(x: Tensor, dim: int) -> Tensor:
    """A rank's positions, 2h in `dim` → its two stretches in front, h in `dim + 1`."""
    return x.unflatten(dim, (2, -1)).movedim(dim, 0)


def _joined(x: Tensor, dim: int, *, folded: bool = True) -> Tensor:
    """Inverse of `_cut`; `folded`: of its result with stretches and windows in one dimension."""
    if folded:
        x = x.unflatten(0, (2, -1))
    return x.movedim(0, dim).flatten(dim, dim + 1)


def _documents(doc_ids_BT: Tensor | None, context: Context) -> Tensor | None:
    """Of whole windows, cut into all stretches: `[2R, B, h]`."""
    return None if doc_ids_BT is None else doc_ids_BT.unflatten(1, (2 * context.size, -1)).movedim(1, 0)


def _own_rows(docs: Tensor | None, context: Context) -> Tensor | None:
    """Those of this rank's two stretches as the rows of a batch, `[2·B, h]`."""
    return None if docs is None else context.own(docs).flatten(0, 1)
