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

from sisa_dist.ops.backends import (
    fold_heads,
    scaled_bmm,
    score_gradient,
    softmax_product_,
    unfold_heads,
    widen,
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
    q, k, v, C, B = (widen(fold_heads(x, N)) for x in leaves[:5])
    score, _ = _scores(q, k, C, B, leaves.g.flatten(0, 1), leaves.hidden, scale=scale)
    out, lse = softmax_product_(score, v)
    return unfold_heads(out, N, M), unfold_heads(lse, N, M)


def leaf_backward(dout: Tensor, leaves: Leaves, out: Tensor, lse: Tensor, *, scale: float) -> LeafGradients:
    """Gradients in at least fp32, given out and lse of the rows' whole softmax; C's and B's are of what was passed."""
    M, N = leaves.q.shape[0], leaves.k.shape[0]
    q, k, v, C, B = (widen(fold_heads(x, N)) for x in leaves[:5])
    dout, out = (widen(fold_heads(x, N)) for x in (dout, out))
    score, decay = _scores(q, k, C, B, leaves.g.flatten(0, 1), leaves.hidden, scale=scale)
    prob = score.sub_(fold_heads(lse[..., None], N)).exp_()
    dv = torch.bmm(prob.mT, dout)
    dscore = score_gradient(prob, dout, v, out)
    dq, dk = scaled_bmm(dscore, k, scale), scaled_bmm(dscore.mT, q, scale)
    _per_head(dscore, decay).mul_(decay[:, None])
    dC, dB = scaled_bmm(dscore, B, scale), scaled_bmm(dscore.mT, C, scale)
    dk, dv, dB = (x.unflatten(0, (N, -1)) for x in (dk, dv, dB))
    return LeafGradients(unfold_heads(dq, N, M), dk, dv, unfold_heads(dC, N, M), dB)


def _scores(
    q: Tensor, k: Tensor, C: Tensor, B: Tensor, g: Tensor, hidden: Tensor, *, scale: float
) -> tuple[Tensor, Tensor]:
    """scale·(q kᵀ + e^{g_i−g_j} ∘ C Bᵀ), −inf where hidden, and the decay `[N·n, L, L]`."""
    decay = (g[:, :, None] - g[:, None, :]).to(q.dtype).clamp_(max=0.0).exp_()
    score = torch.bmm(C, B.mT)
    per_head = _per_head(score, decay)
    bias = score.new_zeros(hidden.shape).masked_fill_(hidden, float("-inf"))
    torch.addcmul(bias if hidden.ndim == 2 else bias[:, None], per_head, decay[:, None], out=per_head)
    return score.baddbmm_(q, k.mT, beta=scale, alpha=scale), decay


def _per_head(score: Tensor, decay: Tensor) -> Tensor:
    """[N·n, (M/N)·L, L] seen as [N·n, M/N, L, L]: heads of a group share one decay."""
    return score.unflatten(1, (-1, decay.shape[1]))
