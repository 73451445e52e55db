"""The score under context parallelism, as one node of autograd: what ops/shards.py computes, with what is sent between.

Two forms, of equal traffic and, but for the order of sums, of equal results. `all_gather`: keys and values of all ranks
are gathered and gradients reduce-scattered, one message each; those of one layer's whole window are in memory meanwhile
(Llama 3, arXiv 2407.21783, section 3.3.2). `ring`: they go round, one rank's at a time, while the one before is met,
and gradients follow (Liu et al. 2023, arXiv 2310.01889). Neither keeps them for the backward: they are sent again.

Forward a rank sends (R − 1) · B·G·T/R · (d_h + d_s + d_v) elements of q's dtype; backward as many again, and as many
gradients in fp32, because a sum of R parts in 16 bits loses digits that one process has. Besides, in each direction,
(R − 1) · 2·B·G · (1 + d_s/2) numbers in fp64: decay and phase of whole stretches, and their gradients' sums.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sisa_dist.ops.backends import Rows
from sisa_dist.ops.bisect import LEAF
from sisa_dist.ops.diagonal import diagonal, diagonal_backward
from sisa_dist.ops.precision import no_autocast, work_dtype
from sisa_dist.ops.shards import (
    Inputs,
    Meeting,
    document_starts,
    first_sums,
    frames,
    joined,
    link,
    merge_,
    stretches,
    suffix_sums_from,
    sums_beyond,
)
from sisa_dist.parallel.context_group import Context, Returns


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

    Shapes as there, with T/R tokens; doc_ids `[B, T]` of whole windows. d_s = 0 is plain attention. Collective over
    `context.group`, forward and backward.
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
            x = Inputs(*(stretches(y) for y in (q, k, v, C, B)), lam)  # type: ignore[call-arg]
            turning = stretches(theta)
            docs = None if doc_ids is None else doc_ids.unflatten(1, (2 * context.size, -1)).movedim(1, 0)
            own_docs = None if docs is None else context.own(docs)
            near = diagonal(x, stretches(log_alpha), turning, own_docs, scale=ctx.scale, leaf=ctx.leaf, backend=backend)
            at = frames(near.g, turning, own_docs, work=work_dtype(q.dtype))
            totals = at.totals if not C.shape[-1] else context.in_order(at.totals)
            meeting = Meeting(x, at, own_docs, docs, scale=ctx.scale, backend=backend)
            for source, shard in context.shards(meeting.sent()):
                for a, b in context.pairs(source):
                    query, key = context.held_by(context.rank)[a], context.held_by(source)[b]
                    far = meeting.meet(a, shard[b], key, link(totals, query, key, work=meeting.work))
                    merge_(near.out[a], near.lse[a], *far)
            out = joined(near.out.to(q.dtype))
        ctx.save_for_backward(q, k, v, C, B, theta, lam, docs, own_docs, out, near.lse, near.g, near.turns, totals)
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        q, k, v, C, B, theta, lam, docs, own_docs, out, lse, g, turns, totals = ctx.saved_tensors
        context, scale, backend = ctx.context, ctx.scale, ctx.backend
        with no_autocast(q.device):
            x = Inputs(*(stretches(y) for y in (q, k, v, C, B)), lam)  # type: ignore[call-arg]
            dout, out = stretches(dout), stretches(out)
            near = diagonal_backward(dout, x, own_docs, out, lse, g, turns, scale=scale, leaf=ctx.leaf, backend=backend)
            at = frames(g, stretches(theta), own_docs, work=work_dtype(q.dtype))
            meeting = Meeting(x, at, own_docs, docs, scale=scale, backend=backend)
            work = meeting.work
            rows = Rows(meeting.like_v(dout), meeting.like_v(out), lse, (dout.to(work) * out).sum(-1))
            dq, dC, sent = torch.zeros_like(x.q, dtype=work), torch.zeros_like(meeting.C), meeting.sent()
            returns = Returns(context, sent.to(work))
            for source, shard in context.shards(sent):
                dshard = torch.zeros_like(sent, dtype=work)
                for a, b in context.pairs(source):
                    query, key = context.held_by(context.rank)[a], context.held_by(source)[b]
                    z, of_rows = link(totals, query, key, work=work), Rows(*(y[a] for y in rows))
                    dshard[b] += meeting.meet_backward(a, shard[b], key, z, of_rows, dq[a], dC[a])
                returns.add(source, dshard)
            dk, dv, dC, dB, dg, dphase, dlam = meeting.back(dC, returns.sum())
            dlog_alpha, dtheta = _from_all_that_follows(dg, dphase, docs, own_docs, context)
        far = dq, dk, dv, dC, dB, dlog_alpha, dtheta, dlam
        dtypes = (*(y.dtype for y in (q, k, v, C, B)), *ctx.dtypes)
        *by_token, dlam = ((y + z).to(dtype) for y, z, dtype in zip(near, far, dtypes, strict=True))
        return *(joined(y) for y in by_token), dlam, None, None, None, None


def _from_all_that_follows(
    dg: Tensor, dphase: Tensor, docs: Tensor | None, own_docs: Tensor | None, context: Context
) -> tuple[Tensor, Tensor]:
    """From what rectangles give to the gradients of running sums, to those of log α and θ: sums to the window's end."""
    x = torch.cat((dg[..., None], dphase), -1)
    if not dphase.shape[-1]:  # plain attention
        return torch.zeros_like(dg), torch.zeros_like(dphase)
    beyond = sums_beyond(context.in_order(first_sums(x, own_docs)), docs, context.held_by(context.rank))
    starts = document_starts(docs, dg.new_empty(2 * context.size, dg.shape[1], dg.shape[-1]))
    found = suffix_sums_from(x, beyond, own_docs, context.own(starts))
    return found[..., 0], found[..., 1:]
