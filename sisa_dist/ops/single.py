"""The paper's one SDPA call (Shin & Yang 2026, Proposition 1).

Fast, and exact only while the whole sequence's decay is small: both factors e^{g_i−c} and e^{c−g_j} must stay finite,
masked pairs included. With c in the middle that holds in fp32 and bf16 up to a total decay of about 170 nats less
what C and B add; beyond it the result is NaN. Whoever calls this has declared a bound or asked for it by name.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sisa_dist.ops.attention import flash_sdpa
from sisa_dist.ops.precision import work_dtype
from sisa_dist.ops.rotation import expand_kv, phase_cos_sin, rotate, running_sum


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

    λ sits wholly on C̄, so that K̂ keeps H_kv heads. Shapes are those of `sisa_attention`, already checked; returns
    [B, H, T, d_v] in q's dtype.
    """
    H, dtype = q_BHTd.shape[1], q_BHTd.dtype
    work = work_dtype(dtype)
    g_BGT = running_sum(log_alpha_BGT, dim=-1)
    # Any c is exact; the middle of the range spends it evenly on both factors. It carries no gradient.
    middle = (g_BGT[..., :1] + g_BGT[..., -1:]).detach() / 2
    rise_BGT1 = (g_BGT - middle).to(work)[..., None]
    cos, sin = phase_cos_sin(running_sum(theta_BGTm, dim=-2), dtype=work)
    B_bar = rotate(B_BGTs.to(work), cos, sin) * torch.exp(-rise_BGT1)
    C_bar = rotate(C_BHTs.to(work), expand_kv(cos, H), expand_kv(sin, H)) * torch.exp(expand_kv(rise_BGT1, H))
    C_bar = C_bar * (lam_H.to(work) / scale)[:, None, None]
    q_hat = torch.cat((q_BHTd, C_bar.to(dtype)), dim=-1)
    k_hat = torch.cat((k_BGTd, B_bar.to(dtype)), dim=-1)
    return flash_sdpa(q_hat, k_hat, v_BGTv, scale=scale, doc_ids=doc_ids_BT, backend=backend)
