"""What the score is made of, seen from a few of its rows: how large its two terms are, and how far the second of them
moves attention.

    moved_i = ½ Σ_j |softmax_j(s_ij) − softmax_j(s_ij − importance_ij)|

the total variation distance: the share of query i's attention mass that the importance term takes elsewhere. Written
out as dense.py does, for these rows alone and a few heads at a time, in fp32 (fp64 where the inputs are).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sisa_dist.ops.precision import no_autocast, work_dtype
from sisa_dist.ops.rotation import phase_cos_sin, rotate, running_sum

_BYTES = 32 * 2**20  # that the copies of one group of heads may take; a single head is taken whatever it needs


class ScoreSample(NamedTuple):
    """Scalars, of all sampled queries, heads and windows."""

    content_max: Tensor  # the largest |q·k·scale| of a visible pair
    importance_max: Tensor  # the largest |λ e^{g_i−g_j} C_iᵀ R(Φ_j−Φ_i) B_j|
    moved: Tensor  # mean, 0 to 1


def sampled_scores(
    q: Tensor,
    k: Tensor,
    C: Tensor,
    B: Tensor,
    log_alpha: Tensor,
    theta: Tensor,
    lam: Tensor,
    *,
    rows: Tensor,
    scale: float | None = None,
    doc_ids: Tensor | None = None,
) -> ScoreSample:
    """Inputs as of `sisa_attention`; `rows` `[R]` int64: the queries that are looked at, in every window and head.

    Without gradients. Heads are taken a few at a time: its own memory stays below 32 MiB, or where one head needs more,
    below 4·T·(8·R + d_h + 8·d_s) bytes a window (at T 8192, d_h 128, d_s 64, R 16: 24 MiB; measured 14).
    """
    with no_autocast(q.device), torch.no_grad():
        H, scale = q.shape[1], q.shape[-1] ** -0.5 if scale is None else scale
        g_BGT = running_sum(log_alpha, dim=2)
        at_once = max(1, _BYTES // _bytes_of_a_head(q, C, len(rows)))
        place = torch.arange(q.shape[2], device=q.device)
        visible_BRT = (place <= rows[:, None])[None]
        if doc_ids is not None:
            visible_BRT = visible_BRT & (doc_ids[:, rows, None] == doc_ids[:, None, :])
        found = []
        for first in range(0, H, at_once):
            heads = slice(first, min(first + at_once, H))
            kv = torch.arange(heads.start, heads.stop, device=q.device) // (H // k.shape[1])
            k_h, B_h, g_h, theta_h = (x.index_select(1, kv) for x in (k, B, g_BGT, theta))
            inputs = q[:, heads], k_h, C[:, heads], B_h, g_h, theta_h, lam[heads]
            found.append(_some_heads(*inputs, rows, visible_BRT[:, None], scale))
        content, importance, moved = (torch.stack(values) for values in zip(*found, strict=True))
        return ScoreSample(content.amax(), importance.amax(), moved.sum() / (q.shape[0] * H * len(rows)))


def _some_heads(
    q: Tensor,
    k: Tensor,
    C: Tensor,
    B: Tensor,
    g_BHT: Tensor,
    theta: Tensor,
    lam_H: Tensor,
    rows: Tensor,
    visible: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Largest content and importance, and the sum of what is moved."""
    work = work_dtype(q.dtype)
    q, C = (x.index_select(2, rows).to(work) for x in (q, C))
    cos, sin = phase_cos_sin(running_sum(theta, dim=2), dtype=work)
    turned_C = rotate(C, cos.index_select(2, rows), sin.index_select(2, rows))
    ssm_BHRT = turned_C @ rotate(B.to(work), cos, sin).mT
    decay_BHRT = (g_BHT.index_select(2, rows)[..., None] - g_BHT[:, :, None]).clamp(max=0.0).exp().to(work)
    importance = lam_H.to(work)[:, None, None] * decay_BHRT * ssm_BHRT
    content = (q @ k.to(work).mT) * scale
    with_it, without = (s.masked_fill(~visible, float("-inf")).softmax(-1) for s in (content + importance, content))
    most, most_of_importance = (s.masked_fill(~visible, 0.0).abs().amax() for s in (content, importance))
    return most, most_of_importance, (with_it - without).abs().sum() / 2


def _bytes_of_a_head(q: Tensor, C: Tensor, rows: int) -> int:
    batch, _, T, d_h = q.shape
    return 4 * batch * T * (8 * rows + d_h + 8 * C.shape[-1])
