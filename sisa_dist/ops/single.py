"""The paper's one SDPA call (Shin & Yang 2026, Proposition 1).

Fast, and exact only while the whole sequence's decay is small: both factors e^{g_i−c} and e^{c−g_j} must stay finite,
masked pairs included. With c in the middle that holds in fp32 and bf16 up to a total decay of about 170 nats less
what C and B add, or half of it in each of several packed documents; beyond it the result is NaN. Whoever calls this
has declared a bound or asked for it by name.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sisa_dist.ops.attention import flash_sdpa, packed_attention
from sisa_dist.ops.documents import Segments, sums_in_documents
from sisa_dist.ops.precision import work_dtype
from sisa_dist.ops.rotation import expand_kv, rotate
from sisa_dist.ops.spans import decay_sums, phase_turns


def sisa_single(
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
    backend: str = "auto",
) -> Tensor:
    """One SDPA call over Q̂ = [q ; (λ/scale)·e^{g−c} R(Φ) C] and K̂ = [k ; e^{c−g} R(Φ) B].

    λ sits wholly on C̄, so that K̂ keeps H_kv heads. Packed documents have one reference each and are attended in the
    pieces of the bisected path: no kernel takes their mask, and T×T of it is never made. A late key of one document
    against an early query of the next is large for nothing, e^{half of both decays}, and is erased there. Shapes are
    those of `sisa_attention`, already checked; returns [B, H, T, d_v] in q's dtype.
    """
    H, dtype = q_BHTd.shape[1], q_BHTd.dtype
    work = work_dtype(dtype)
    segments = None if doc_ids_BT is None else Segments.of(doc_ids_BT)
    g_BGT, middle, angle = _sums(log_alpha_BGT, theta_BGTm, segments, work=work)
    cos, sin = angle.cos(), angle.sin()
    # Any c is exact; the middle of the range spends it evenly on both factors. It carries no gradient.
    rise_BGT1 = (g_BGT - middle.detach()).to(work)[..., None]
    B_bar = rotate(B_BGTs.to(work), cos, sin) * torch.exp(-rise_BGT1)
    C_bar = rotate(C_BHTs.to(work), expand_kv(cos, H), expand_kv(sin, H)) * torch.exp(expand_kv(rise_BGT1, H))
    C_bar = C_bar * (lam_H.to(work) / scale)[:, None, None]
    q_hat = torch.cat((q_BHTd, C_bar.to(dtype)), dim=-1)
    k_hat = torch.cat((k_BGTd, B_bar.to(dtype)), dim=-1)
    if doc_ids_BT is not None:
        return packed_attention(q_hat, k_hat, v_BGTv, scale=scale, doc_ids=doc_ids_BT, backend=backend, erase=True)
    return flash_sdpa(q_hat, k_hat, v_BGTv, scale=scale, backend=backend)


def _sums(
    log_alpha_BGT: Tensor, theta_BGTm: Tensor, segments: Segments | None, *, work: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """g, the middle of each token's document's range of it, and Φ in [−π, π].

    By the exact sums of the bisected path, with documents or without: no document then moves a bit of another, and one
    that is packed has the sums it has alone.
    """
    g_BGT = sums_in_documents(log_alpha_BGT, segments, lambda x: decay_sums(x, work=work))
    first_BT = None if segments is None else segments.first
    angle = sums_in_documents(theta_BGTm, segments, lambda x: phase_turns(x, first_BT, work=work).mul_(2 * math.pi))
    if segments is None:
        first, last = g_BGT[..., :1], g_BGT[..., -1:]
    else:
        first, last = (g_BGT.gather(2, edge[:, None].expand_as(g_BGT)) for edge in segments)
    return g_BGT, (first + last) / 2, angle
