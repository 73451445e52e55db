"""The diagonal blocks of the bisected path, as dense leaf×leaf scores.

Each block forms exp(min(g_i − g_j, 0)) element by element, so it is exact for any decay, and its mask may be any: the
only place of the bisected path that knows "not later" and "same document". Everything is batched products in at least
fp32. One causal flash call per block would need a bound on the decay, and on CPU is slower as well (its blocks are
32 × 512, masked ones included).

Layout: q `[M, n, L, d_h]`, C `[M, n, L, d_s]` rotated and times λ/scale; k, v, B (rotated) `[N, n, L, ·]`;
g `[N, n, L]` fp64; hidden bool `[L, L]` or `[N·n, L, L]`; M a multiple of N.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sisa_dist.ops.precision import exp_, widen
from sisa_dist.ops.products import (
    chunks,
    fold_heads,
    scaled_bmm,
    score_gradient,
    softmax_product_,
    unfold_heads,
)


class Leaves(NamedTuple):
    q: Tensor
    k: Tensor
    v: Tensor
    C: Tensor
    B: Tensor
    g: Tensor
    hidden: Tensor


class LeafGradients(NamedTuple):
    q: Tensor
    k: Tensor
    v: Tensor
    C: Tensor
    B: Tensor


def leaf_forward(leaves: Leaves, *, scale: float) -> tuple[Tensor, Tensor]:
    """Returns out `[M, n, L, d_v]` and lse `[M, n, L]`, in at least fp32."""
    M, N = leaves.q.shape[0], leaves.k.shape[0]
    blocks = _blocks(leaves)
    q, v = blocks.q, blocks.v
    out, lse = q.new_empty(*q.shape[:2], v.shape[-1]), q.new_empty(*q.shape[:2], 1)
    for c in chunks(q.shape[0], q.shape[1] * v.shape[1], q.device):
        score, _ = _scores(_part(blocks, c), scale=scale)
        softmax_product_(score, v[c], out=out[c], lse=lse[c])
    return unfold_heads(out, N, M), unfold_heads(lse, N, M)[..., 0]


def leaf_backward(dout: Tensor, leaves: Leaves, lse: Tensor, delta: Tensor, *, scale: float) -> LeafGradients:
    """Gradients in at least fp32, given lse and δ `[M, n, L]` of the rows' whole softmax; C's and B's as passed."""
    M, N = leaves.q.shape[0], leaves.k.shape[0]
    blocks = _blocks(leaves)
    dout, lse, delta = (widen(fold_heads(x, N)) for x in (dout, lse[..., None], delta[..., None]))
    dq, dk, dv, dC, dB = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in blocks[:5])
    for c in chunks(dq.shape[0], dq.shape[1] * dk.shape[1], dq.device):
        q, k, v, C, B = (x[c] for x in blocks[:5])
        score, decay = _scores(_part(blocks, c), scale=scale)
        prob = exp_(score.sub_(lse[c]))
        torch.bmm(prob.mT, dout[c], out=dv[c])
        dscore = score_gradient(prob, dout[c], v, delta[c])
        scaled_bmm(dscore, k, scale, out=dq[c])
        scaled_bmm(dscore.mT, q, scale, out=dk[c])
        _per_head(dscore, decay).mul_(decay[:, None])
        scaled_bmm(dscore, B, scale, out=dC[c])
        scaled_bmm(dscore.mT, C, scale, out=dB[c])
    dk, dv, dB = (x.unflatten(0, (N, -1)) for x in (dk, dv, dB))
    return LeafGradients(unfold_heads(dq, N, M), dk, dv, unfold_heads(dC, N, M), dB)


def _blocks(leaves: Leaves) -> Leaves:
    """The same with all blocks in one batch dimension: q, C `[N·n, (M/N)·L, ·]`, k, v, B, g `[N·n, L, ·]`."""
    N = leaves.k.shape[0]
    q, k, v, C, B = (widen(fold_heads(x, N)) for x in leaves[:5])
    return Leaves(q, k, v, C, B, leaves.g.flatten(0, 1), leaves.hidden)


def _part(blocks: Leaves, c: slice) -> Leaves:
    q, k, v, C, B, g = (x[c] for x in blocks[:6])
    return Leaves(q, k, v, C, B, g, blocks.hidden if blocks.hidden.ndim == 2 else blocks.hidden[c])


def _scores(blocks: Leaves, *, scale: float) -> tuple[Tensor, Tensor]:
    """scale·(q kᵀ + e^{g_i−g_j} ∘ C Bᵀ), −inf where hidden, and the decay `[n, L, L]`."""
    q, g, hidden = blocks.q, blocks.g, blocks.hidden
    decay = exp_(span_sums(g, q.dtype).clamp_(max=0.0))
    score = torch.bmm(blocks.C, blocks.B.mT)
    per_head = _per_head(score, decay)
    bias = score.new_zeros(hidden.shape).masked_fill_(hidden, float("-inf"))
    torch.addcmul(bias if hidden.ndim == 2 else bias[:, None], per_head, decay[:, None], out=per_head)
    return score.baddbmm_(q, blocks.k.mT, beta=scale, alpha=scale), decay


def span_sums(g: Tensor, dtype: torch.dtype) -> Tensor:
    """g_i − g_j `[n, L, L]` in `dtype` from exact fp64 g `[n, L]`.

    For fp32 without an fp64 `[n, L, L]`, which would cost three times as much: g is split on a grid of 2^-12 nats.
    Differences of grid points (below 4096 nats) and of remainders (25 bits, spans.py) are both exact in fp32, so
    only their sum rounds, and the result depends on the difference alone, not on where the block began.
    """
    g = g - g[:, :1]
    if dtype == torch.float64:
        return g[:, :, None] - g[:, None, :]
    grid = (g * 4096.0).round_().mul_(1 / 4096.0).to(dtype)
    rest = (g - grid).to(dtype)
    return (grid[:, :, None] - grid[:, None, :]).add_(rest[:, :, None] - rest[:, None, :])


def _per_head(score: Tensor, decay: Tensor) -> Tensor:
    """[n, (M/N)·L, L] seen as [n, M/N, L, L]: heads of a group share one decay."""
    return score.unflatten(1, (-1, decay.shape[1]))
