"""The score under context parallelism, as one node of autograd: what ops/shards.py computes, with what is sent between.

Two forms, of equal traffic and equal results but for the order of sums. `all_gather`: all keys and values are gathered,
their gradients reduce-scattered; one message each, and the whole window's keys of one layer in memory meanwhile (Llama 3,
arXiv 2407.21783, section 3.3.2). `ring`: they go round, one rank's at a time, while the one before is met; their gradients
follow (Liu et al. 2023, arXiv 2310.01889). Keys are not kept from forward to backward, they are sent again.

A rank sends forward (R − 1) · 2h·B·G · (d_h + d_s + d_v) elements of q's dtype, backward as many again and as many
gradients in fp32 (a sum of R parts in 16 bits would lose digits that one process has). Besides, in both directions,
(R − 1) · 2·B·G · (1 + d_s/2) fp64 numbers: decay and phase of whole stretches, and their gradients' sums.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from sisa_dist.ops.backends import Rows
from sisa_dist.ops.bisect import LEAF
from sisa_dist.ops.diagonal import diagonal, diagonal_backward
from sisa_dist.ops.precision import no_autocast, work_dtype
from sisa_dist.ops.shards import (
    Inputs,
    Meeting,
    first_sums,
    frames,
    joined,
    link,
    merge_,
    stretches,
    suffix_sums_from,
    sums_beyond,
)
from sisa_dist.parallel import collectives


@dataclass(frozen=True)
class Context:
    """The ranks that share windows, and how their scores meet. Rank r holds the stretches r and 2R − 1 − r."""

    group: dist.ProcessGroup
    kind: str

    @property
    def rank(self) -> int:
        return self.group.rank()

    @property
    def size(self) -> int:
        return self.group.size()

    def held_by(self, rank: int) -> tuple[int, int]:
        """The stretches of a rank. With an early and a late one all ranks have equally many keys before their own."""
        return rank, 2 * self.size - 1 - rank

    def in_order(self, x: Tensor) -> Tensor:
        """[2, ...] of each rank → all stretches [2R, ...] in the window's order. Collective."""
        every = collectives.all_gather(x, self.group, dim=0)
        place = [stretch for rank in range(self.size) for stretch in self.held_by(rank)]
        return every[torch.tensor(place, device=x.device).argsort()]

    def shards(self, x: Tensor) -> Iterator[tuple[int, Tensor]]:
        """(rank, its x), this rank's own first. Collective; to be consumed to the end."""
        if self.kind == "all_gather":
            every = collectives.all_gather(x[None], self.group, dim=0)
            yield from ((rank, every[rank]) for rank in self._round())
            return
        *others, last = self._round()
        for source in others:
            coming, running = collectives.start_pass_on(x, self.group)
            yield source, x
            for work in running:
                work.wait()
            x = coming
        yield last, x

    def _round(self) -> list[int]:
        return [(self.rank - step) % self.size for step in range(self.size)]


class Returns:
    """Takes gradients of others' shards, in the order of `Context.shards`, and gives the sum of one's own."""

    def __init__(self, context: Context, like: Tensor) -> None:
        self._context, self._own, self._moving = context, torch.zeros_like(like), None
        gathers = context.kind == "all_gather"
        self._every = like.new_zeros(context.size, *like.shape) if gathers else None

    def add(self, source: int, gradient: Tensor) -> None:
        if self._every is not None:
            self._every[source] = gradient
        elif source == self._context.rank:
            self._own = gradient
        else:
            if self._moving is not None:
                gradient += self._moving
            self._moving = collectives.pass_on(gradient, self._context.group)

    def sum(self) -> Tensor:
        if self._every is not None:
            return collectives.reduce_scatter(self._every, self._context.group, dim=0)[0]
        assert self._moving is not None
        return self._own + self._moving


@torch.compiler.disable
def context_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    C: Tensor,
    B: Tensor,
    log_alpha: Tensor,
    theta: Tensor,
    lam: Tensor,
    *,
    context: Context,
    doc_ids: Tensor | None,
    leaf: int | None,
    backend: str,
) -> Tensor:
    """`sisa_attention` of this rank's positions, its two stretches one after the other, over keys of all ranks.

    Shapes as there with this rank's tokens T/R for T; doc_ids `[B, T]` of the whole window. d_s = 0 is plain attention.
    Collective over `context.group`, forward and backward.
    """
    return _ContextScore.apply(q, k, v, C, B, log_alpha, theta, lam, doc_ids, context, leaf, backend)


class _ContextScore(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        C: Tensor,
        B: Tensor,
        log_alpha: Tensor,
        theta: Tensor,
        lam: Tensor,
        doc_ids: Tensor | None,
        context: Context,
        leaf: int | None,
        backend: str,
    ) -> Tensor:
        ctx.context, ctx.scale, ctx.backend = context, q.shape[-1] ** -0.5, backend
        ctx.leaf = min(LEAF if leaf is None else leaf, q.shape[2] // 2)
        ctx.dtypes = log_alpha.dtype, theta.dtype, lam.dtype
        with no_autocast(q.device):
            near = tuple(stretches(x) for x in (q, k, v, C, B, log_alpha, theta))
            docs = None if doc_ids is None else doc_ids.unflatten(1, (2 * context.size, -1)).movedim(1, 0)
            own_docs = None if docs is None else docs[list(context.held_by(context.rank))]
            out, lse, *kept = diagonal(*near, lam, own_docs, scale=ctx.scale, leaf=ctx.leaf, backend=backend)
            g, turns = kept
            at = frames(g, near[6], own_docs, work=work_dtype(q.dtype))
            totals = context.in_order(at.totals) if C.shape[-1] else at.totals.repeat(context.size, 1, 1, 1)
            meeting = Meeting(Inputs(*near[:5], lam), at, own_docs, docs, scale=ctx.scale, backend=backend)
            for source, shard in context.shards(meeting.sent()):
                for a, b, z in _met(context, source, totals, meeting.work):
                    far = meeting.meet(a, shard[b], context.held_by(source)[b], z)
                    merge_(out[a], lse[a], *far)
            out = out.to(q.dtype)
        ctx.save_for_backward(q, k, v, C, B, theta, lam, docs, own_docs, out, lse, g, turns, totals)
        return joined(out)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        q, k, v, C, B, theta, lam, docs, own_docs, out, lse, g, turns, totals = ctx.saved_tensors
        context, scale, backend = ctx.context, ctx.scale, ctx.backend
        with no_autocast(q.device):
            near = tuple(stretches(x) for x in (q, k, v, C, B))
            dout = stretches(dout)
            at_diagonal = diagonal_backward(
                dout, *near, lam, own_docs, out, lse, g, turns, scale=scale, leaf=ctx.leaf, backend=backend
            )
            at = frames(g, stretches(theta), own_docs, work=work_dtype(q.dtype))
            meeting = Meeting(Inputs(*near, lam), at, own_docs, docs, scale=scale, backend=backend)
            work = meeting.work
            delta = (dout.to(work) * out).sum(-1)
            rows = Rows(meeting.like_v(dout), meeting.like_v(out), lse, delta)
            dq, dC, sent = torch.zeros_like(near[0], dtype=work), torch.zeros_like(meeting.C), meeting.sent()
            returns = Returns(context, sent.to(work))
            for source, shard in context.shards(sent):
                dshard = torch.zeros_like(sent, dtype=work)
                for a, b, z in _met(context, source, totals, work):
                    of_rows = Rows(*(x[a] for x in rows))
                    key = context.held_by(source)[b]
                    dshard[b] += meeting.meet_backward(a, shard[b], key, z, of_rows, dq[a], dC[a])
                returns.add(source, dshard)
            dk, dv, dC, dB, dg, dphase, dlam = meeting.back(dC, returns.sum())
            dlog_alpha, dtheta = _from_all_that_follows(dg, dphase, docs, own_docs, context)
        far = dq, dk, dv, dC, dB, dlog_alpha, dtheta, dlam
        sums = [x + y for x, y in zip(at_diagonal, far, strict=True)]
        dtypes = (*(x.dtype for x in near), *ctx.dtypes)
        grads = (x.to(dtype) for x, dtype in zip(sums, dtypes, strict=True))
        *by_token, dlam = grads
        return *(joined(x) for x in by_token), dlam, None, None, None, None


def _met(context: Context, source: int, totals: Tensor, work: torch.dtype) -> Iterator[tuple[int, int, Tensor]]:
    """(own stretch, stretch of the shard of `source`, their link) for each pair of which the latter is earlier."""
    for a, query in enumerate(context.held_by(context.rank)):
        for b, key in enumerate(context.held_by(source)):
            if key < query:
                yield a, b, link(totals, query, key, work=work)


def _from_all_that_follows(
    dg: Tensor, dphase: Tensor, docs: Tensor | None, own_docs: Tensor | None, context: Context
) -> tuple[Tensor, Tensor]:
    """From the gradients of the running sums, of which stretches meet each other, to those of log α and θ."""
    mine = context.held_by(context.rank)
    x = torch.cat((dg[..., None], dphase), -1)
    if x.shape[-1] == 1:  # plain attention
        return torch.zeros_like(dg), torch.zeros_like(dphase)
    is_first = torch.zeros(2, x.shape[1], x.shape[3], dtype=torch.bool, device=x.device)
    for place, stretch in enumerate(mine):
        before = None if docs is None or not stretch else docs[stretch - 1, :, -1:]
        if docs is None:
            is_first[place, :, 0] = stretch == 0
        else:
            ids = docs[stretch]
            earlier = ids[:, :1] - 1 if before is None else before
            is_first[place] = torch.cat((earlier, ids[:, :-1]), 1) != ids
    beyond = sums_beyond(context.in_order(first_sums(x, own_docs)), docs, mine)
    found = suffix_sums_from(x, beyond, own_docs, is_first)
    return found[..., 0], found[..., 1:]
