"""Plain causal softmax attention, grouped-query heads and documents included, through SDPA.

The Transformer baseline and every hybrid use it. One SDPA call that reaches a flash kernel; packed documents go by the
bisected path without its decay, which needs no T×T mask. No positions are added here: RoPE is the caller's.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from sisa_dist.config import UserError
from sisa_dist.ops.backends import causal_call, check_name
from sisa_dist.ops.bisect import sisa_bisected
from sisa_dist.ops.precision import no_autocast, work_dtype


def causal_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    doc_ids: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Causal softmax attention.

    q `[B, H, T, d]`, k `[B, H_kv, T, d]`, v `[B, H_kv, T, d_v]`, one floating dtype, H_kv divides H (query head h reads
    kv head h // (H / H_kv)). `scale` defaults to 1/√d. `doc_ids` `[B, T]`, integer and non-decreasing along T: a token
    sees only its own document. `backend`: one of `ops.backends.NAMES`. Returns `[B, H, T, d_v]` in q's dtype. Raises
    UserError for shapes that do not fit and for a backend that cannot serve them here.
    """
    if q.ndim != 4 or k.ndim != 4 or v.ndim != 4 or k.shape[:3] != v.shape[:3] or q.shape[::3] != k.shape[::3]:
        raise UserError(f"attention: q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)} do not fit")
    if q.shape[2] != k.shape[2] or q.shape[1] % k.shape[1]:
        raise UserError(f"attention: q {tuple(q.shape)} and k {tuple(k.shape)} need one T, and H_kv must divide H")
    if doc_ids is not None and doc_ids.shape != (q.shape[0], q.shape[2]):
        raise UserError(f"attention: doc_ids {tuple(doc_ids.shape)} must be [B, T] = {[q.shape[0], q.shape[2]]}")
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    check_name(backend, q.device)
    with no_autocast(q.device):
        if doc_ids is not None:
            return packed_attention(q, k, v, scale=scale, doc_ids=doc_ids, backend=backend)
        return flash_sdpa(q, k, v, scale=scale, backend=backend)


def packed_attention(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, doc_ids: Tensor, backend: str, erase: bool = False
) -> Tensor:
    """Softmax over q·k inside each document: the bisected path with d_s = 0. No mask above the leaf size.

    A mask for SDPA would cost T² bytes a sequence and T² of reading, and reaches no flash kernel on a GPU. `erase`:
    where q·k of different documents may be thousands of nats.
    """
    heads, none = q.shape[1], q.new_empty(*q.shape[:3], 0)
    none_kv = k.new_empty(*k.shape[:3], 0)
    still = none_kv.sum(-1, dtype=work_dtype(q.dtype))
    lam = still.new_zeros(heads)
    inputs = q, k, v, none, none_kv, still, none_kv, lam
    return sisa_bisected(*inputs, scale=scale, doc_ids_BT=doc_ids, leaf=None, backend=backend, erase=erase)


def flash_sdpa(q: Tensor, k: Tensor, v: Tensor, *, scale: float, backend: str) -> Tensor:
    """One causal call. For SDPA the narrower of (q, k) and v is zero-padded: only equal widths have a CPU flash."""
    # On CPU SDPA itself is the flash kernel; on CUDA it can neither be checked nor reach flash-attn.
    kind = q.device.type
    if not ((backend == "auto" and kind != "cuda") or (backend == "cpu_flash" and kind == "cpu")):
        return causal_call(q, k, v, scale=scale, backend=backend)
    d_qk, d_v = q.shape[-1], v.shape[-1]
    if d_v < d_qk:
        v = F.pad(v, (0, d_qk - d_v))
    elif d_qk < d_v:
        q, k = F.pad(q, (0, d_v - d_qk)), F.pad(k, (0, d_v - d_qk))
    gqa = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=gqa)[..., :d_v]
