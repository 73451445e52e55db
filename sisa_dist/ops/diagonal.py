"""A stretch of a window against itself, with the log-sum-exp that merges it with others, and back from global ones.

The bisected operator does it; where there is neither decay nor documents, one causal call of a kernel.

Layout as in shards.py, `[2, B, H, h, ·]`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sisa_dist.ops.backends.causal import causal_forward, causal_gradients
from sisa_dist.ops.bisect import bisected_forward, bisected_gradients
from sisa_dist.ops.precision import work_dtype
from sisa_dist.ops.shards import Inputs


class Near(NamedTuple):
    """In at least fp32; may be written into."""

    out: Tensor  # [2, B, H, h, d_v]
    lse: Tensor  # [2, B, H, h]
    g: Tensor  # fp64 [2, B, G, h], and the phase in turns [2, B, G, h, d_s/2]: for the backward
    turns: Tensor


def diagonal(
    x: Inputs,
    log_alpha: Tensor,
    theta: Tensor,
    doc_ids: Tensor | None,
    *,
    scale: float,
    leaf: int,
    backend: str,
) -> Near:
    """log_alpha `[2, B, G, h]`, theta `[2, B, G, h, d_s/2]`, doc_ids `[2, B, h]`."""
    work = work_dtype(x.q.dtype)
    near = [y.flatten(0, 1) for y in x[:5]]
    if _plain(x, doc_ids):
        out, lse = causal_forward(*near[:3], scale, _named(x.q, backend))
        g, turns = torch.zeros_like(log_alpha, dtype=torch.float64), torch.zeros_like(theta, dtype=work)
    else:
        sums = log_alpha.flatten(0, 1), theta.flatten(0, 1), x.lam, _flat(doc_ids)
        out, lse, g, turns = bisected_forward(*near, *sums, scale, leaf, backend)
        g, turns = g.view(log_alpha.shape), turns.view(theta.shape)
    # Copies: an operator's outputs are not to be written into.
    out, lse = (y.unflatten(0, (2, -1)).to(work, copy=True).contiguous() for y in (out, lse))
    return Near(out, lse, g, turns)


def diagonal_backward(
    dout: Tensor,
    x: Inputs,
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
    near = [y.flatten(0, 1) for y in (dout, *x[:5])]
    if _plain(x, doc_ids):
        found = causal_gradients(*near[:4], out.flatten(0, 1), lse.flatten(0, 1), scale, _named(x.q, backend))
        grads = [y.unflatten(0, (2, -1)) for y in found]
        return [*grads, *(torch.zeros_like(y) for y in (x.C, x.B, g, turns, x.lam))]
    rows = (y.flatten(0, 1) for y in (out, lse, g, turns))
    *grads, dlam = bisected_gradients(*near, x.lam, _flat(doc_ids), *rows, scale, leaf, backend)
    return [*(y.unflatten(0, (2, -1)) for y in grads), dlam]


def _plain(x: Inputs, doc_ids: Tensor | None) -> bool:
    return not x.C.shape[-1] and doc_ids is None


def _flat(doc_ids: Tensor | None) -> Tensor | None:
    return None if doc_ids is None else doc_ids.flatten(0, 1)


def _named(q: Tensor, backend: str) -> str:
    """On a CPU `auto` is SDPA, as in attention.py; by this name it comes with its log-sum-exp."""
    return "cpu_flash" if backend == "auto" and q.device.type == "cpu" else backend
