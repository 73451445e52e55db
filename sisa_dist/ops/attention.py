"""Plain causal softmax attention, grouped-query heads and documents included, through SDPA.

The Transformer baseline and every hybrid use it; it knows nothing of decay. One SDPA call that reaches a flash kernel.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from sisa_dist.config import UserError
from sisa_dist.ops.masks import document_mask
from sisa_dist.ops.precision import no_autocast


def causal_attention(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None, doc_ids: Tensor | None = None
) -> Tensor:
    """Causal softmax attention.

    q `[B, H, T, d]`, k `[B, H_kv, T, d]`, v `[B, H_kv, T, d_v]`, one floating dtype, H_kv divides H (query head h reads
    kv head h // (H / H_kv)). `scale` defaults to 1/√d. `doc_ids` `[B, T]`, integer and non-decreasing along T: a token
    sees only its own document. Returns `[B, H, T, d_v]` in q's dtype. Raises UserError for shapes that do not fit.
    """
    if q.ndim != 4 or k.ndim != 4 or v.ndim != 4 or k.shape[:3] != v.shape[:3] or q.shape[::3] != k.shape[::3]:
        raise UserError(f"attention: q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)} do not fit")
    if q.shape[2] != k.shape[2] or q.shape[1] % k.shape[1]:
        raise UserError(f"attention: q {tuple(q.shape)} and k {tuple(k.shape)} need one T, and H_kv must divide H")
    if doc_ids is not None and doc_ids.shape != (q.shape[0], q.shape[2]):
        raise UserError(f"attention: doc_ids {tuple(doc_ids.shape)} must be [B, T] = {[q.shape[0], q.shape[2]]}")
    with no_autocast(q.device):
        return flash_sdpa(q, k, v, scale=scale if scale is not None else q.shape[-1] ** -0.5, doc_ids=doc_ids)


def flash_sdpa(q: Tensor, k: Tensor, v: Tensor, *, scale: float, doc_ids: Tensor | None) -> Tensor:
    """SDPA with the narrower of (q, k) and v zero-padded: exact, and only equal widths have a flash kernel."""
    d_qk, d_v = q.shape[-1], v.shape[-1]
    if d_v < d_qk:
        v = F.pad(v, (0, d_qk - d_v))
    elif d_qk < d_v:
        q, k = F.pad(q, (0, d_v - d_qk)), F.pad(k, (0, d_v - d_qk))
    mask = None if doc_ids is None else document_mask(doc_ids)
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    )
    return out[..., :d_v]
