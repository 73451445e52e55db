"""Softmax attention over rectangles of scores as batched matrix products: exact in fp32 and fp64, on any device.

CPU flash works in blocks of 32 × 512 and pays for all of each; small rectangles are cheaper as products. The leaves
(leaf.py), whose scores no flash kernel can form, are built from the same pieces. Scores are made a few blocks at a
time on CPU: a workspace that stays in cache, and in the allocator's hands, is worth a third of the time (fresh pages
cost as much as the exponential).

Layout inside: `[n, R, ·]` queries against `[n, S, ·]` keys. 16-bit inputs are widened to fp32 and results stay fp32.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from sisa_dist.ops.precision import exp_, widen

CPU_CHUNK = 1 << 19  # scores held at once, 2 MB of fp32: half a second-level cache for each of two cores


def chunks(num: int, scores_each: int, device: torch.device) -> Iterator[slice]:
    """Slices of the batch dimension to work on one after the other; all at once off the CPU."""
    step = max(1, CPU_CHUNK // scores_each) if device.type == "cpu" else num
    for start in range(0, num, step):
        yield slice(start, min(start + step, num))


def fold_heads(x: Tensor, num_kv: int) -> Tensor:
    """[M, n, R, D] → [N·n, (M/N)·R, D]: the query heads of a group stand as more rows over the same keys."""
    if x.shape[0] == num_kv:
        return x.flatten(0, 1)
    return x.unflatten(0, (num_kv, -1)).transpose(1, 2).flatten(2, 3).flatten(0, 1)


def unfold_heads(x: Tensor, num_kv: int, num_q: int) -> Tensor:
    """Inverse of `fold_heads`."""
    if num_q == num_kv:
        return x.unflatten(0, (num_kv, -1))
    return x.unflatten(0, (num_kv, -1)).unflatten(2, (num_q // num_kv, -1)).transpose(1, 2).flatten(0, 1)


def scaled_bmm(a: Tensor, b: Tensor, scale: float, *, out: Tensor | None = None) -> Tensor:
    """scale · a @ b, `[n, R, D] @ [n, D, S]`, in one pass: beta = 0 in place reads nothing and needs no copy."""
    target = a.new_empty(a.shape[0], a.shape[1], b.shape[2]) if out is None else out
    return target.baddbmm_(a, b, beta=0, alpha=scale)


def softmax_product_(score: Tensor, v: Tensor, *, out: Tensor, lse: Tensor) -> None:
    """softmax(score) @ v into out `[n, R, d_v]`, lse `[n, R, 1]`; overwrites score. Each row needs a finite score."""
    top = score.amax(-1, keepdim=True)
    total = exp_(score.sub_(top)).sum(-1, keepdim=True)
    torch.bmm(score, v, out=out)
    out.div_(total)
    torch.add(top, total.log_(), out=lse)


def score_gradient(prob: Tensor, dout: Tensor, v: Tensor, delta: Tensor) -> Tensor:
    """P ∘ (dO Vᵀ − δ), δ `[n, R, 1]` = rowsum(dO ∘ O)."""
    return torch.bmm(dout, v.mT).sub_(delta).mul_(prob)


def hide_later_(score: Tensor, num_rows: int) -> Tensor:
    """−inf where key j > query i; score `[n, (M/N)·R, S]`, R = num_rows queries a head."""
    later = torch.ones(num_rows, score.shape[2], dtype=torch.bool, device=score.device).triu_(1)
    score.unflatten(1, (-1, num_rows)).masked_fill_(later, float("-inf"))
    return score


def products_forward(q: Tensor, k: Tensor, v: Tensor, *, scale: float, causal: bool = False) -> tuple[Tensor, Tensor]:
    """q `[M, n, R, D]`, k `[N, n, S, D]`, v `[N, n, S, d_v]` → out `[M, n, R, d_v]`, lse `[M, n, R]`."""
    M, N, num_rows = q.shape[0], k.shape[0], q.shape[2]
    q, k, v = (widen(fold_heads(x, N)) for x in (q, k, v))
    out, lse = q.new_empty(*q.shape[:2], v.shape[-1]), q.new_empty(*q.shape[:2], 1)
    for c in chunks(q.shape[0], q.shape[1] * k.shape[1], q.device):
        score = scaled_bmm(q[c], k[c].mT, scale)
        if causal:
            hide_later_(score, num_rows)
        softmax_product_(score, v[c], out=out[c], lse=lse[c])
    return unfold_heads(out, N, M), unfold_heads(lse, N, M)[..., 0]


def products_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, delta: Tensor, *, scale: float, causal: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, given lse and δ `[M, n, R]` of the rows' whole softmax."""
    M, N, num_rows = q.shape[0], k.shape[0], q.shape[2]
    dout, q, k, v = (widen(fold_heads(x, N)) for x in (dout, q, k, v))
    lse, delta = (fold_heads(x[..., None], N) for x in (lse, delta))
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    for c in chunks(q.shape[0], q.shape[1] * k.shape[1], q.device):
        score = scaled_bmm(q[c], k[c].mT, scale).sub_(lse[c])
        prob = exp_(hide_later_(score, num_rows) if causal else score)
        torch.bmm(prob.mT, dout[c], out=dv[c])
        dscore = score_gradient(prob, dout[c], v[c], delta[c])
        scaled_bmm(dscore, k[c], scale, out=dq[c])
        scaled_bmm(dscore.mT, q[c], scale, out=dk[c])
    return unfold_heads(dq, N, M), dk.unflatten(0, (N, -1)), dv.unflatten(0, (N, -1))
