"""A stretch of a window against itself, with the log-sum-exp that merges it with others, and from global ones back.

The bisected operator does it; where there is neither decay nor documents, one causal call of a kernel.

Layout as in shards.py, `[2, B, H, h, ·]`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sisa_dist.ops.backends.causal import causal_forward, causal_gradients
from sisa_dist.ops.bisect import bisected_forward, bisected_gradients
from sisa_dist.ops.precision import work_dtype


def diagonal(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    C: Tensor,
    B: Tensor,
    log_alpha: Tensor,
    theta: Tensor,
    lam: Tensor,
    doc_ids: Tensor | None,
    *,
    scale: float,
    leaf: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """out `[2, B, H, h, d_v]` and lse `[2, B, H, h]`, in at least fp32; g fp64 and the phase in turns, for backward."""
    work, docs = work_dtype(q.dtype), None if doc_ids is None else doc_ids.flatten(0, 1)
    near = [x.flatten(0, 1) for x in (q, k, v, C, B, log_alpha, theta)]
    if _plain(C, doc_ids):
        out, lse = causal_forward(*near[:3], scale, _named(q, backend))
        g, turns = torch.zeros_like(log_alpha, dtype=torch.float64), torch.zeros_like(theta, dtype=work)
    else:
        out, lse, g, turns = bisected_forward(*near, lam, docs, scale, leaf, backend)
        g, turns = g.view(log_alpha.shape), turns.view(theta.shape)
    # The operator's own outputs are not written into.
    out, lse = (x.unflatten(0, (2, -1)).to(work, copy=True) for x in (out, lse))
    return out.contiguous(), lse.contiguous(), g, turns


def diagonal_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    C: Tensor,
    B: Tensor,
    lam: Tensor,
    doc_ids: Tensor | None,
    out: Tensor,
    lse: Tensor,
    g: Tensor,
    turns: Tensor,
    *,
    scale: float,
    leaf: int,
    backend: str,
) -> list[Tensor]:
    """Gradients of q, k, v, C, B, log α, θ and λ, from out and lse of the rows' *whole* softmax."""
    docs = None if doc_ids is None else doc_ids.flatten(0, 1)
    if _plain(C, doc_ids):
        flat = (x.flatten(0, 1) for x in (dout, q, k, v, out, lse))
        found = causal_gradients(*flat, scale, _named(q, backend))
        grads = [x.unflatten(0, (2, -1)) for x in found]
        return [*grads, *(torch.zeros_like(x) for x in (C, B, g, turns, lam))]
    d, *near = (x.flatten(0, 1) for x in (dout, q, k, v, C, B))
    flat = (x.flatten(0, 1) for x in (out, lse, g, turns))
    *grads, dlam = bisected_gradients(d, *near, lam, docs, *flat, scale, leaf, backend)
    return [*(x.unflatten(0, (2, -1)) for x in grads), dlam]


def _plain(C: Tensor, doc_ids: Tensor | None) -> bool:
    return not C.shape[-1] and doc_ids is None


def _named(q: Tensor, backend: str) -> str:
    """On a CPU `auto` is SDPA, as in attention.py; to be had with its log-sum-exp by name."""
    return "cpu_flash" if backend == "auto" and q.device.type == "cpu" else backend
