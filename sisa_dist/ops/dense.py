"""The oracle: the score of SISA written out as the T×T matrix it is.

Exact for any decay, fp64 where the inputs are, differentiated by autograd, and never fast: time and memory grow with
T². Every other path is tested against this file, so it holds nothing clever.
"""

from __future__ import annotations

from torch import Tensor

from sisa_dist.ops.documents import Segments, sums_in_documents
from sisa_dist.ops.masks import causal_mask, document_mask
from sisa_dist.ops.precision import work_dtype
from sisa_dist.ops.rotation import expand_kv, phase_cos_sin, rotate, running_sum


def sisa_dense(
    q_BHTd: Tensor,
    k_BGTd: Tensor,
    v_BGTv: Tensor,
    C_BHTs: Tensor,
    B_BGTs: Tensor,
    log_alpha_BGT: Tensor,
    theta_BGTm: Tensor,
    lam_H: Tensor,
    *,
    scale: float,
    doc_ids_BT: Tensor | None,
) -> Tensor:
    """Shin & Yang 2026, section 1: softmax over j ≤ i of q·k·scale + λ e^{g_i−g_j} C_iᵀ R(Φ_j−Φ_i) B_j.

    Computes in fp64 where q is fp64, else in fp32, and returns [B, H, T, d_v] in q's dtype. Shapes are those of
    `sisa_attention`, already checked.
    """
    H, T = q_BHTd.shape[1], q_BHTd.shape[2]
    work = work_dtype(q_BHTd.dtype)
    q, k, v, C, B = (expand_kv(x, H).to(work) for x in (q_BHTd, k_BGTd, v_BGTv, C_BHTs, B_BGTs))

    g_BGT, phase_BGTm = (_sums(x, doc_ids_BT) for x in (log_alpha_BGT, theta_BGTm))
    g_BHT = expand_kv(g_BGT, H)
    decay_BHTT = (g_BHT[..., :, None] - g_BHT[..., None, :]).clamp(max=0.0).exp().to(work)
    cos, sin = phase_cos_sin(expand_kv(phase_BGTm, H), dtype=work)
    ssm_BHTT = rotate(C, cos, sin) @ rotate(B, cos, sin).mT
    score_BHTT = (q @ k.mT) * scale + lam_H.to(work)[:, None, None] * decay_BHTT * ssm_BHTT

    visible = causal_mask(T, T, device=q.device) if doc_ids_BT is None else document_mask(doc_ids_BT)
    return (score_BHTT.masked_fill(~visible, float("-inf")).softmax(-1) @ v).to(q_BHTd.dtype)


def _sums(x_BGT: Tensor, doc_ids_BT: Tensor | None) -> Tensor:
    if doc_ids_BT is None:
        return running_sum(x_BGT, dim=2)
    return sums_in_documents(x_BGT, Segments.of(doc_ids_BT), lambda x: running_sum(x, dim=2))
