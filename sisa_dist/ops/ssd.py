"""State-space duality: a linear recurrence with one decay per head and token, in chunks of matrix products.

    S_t = e^{a_t} S_{t−1} + w_t B_t x_tᵀ ,  y_t = C_tᵀ S_t     ⇔     y_i = Σ_{j≤i} e^{a_{j+1}+…+a_i} w_j (C_i·B_j) x_j

(Dao & Gu 2024, arXiv 2405.21060, sections 6 and 7.) Quadratic inside a chunk, a state [N, P] a head between chunks.
Every exponent is a sum of a's over the very tokens it spans, never a difference of running sums: it is ≤ 0, nothing
overflows at any decay, no precision goes with length, and a document's numbers and gradients hold none of another's.

Differentiated by autograd. Kept for the backward, a head: three [chunk, chunk] matrices a chunk in fp32 (the decays,
C·B, their product; C·B a group), so 3·chunk numbers a token, and two states a chunk. All products are in fp32, which
costs a GPU its 16-bit tensor cores: there is no kernel here. Nothing of gates, convolutions or discretisation either.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sisa_dist.config import UserError
from sisa_dist.ops.precision import exp_, no_autocast, work_dtype


def ssd(
    x: Tensor,
    log_decay: Tensor,
    B: Tensor,
    C: Tensor,
    weight: Tensor,
    *,
    diagonal: Tensor | None = None,
    rank: int = 1,
    chunk: int = 64,
    doc_ids: Tensor | None = None,
    state: Tensor | Callable[[Tensor, Tensor], Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """The sum above for T tokens, and the state after the last.

    x `[B, H, T·rank, P]`; log_decay (a, ≤ 0) and weight (w) `[B, H, T]`; B, C `[B, G, T·rank, N]`, where G divides H
    and head h reads group h // (H / G). The `rank` rows of a token are as many inputs into, and outputs of, one state,
    all with the token's a and w. `diagonal` `[B, H, T]`: w_i of the term j = i alone, where it is not what later tokens
    see. `doc_ids` `[B, T]`, non-decreasing: the state is empty at a document's start; `state` `[B, H, N, P]`, from
    before the first token, belongs to the first document. Where it is known only once others know what these tokens
    leave, `state` is a function: of the state after them from an empty one, and of what one from before keeps until
    then, `[B, H, 1, 1]`, to the state before them. Gradients pass through all of these. Any T ≥ 1.

    Returns y `[B, H, T·rank, P]` in x's dtype and the last document's state `[B, H, N, P]` in fp32 (fp64 for fp64).
    Raises UserError for shapes that do not fit.
    """
    H, T = log_decay.shape[1:]
    _check(x, log_decay, B, C, weight, rank)
    work, length = work_dtype(x.dtype), min(chunk, T)
    with no_autocast(x.device):
        groups = (B.shape[1], H // B.shape[1])
        # Legend: b batch, g group, h head of the group, c chunk, l row of the chunk (token · rank), n state, p channel.
        x_bghclp = _chunks(x, length * rank, work).unflatten(1, groups)
        B_bgcln, C_bgcln = _chunks(B, length * rank, work), _chunks(C, length * rank, work)
        a_bghct, w_bghct = (_chunks(z, length, work).unflatten(1, groups) for z in (log_decay, weight))
        doc_bct = None if doc_ids is None else _document_chunks(doc_ids, length)
        inside, enter_bghct, leave_bghct = _decays(a_bghct, doc_bct, strict=diagonal is not None)

        wx_bghclp = x_bghclp * _rows(w_bghct, rank)
        CB_bgcll = C_bgcln @ B_bgcln.mT
        if rank > 1:
            inside = inside.repeat_interleave(rank, -1).repeat_interleave(rank, -2)
        y_bghclp = (CB_bgcll[:, :, None] * inside) @ wx_bghclp

        new_bghcnp = torch.einsum("bgcln,bghclp->bghcnp", B_bgcln, wx_bghclp * _rows(leave_bghct, rank))
        if callable(state):
            _, left_bghnp = _pass_on(new_bghcnp, enter_bghct[..., -1], None)
            state = state(left_bghnp.flatten(1, 2), _kept(log_decay, doc_ids, work))
        before_bghcnp, after_bghnp = _pass_on(new_bghcnp, enter_bghct[..., -1], state)
        if before_bghcnp is not None:
            carried_bghclp = torch.einsum("bgcln,bghcnp->bghclp", C_bgcln, before_bghcnp)
            y_bghclp = y_bghclp + carried_bghclp * _rows(enter_bghct, rank)
        if diagonal is not None:
            d_bghct = _chunks(diagonal, length, work).unflatten(1, groups)
            y_bghclp = y_bghclp + _own_term(x_bghclp, CB_bgcll, d_bghct, rank)
        y = y_bghclp.flatten(1, 2).flatten(2, 3)[:, :, : T * rank]
        return y.to(x.dtype), after_bghnp.flatten(1, 2)


@torch.no_grad()
def ssd_step(
    x: Tensor, log_decay: Tensor, B: Tensor, C: Tensor, weight: Tensor, *, state: Tensor, rank: int = 1
) -> tuple[Tensor, Tensor]:
    """`ssd` of one token by the recurrence itself. Shapes as there with T = 1, `state` `[B, H, N, P]`; no gradients."""
    _check(x, log_decay, B, C, weight, rank)
    work = work_dtype(x.dtype)
    with no_autocast(x.device):
        groups = (B.shape[1], x.shape[1] // B.shape[1])
        wx_bghrp = (x.to(work) * weight.to(work)[..., None]).unflatten(1, groups)
        new_bghnp = torch.einsum("bgrn,bghrp->bghnp", B.to(work), wx_bghrp)
        after = state * log_decay.to(work).exp()[..., None] + new_bghnp.flatten(1, 2)
        y_bghrp = torch.einsum("bgrn,bghnp->bghrp", C.to(work), after.unflatten(1, groups))
        return y_bghrp.flatten(1, 2).to(x.dtype), after


class _Exp(torch.autograd.Function):
    """e^x in place, for x ≤ 0, at a cost that does not depend on x (`precision.exp_`)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.mark_dirty(x)
        ctx.save_for_backward(exp_(x))
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        (value,) = ctx.saved_tensors
        return grad * value


def _decays(a_bghct: Tensor, doc_bct: Tensor | None, *, strict: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Within each chunk of t tokens: e^{a_{j+1}+…+a_i} [b, g, h, c, t, t] of query i and key j, 0 where j > i
    (`strict`: j ≥ i) or of another document; what a state from before keeps by token i; what key j keeps by the end."""
    length = a_bghct.shape[-1]
    later_tt = torch.ones(length, length, dtype=torch.bool, device=a_bghct.device).tril(-1)
    # Entry (i, j) is a_i where i > j; summed downwards from j + 1 to i.
    sums_bghctt = a_bghct[..., None].masked_fill(~later_tt, 0.0).cumsum(-2)
    hidden = ~(later_tt if strict else later_tt | later_tt.new_ones(length).diag())
    from_start, to_end = a_bghct.cumsum(-1), sums_bghctt[..., -1, :]
    if doc_bct is None:
        return _Exp.apply(sums_bghctt.masked_fill(hidden, -torch.inf)), *(
            _Exp.apply(z.clone()) for z in (from_start, to_end)
        )
    doc_bct = doc_bct[:, None, None]
    other_tt = doc_bct[..., :, None] != doc_bct[..., None, :]
    # What comes in is the document of the previous chunk's last token; into the first chunk, that of its own first.
    coming_in = torch.cat((doc_bct[..., :1, :1], doc_bct[..., :-1, -1:]), dim=-2)
    return (
        _Exp.apply(sums_bghctt.masked_fill(hidden | other_tt, -torch.inf)),
        _Exp.apply(from_start.masked_fill(doc_bct != coming_in, -torch.inf)),
        _Exp.apply(to_end.masked_fill(doc_bct != doc_bct[..., -1:], -torch.inf)),
    )


def _pass_on(new_bghcnp: Tensor, keep_bghc: Tensor, state: Tensor | None) -> tuple[Tensor | None, Tensor]:
    """The state before each chunk, None where all are empty; and the one after the last."""
    new = new_bghcnp.unbind(3)
    if state is None and len(new) == 1:
        return None, new[0]
    now = torch.zeros_like(new[0]) if state is None else state.to(new[0].dtype).unflatten(1, new[0].shape[1:3])
    before = []
    for kept_bgh, added in zip(keep_bghc.unbind(-1), new, strict=True):
        before.append(now)
        now = now * kept_bgh[..., None, None] + added
    return torch.stack(before, dim=3), now


def _kept(log_decay_BHT: Tensor, doc_ids_BT: Tensor | None, work: torch.dtype) -> Tensor:
    """What a state from before the first token keeps of itself until behind the last: `[B, H, 1, 1]`."""
    total_BH = log_decay_BHT.to(work).sum(2)
    if doc_ids_BT is not None:
        total_BH = total_BH.masked_fill((doc_ids_BT[:, 0] != doc_ids_BT[:, -1])[:, None], -torch.inf)
    return total_BH.exp()[..., None, None]


def _own_term(x_bghclp: Tensor, CB_bgcll: Tensor, d_bghct: Tensor, rank: int) -> Tensor:
    """d_i (C_i·B_i) x_i; with several rows a token d_i Σ_s (C_i^r·B_i^s) x_i^s."""
    if rank == 1:  # read off the products there are: a second C ∘ B and its backward cost as much as all of the decays
        return (CB_bgcll.diagonal(dim1=-2, dim2=-1)[:, :, None] * d_bghct)[..., None] * x_bghclp
    CB_bgctrtr = CB_bgcll.unflatten(-1, (-1, rank)).unflatten(-3, (-1, rank))
    own_bgctrr = CB_bgctrtr.diagonal(dim1=-4, dim2=-2).movedim(-1, -3)
    own_bghctrr = own_bgctrr[:, :, None] * d_bghct[..., None, None]
    return (own_bghctrr @ x_bghclp.unflatten(-2, (-1, rank))).flatten(-3, -2)


def _chunks(z: Tensor, rows: int, work: torch.dtype) -> Tensor:
    """`[B, H, T, ...]` → `[B, H, chunks, rows, ...]`, filled up with zeros: tokens that neither decay nor add."""
    missing = -z.shape[2] % rows
    # Padding by nothing copies too.
    z = F.pad(z.to(work), (0, 0) * (z.ndim - 3) + (0, missing)) if missing else z.to(work).contiguous()
    return z.unflatten(2, (-1, rows))


def _document_chunks(doc_ids_BT: Tensor, length: int) -> Tensor:
    missing = -doc_ids_BT.shape[1] % length
    last_B1 = doc_ids_BT[:, -1:].expand(-1, missing)
    return torch.cat((doc_ids_BT, last_B1), dim=1).unflatten(1, (-1, length))


def _rows(z_bghct: Tensor, rank: int) -> Tensor:
    """A number a token → one a row, with a last dimension to broadcast over channels."""
    return (z_bghct if rank == 1 else z_bghct.repeat_interleave(rank, -1))[..., None]


def _check(x: Tensor, log_decay: Tensor, B: Tensor, C: Tensor, weight: Tensor, rank: int) -> None:
    batch, H, T = log_decay.shape
    fits = weight.shape == log_decay.shape and x.shape[:3] == (batch, H, T * rank) and B.shape == C.shape
    if not fits or B.shape[0] != batch or B.shape[2] != T * rank or H % B.shape[1]:
        raise UserError(
            f"ssd: x {tuple(x.shape)}, log_decay {tuple(log_decay.shape)}, weight {tuple(weight.shape)}, B "
            f"{tuple(B.shape)} and C {tuple(C.shape)} do not fit at rank {rank}: heads must be a multiple of groups"
        )
