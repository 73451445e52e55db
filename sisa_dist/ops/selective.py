"""The selective scan of Mamba: a linear recurrence whose every channel has d_state decays of its own.

    h_t = e^{Δ_t A} h_{t−1} + Δ_t x_t B_tᵀ  [D, N],   y_t = h_t C_t                (Gu & Dao 2023, arXiv 2312.00752)

With a decay per channel and state there is no duality (`ssd.py`): the states themselves must be made. They are, for
`chunk` tokens at a time, by doubling: after round k a state holds the last 2^k tokens, log₂(chunk) rounds in all, and
the chunks follow one another. Only products of decays ≤ 1 are formed, never a quotient or a difference of running
sums: nothing overflows at any decay, and a document's first token has a decay of exactly 0.

Memory, beside the inputs: D·N / chunk numbers a token (the state before each chunk) and a few [B, chunk, D, N] for the
time of a chunk; the backward makes the states again. Costs log₂(chunk) passes over D·N numbers a token, so it is bound
by memory bandwidth, and a fused kernel is several times faster on a GPU: there is none here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from sisa_dist.config import UserError
from sisa_dist.ops.precision import exp_, no_autocast, work_dtype

_NOTHING = 2e-35  # decays under it, e^-80, count as 0: see `precision.exp_`


def selective_scan(
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    chunk: int = 64,
    doc_ids: Tensor | None = None,
    state: Tensor | Callable[[Tensor, Tensor], Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """y for T ≥ 1 tokens, and the state after the last.

    x, delta (Δ, ≥ 0) `[B, T, D]`; A (≤ 0) `[D, N]`; B, C `[B, T, N]`. `doc_ids` `[B, T]`, non-decreasing: the state is
    empty at a document's start. `state` `[B, D, N]`: from before the first token, of the first document. Where it is
    known only once others know what these tokens leave, it is a function: of the state after them from an empty one,
    and of what one from before keeps until then, both `[B, D, N]`, to the state before them.

    Returns y `[B, T, D]` and the last document's state `[B, D, N]`, both fp32 (fp64 for fp64). Gradients pass through
    all states. Raises UserError for shapes that do not fit.
    """
    batch, T, D = x.shape
    N = A.shape[1]
    if delta.shape != x.shape or A.shape[0] != D or B.shape != C.shape or B.shape != (batch, T, N):
        raise UserError(
            f"selective_scan: x {tuple(x.shape)}, delta {tuple(delta.shape)}, A {tuple(A.shape)}, B {tuple(B.shape)} "
            f"and C {tuple(C.shape)} do not fit: [B, T, D] twice, [D, N], [B, T, N] twice"
        )
    work = work_dtype(x.dtype)
    first_BT = None if doc_ids is None else F.pad(doc_ids[:, 1:] != doc_ids[:, :-1], (1, 0))
    x, delta, A, B, C = (z.to(work) for z in (x, delta, A, B, C))
    empty = x.new_zeros(batch, D, N)
    if not callable(state):
        before = empty if state is None else state.to(work)
        return _Scan.apply(x, delta, A, B, C, first_BT, before, min(chunk, T))
    y, left = _Scan.apply(x, delta, A, B, C, first_BT, empty, min(chunk, T))
    # The recurrence is linear in its state: what one from before gives is added, without a second scan.
    reach_BTD = delta.cumsum(1)
    outside_BT = None if doc_ids is None else doc_ids != doc_ids[:, :1]
    kept = (reach_BTD[:, -1, :, None] * A).exp()
    if outside_BT is not None:
        kept = kept.masked_fill(outside_BT[:, -1, None, None], 0.0)
    before = state(left, kept)
    return y + _Carried.apply(reach_BTD, A, C, before, outside_BT, min(chunk, T)), left + kept * before


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_BTD: Tensor,
        delta_BTD: Tensor,
        A_DN: Tensor,
        B_BTN: Tensor,
        C_BTN: Tensor,
        first_BT: Tensor | None,
        now_BDN: Tensor,
        chunk: int,
    ) -> tuple[Tensor, Tensor]:
        y, starts = [], []
        with no_autocast(x_BTD.device):
            for start in range(0, x_BTD.shape[1], chunk):
                x, delta, B, C, first = _cut(start, chunk, x_BTD, delta_BTD, B_BTN, C_BTN, first_BT)
                starts.append(now_BDN)
                h_BLDN = _states(_decays(delta, A_DN, first), delta * x, B, now_BDN)
                y.append((h_BLDN @ C[..., None])[..., 0])
                now_BDN = h_BLDN[:, -1].clone()  # a view would keep all states
        ctx.save_for_backward(x_BTD, delta_BTD, A_DN, B_BTN, C_BTN, first_BT, *starts)
        ctx.chunk = chunk
        return torch.cat(y, dim=1), now_BDN

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_BTD: Tensor, later_BDN: Tensor) -> tuple[Tensor | None, ...]:
        """With G_t the gradient of h_t: G_t = dy_t C_tᵀ + e^{Δ_{t+1} A} G_{t+1}, the same scan from the end."""
        x_BTD, delta_BTD, A_DN, B_BTN, C_BTN, first_BT, *starts = ctx.saved_tensors
        chunk, dA_DN = ctx.chunk, torch.zeros_like(A_DN)
        parts = []
        with no_autocast(x_BTD.device):
            for index in reversed(range(len(starts))):
                cut = _cut(index * chunk, chunk, x_BTD, delta_BTD, B_BTN, C_BTN, dy_BTD, first_BT)
                x, delta, B, C, dy, first = cut
                decay = _decays(delta, A_DN, first)
                h = _states(decay.clone(), delta * x, B, starts[index])
                before = torch.cat((starts[index][:, None], h[:, :-1]), dim=1)
                from_end = (dy[..., None] * C[:, :, None]).flip(1)
                from_end[:, 0] += later_BDN
                G = _double_(F.pad(decay[:, 1:].flip(1), (0, 0, 0, 0, 1, 0)), from_end).flip(1)
                later_BDN = decay[:, 0] * G[:, 0]

                dC, dB = (dy[:, :, None] @ h)[:, :, 0], ((delta * x)[:, :, None] @ G)[:, :, 0]
                du = (G @ B[..., None])[..., 0]
                d_exponent = G.mul_(decay).mul_(before)
                dA_DN += torch.einsum("bld,bldn->dn", delta, d_exponent)
                parts.append((du * delta, (d_exponent * A_DN).sum(-1) + du * x, dB, dC))
        dx, ddelta, dB, dC = (torch.cat(pieces[::-1], dim=1) for pieces in zip(*parts, strict=True))
        return dx, ddelta, dA_DN, dB, dC, None, later_BDN, None


class _Carried(torch.autograd.Function):
    """What a state from before gives: y_t = (e^{A r_t} ∘ S) C_t, r_t = Δ_1 + … + Δ_t, 0 in other documents."""

    @staticmethod
    def forward(
        ctx: Any,
        reach_BTD: Tensor,
        A_DN: Tensor,
        C_BTN: Tensor,
        before_BDN: Tensor,
        outside_BT: Tensor | None,
        chunk: int,
    ) -> Tensor:
        y = []
        with no_autocast(reach_BTD.device):
            for start in range(0, reach_BTD.shape[1], chunk):
                reach, C, outside = _cut(start, chunk, reach_BTD, C_BTN, outside_BT)
                h_BLDN = _decays(reach, A_DN, outside).mul_(before_BDN[:, None])
                y.append((h_BLDN @ C[..., None])[..., 0])
        ctx.save_for_backward(reach_BTD, A_DN, C_BTN, before_BDN, outside_BT)
        ctx.chunk = chunk
        return torch.cat(y, dim=1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_BTD: Tensor) -> tuple[Tensor | None, ...]:
        reach_BTD, A_DN, C_BTN, before_BDN, outside_BT = ctx.saved_tensors
        dA_DN, dbefore_BDN, parts = torch.zeros_like(A_DN), torch.zeros_like(before_BDN), []
        with no_autocast(reach_BTD.device):
            for start in range(0, reach_BTD.shape[1], ctx.chunk):
                reach, C, dy, outside = _cut(start, ctx.chunk, reach_BTD, C_BTN, dy_BTD, outside_BT)
                G_BLDN = _decays(reach, A_DN, outside)
                dC = (dy[:, :, None] @ (G_BLDN * before_BDN[:, None]))[:, :, 0]
                G_BLDN.mul_(dy[..., None]).mul_(C[:, :, None])
                dbefore_BDN += G_BLDN.sum(1)
                d_exponent = G_BLDN.mul_(before_BDN[:, None])
                dA_DN += torch.einsum("bld,bldn->dn", reach, d_exponent)
                parts.append(((d_exponent * A_DN).sum(-1), dC))
        dreach, dC = (torch.cat(pieces, dim=1) for pieces in zip(*parts, strict=True))
        return dreach, dA_DN, dC, dbefore_BDN, None, None


def _cut(start: int, length: int, *whole: Any) -> tuple[Any, ...]:
    return tuple(z if z is None else z[:, start : start + length] for z in whole)


def _decays(delta_BLD: Tensor, A_DN: Tensor, first_BL: Tensor | None) -> Tensor:
    """e^{ΔA} [B, L, D, N], 0 where it is said, as at a document's first token."""
    decay = exp_(delta_BLD[..., None] * A_DN)
    return decay if first_BL is None else decay.masked_fill_(first_BL[..., None, None], 0.0)


def _states(decay_BLDN: Tensor, u_BLD: Tensor, B_BLN: Tensor, before_BDN: Tensor) -> Tensor:
    """h of each token of a chunk. `decay` is used up."""
    added = u_BLD[..., None] * B_BLN[:, :, None]
    added[:, 0] += decay_BLDN[:, 0] * before_BDN
    return _double_(decay_BLDN, added)


def _double_(decay: Tensor, h: Tensor) -> Tensor:
    """h_i ← h_i + decay_i h_{i−1} along dim 1, in place; `decay` is used up (Hillis & Steele 1986)."""
    reach, length = 1, h.shape[1]
    while reach < length:
        h[:, reach:] += decay[:, reach:] * h[:, :-reach]
        if 2 * reach < length:
            decay[:, reach:] = F.threshold(decay[:, reach:] * decay[:, :-reach], _NOTHING, 0.0)
        reach *= 2
    return h
