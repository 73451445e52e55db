"""The public SISA score: checks its inputs and chooses the path. The mathematics is in the files it calls.

The choice looks at shapes and declared bounds only, never at a tensor's value: reading one would stall a GPU at every
layer, break compilation, and make the result depend on data.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sisa_dist.config import UserError
from sisa_dist.ops.backends import check_name
from sisa_dist.ops.bisect import sisa_bisected
from sisa_dist.ops.dense import sisa_dense
from sisa_dist.ops.precision import no_autocast
from sisa_dist.ops.single import sisa_single

PATHS = ("auto", "single", "bisected", "dense")
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

# One call is safe while T·|log_alpha_min| ≤ 40. With c in the middle each factor is at most e^20; their product at a
# masked (future) pair at most e^40, and it stands against fp32's e^88.7: e^48 ≈ 7e20 is left for λ·√d_h·|C||B|, where
# a diagonal score of even 1e8 would already have no fractional digit in fp32. Nothing meaningful can overflow.
SAFE_RANGE = 40.0


def sisa_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    C: Tensor,
    B: Tensor,
    log_alpha: Tensor,
    theta: Tensor,
    lam: Tensor,
    *,
    scale: float | None = None,
    doc_ids: Tensor | None = None,
    path: str = "auto",
    log_alpha_min: float | None = None,
    leaf: int | None = None,
    backend: str = "auto",
) -> Tensor:
    """Causal SISA attention (Shin & Yang 2026, section 1).

    y_i = Σ_j softmax_{j≤i}(q_i·k_j·scale + λ e^{g_i−g_j} C_iᵀ R(Φ_j−Φ_i) B_j) v_j, with g and Φ the inclusive running
    sums of log_alpha and theta, and R rotating the adjacent channel pairs (0,1), (2,3), ….

    q `[B, H, T, d_h]` and k `[B, H_kv, T, d_h]` with RoPE already applied; v `[B, H_kv, T, d_v]`; C `[B, H, T, d_s]`;
    B `[B, H_kv, T, d_s]`; log_alpha `[B, H_kv, T]`, nats per token, ≤ 0; theta `[B, H_kv, T, d_s/2]`, radians; lam
    `[H]`, positive. H_kv divides H, and query head h reads kv head h // (H / H_kv). q, k, v, C, B share one floating
    dtype; log_alpha, theta and lam may be wider. d_s = 0 is plain attention. `scale` defaults to 1/√d_h. `doc_ids`
    `[B, T]` integer, non-decreasing along T: a token sees only its own document. `path`: auto, single, bisected, dense.
    `log_alpha_min`: the caller's promise that log_alpha never falls below it (nats per token), which lets auto use one
    call where it is provably safe. `leaf`: tokens of a diagonal block of the bisected path; None chooses by speed.
    `backend`: one of `ops.backends.NAMES`, for the one call and for the bisected path's rectangles; its diagonal
    blocks are always plain products, since no kernel forms their scores.

    Returns `[B, H, T, d_v]` in q's dtype. Raises UserError for shapes, dtypes or settings that do not fit.
    """
    check_name(backend, q.device)
    check_inputs(q, k, v, C, B, log_alpha, theta, lam, doc_ids, path, scale, log_alpha_min, leaf)
    T, scale = q.shape[2], q.shape[-1] ** -0.5 if scale is None else float(scale)
    if path == "auto":
        safe = log_alpha_min is not None and doc_ids is None and T * -log_alpha_min <= SAFE_RANGE
        safe = safe and q.dtype != torch.float16  # e^20 · C does not fit: its largest number is 65504
        path = "single" if safe else "bisected"
    inputs = (q, k, v, C, B, log_alpha, theta, lam)
    with no_autocast(q.device):
        if path == "single":
            return sisa_single(*inputs, scale=scale, doc_ids_BT=doc_ids, backend=backend)
        if path == "dense":
            if backend not in ("auto", "products"):
                raise UserError(f"attention.path dense has no backends: remove attention.backend {backend}")
            return sisa_dense(*inputs, scale=scale, doc_ids_BT=doc_ids)
        return sisa_bisected(*inputs, scale=scale, doc_ids_BT=doc_ids, leaf=leaf, backend=backend)


def check_inputs(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    C: Tensor,
    B: Tensor,
    log_alpha: Tensor,
    theta: Tensor,
    lam: Tensor,
    doc_ids: Tensor | None,
    path: str,
    scale: float | None,
    log_alpha_min: float | None,
    leaf: int | None,
) -> None:
    if path not in PATHS:
        raise UserError(f"sisa_attention: path {path!r} is unknown: set one of {', '.join(PATHS)}")
    if scale is not None and not scale > 0:
        raise UserError(f"sisa_attention: scale {scale} must be positive (None: 1/√d_h)")
    if log_alpha_min is not None and not log_alpha_min <= 0:
        raise UserError(f"sisa_attention: log_alpha_min {log_alpha_min} must be ≤ 0 nats per token")
    if leaf is not None and leaf < 1:
        raise UserError(f"sisa_attention: leaf {leaf} must be at least 1 token")
    if q.ndim != 4 or k.ndim != 4 or C.ndim != 4:
        raise UserError(f"sisa_attention: q, k and C must be 4-D, got {q.ndim}, {k.ndim} and {C.ndim} dimensions")
    batch, H, T, d_h = q.shape
    H_kv, d_s = k.shape[1], C.shape[-1]
    if T < 1 or d_h < 1:
        raise UserError(f"sisa_attention: q {tuple(q.shape)} needs at least one token and one channel")
    if H_kv < 1 or H % H_kv:
        raise UserError(f"sisa_attention: {H_kv} kv heads do not divide {H} heads")
    if d_s % 2:
        raise UserError(f"sisa_attention: d_s {d_s} is odd and channels turn in pairs: use {d_s - 1} or {d_s + 1}")
    expected = {
        "k": (k, (batch, H_kv, T, d_h)),
        "v": (v, (batch, H_kv, T, v.shape[-1])),
        "C": (C, (batch, H, T, d_s)),
        "B": (B, (batch, H_kv, T, d_s)),
        "log_alpha": (log_alpha, (batch, H_kv, T)),
        "theta": (theta, (batch, H_kv, T, d_s // 2)),
        "lam": (lam, (H,)),
    }
    for name, (x, shape) in expected.items():
        if tuple(x.shape) != shape:
            raise UserError(f"sisa_attention: {name} has shape {tuple(x.shape)}, q and C call for {shape}")
        if x.dtype not in FLOATS or x.device != q.device:
            raise UserError(f"sisa_attention: {name} is {x.dtype} on {x.device}; q is {q.dtype} on {q.device}")
    if q.dtype not in FLOATS or any(x.dtype != q.dtype for x in (k, v, C, B)):
        raise UserError("sisa_attention: q, k, v, C and B must share one floating dtype: cast them before the call")
    if doc_ids is not None:
        if doc_ids.shape != (batch, T):
            raise UserError(f"sisa_attention: doc_ids has shape {tuple(doc_ids.shape)}, q calls for {(batch, T)}")
        if doc_ids.is_floating_point() or doc_ids.is_complex() or doc_ids.dtype == torch.bool:
            raise UserError(f"sisa_attention: doc_ids must be integers, not {doc_ids.dtype}")
