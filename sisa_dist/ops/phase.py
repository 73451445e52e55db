"""The running phase Φ of a rotation that is trained in chunks, for use by differences alone.

Apart from `rotation.py` because here Φ is itself an input of autograd: sums in fixed point, which no length and no
other document can move by a bit (`spans.phase_turns`), with the gradient that differences have.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from sisa_dist.ops.documents import Segments, suffix_sums
from sisa_dist.ops.precision import no_autocast, work_dtype
from sisa_dist.ops.spans import phase_turns


def running_phase(theta: Tensor, doc_ids: Tensor | None) -> Tensor:
    """Φ_t = Σ_{k≤t} θ_k mod 2π, `[B, H, T, m]` in [−π, π], fp32 (fp64 for fp64), counted anew from every document.

    theta `[B, H, T, m]` in radians; doc_ids `[B, T]`, non-decreasing. What is made of Φ must hold only differences
    within a document: the gradient of a document's first θ is then 0, and is set so.
    """
    with no_autocast(theta.device):
        return _Phase.apply(theta, doc_ids)


class _Phase(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, theta_BHTm: Tensor, doc_ids_BT: Tensor | None) -> Tensor:
        ctx.segments = None if doc_ids_BT is None else Segments.of(doc_ids_BT)
        first_BT = None if ctx.segments is None else ctx.segments.first
        return phase_turns(theta_BHTm, first_BT, work=work_dtype(theta_BHTm.dtype)) * (2 * math.pi)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return suffix_sums(grad, ctx.segments).to(grad.dtype), None
