"""Bisected SISA: exact at any length and any decay, on flash kernels, as one operator.

The score's e^{g_i−g_j} is split at a reference c into a query and a key factor. One c for the whole sequence
overflows; here every (query span, key span) has its own, between them, so both factors are ≤ 1: leaves on the
diagonal (leaf.py), then at each level the odd spans' queries against the whole even span before them, merged by
log-sum-exp. The total work is T²/2, as causal attention's. The backward gives each level's kernel the *global* out
and lse, as ring attention does, and rebuilds q̂ and k̂, so only inputs, out, lse and the running sums are kept.

It is a `torch.library.custom_op`, so that compile, selective checkpointing and FLOP counters see one node; its double
backward is not implemented and raises. The path is chosen elsewhere (score.py).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from sisa_dist.ops.backends import Rows, attend, attend_backward
from sisa_dist.ops.documents import Segments, suffix_sums
from sisa_dist.ops.leaf import leaf_backward, leaf_forward
from sisa_dist.ops.operands import Operands, Shape
from sisa_dist.ops.precision import no_autocast, work_dtype
from sisa_dist.ops.spans import as_complex, as_real, decay_sums, phase_turns, turn

EXCLUDED = 1e30  # lse of a row outside the crossing document: its probabilities are then exactly 0 in the backward


# Tokens of a diagonal block where the caller names none. Measured forward + backward, fp32, H 4, d_h 64, d_s 32, one
# core of a Sapphire Rapids Xeon that others were using too: best of 15 runs (7 at 4096), CPU-ms; ± 10 %.
#     batch × T     leaf 32   64    128    one call   plain attention
#     8 × 512            69   65     80         94                 48
#     2 × 2048          191  190    180        184                113
#     1 × 4096          324  323    333        329                207
# A dense leaf pays for its masked half, a smaller one for one more level of small products: the minimum is flat.
LEAF = 64


def sisa_bisected(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    C: Tensor,
    B: Tensor,
    log_alpha: Tensor,
    theta: Tensor,
    lam: Tensor,
    *,
    scale: float,
    doc_ids_BT: Tensor | None,
    leaf: int | None,
    backend: str = "auto",
    erase: bool = False,
) -> Tensor:
    """Shapes as `sisa_attention`, already checked; returns [B, H, T, d_v] in q's dtype. `erase`: see Operands."""
    leaf = min(LEAF if leaf is None else leaf, q.shape[2])
    return _bisected(q, k, v, C, B, log_alpha, theta, lam, doc_ids_BT, scale, leaf, backend, erase)[0]


def _shape(q: Tensor, k: Tensor, v: Tensor, C: Tensor, doc_ids: Tensor | None, leaf: int) -> Shape:
    batch, heads, tokens, d_h = q.shape
    return Shape(batch, heads, k.shape[1], tokens, leaf, d_h, v.shape[-1], C.shape[-1], doc_ids is not None)


@torch.library.custom_op(
    "sisa_dist::bisected",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, Tensor C, Tensor B, Tensor log_alpha, Tensor theta, Tensor lam, "
    "Tensor? doc_ids, float scale, int leaf, str backend='auto', bool erase=False) -> "
    "(Tensor out, Tensor lse, Tensor g, Tensor turns)",
)
def _bisected(q, k, v, C, B, log_alpha, theta, lam, doc_ids, scale, leaf, backend="auto", erase=False):  # type: ignore[no-untyped-def]
    """out [B,H,T,d_v]; for the backward lse [B,H,T], g [B,H_kv,T] fp64 and the phase in turns [B,H_kv,T,d_s/2]."""
    shape, work = _shape(q, k, v, C, doc_ids, leaf), work_dtype(q.dtype)
    with no_autocast(q.device):
        g = decay_sums(log_alpha, work=work)
        turns = phase_turns(theta, None if doc_ids is None else Segments.of(doc_ids).first, work=work)
        weight, options = lam.to(work) / scale, {"scale": scale, "backend": backend, "erase": erase}
        ops = Operands(q, k, v, C, B, g, turn(turns), weight, doc_ids, shape, **options)
        out, lse = leaf_forward(ops.leaves(), scale=scale)
        out, lse = out.flatten(1, 2), lse.flatten(1, 2)
        for level in ops.levels:
            rect = ops.rectangle(level)
            far_out, far_lse = attend(rect.q, rect.k, rect.v, d_v=shape.d_v, scale=scale, backend=backend)
            far_lse = far_lse.to(work)
            if rect.outside is not None:
                far_lse = far_lse.masked_fill(rect.outside, float("-inf"))
            near_lse = level.odd(lse)
            share = torch.sigmoid(far_lse - near_lse)[..., None]
            level.odd(out).lerp_(far_out[..., : shape.d_v].to(work), share)
            near_lse.copy_(torch.logaddexp(near_lse, far_lse))
    out, lse = (x.unflatten(0, (shape.batch, shape.heads))[:, :, : shape.tokens] for x in (out, lse))
    return out.to(q.dtype).contiguous(), lse.contiguous(), g, turns


bisected_forward = _bisected  # with lse, for who merges it with other keys of the same rows


@_bisected.register_fake
def _bisected_fake(q, k, v, C, B, log_alpha, theta, lam, doc_ids, scale, leaf, backend="auto", erase=False):  # type: ignore[no-untyped-def]
    work = work_dtype(q.dtype)
    return (
        q.new_empty(*q.shape[:3], v.shape[-1]),
        q.new_empty(q.shape[:3], dtype=work),
        torch.empty_like(log_alpha, dtype=torch.float64, memory_format=torch.contiguous_format),
        torch.empty_like(theta, dtype=work, memory_format=torch.contiguous_format),
    )


@torch.library.custom_op(
    "sisa_dist::bisected_backward",
    mutates_args=(),
    schema="(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor C, Tensor B, Tensor lam, Tensor? doc_ids, Tensor out, "
    "Tensor lse, Tensor g, Tensor turns, float scale, int leaf, str backend='auto', bool erase=False) -> "
    "(Tensor dq, Tensor dk, Tensor dv, Tensor dC, Tensor dB, Tensor dlog_alpha, Tensor dtheta, Tensor dlam)",
)
def _bisected_backward(  # type: ignore[no-untyped-def]
    dout, q, k, v, C, B, lam, doc_ids, out, lse, g, turns, scale, leaf, backend="auto", erase=False
):
    """Gradients in the dtypes of q, k, v, C, B; of log α, θ and λ in fp32 (fp64 where q is)."""
    shape, work = _shape(q, k, v, C, doc_ids, leaf), work_dtype(q.dtype)
    T, d_h, d_v = shape.tokens, shape.d_h, shape.d_v
    with no_autocast(q.device):
        unit, weight = turn(turns), lam.to(work) / scale
        options = {"scale": scale, "backend": backend, "erase": erase}
        ops = Operands(q, k, v, C, B, g, unit, weight, doc_ids, shape, **options)
        dout, out = ops.like_v(dout), ops.like_v(out)
        lse = ops.spread(lse[..., None])[..., 0]
        delta = (dout[..., :d_v].to(work) * out[..., :d_v]).sum(-1)
        near = [ops.in_leaves(x) for x in (dout[..., :d_v], lse, delta)]
        at_leaves = leaf_backward(near[0], ops.leaves(), near[1], near[2], scale=scale)
        dq, dk, dv, dC, dB = (x.flatten(1, 2) for x in at_leaves)
        for level in ops.levels:
            rect = ops.rectangle(level)
            row_lse = level.odd(lse)
            if rect.outside is not None:
                row_lse = row_lse.masked_fill(rect.outside, EXCLUDED)
            of_rows = Rows(level.odd(dout), level.odd(out), row_lse, level.odd(delta))
            far = attend_backward(of_rows, rect.q, rect.k, rect.v, d_v=d_v, scale=scale, backend=backend)
            level.odd(dq).add_(far.q[..., :d_h])
            level.even(dk).add_(far.k[..., :d_h])
            level.even(dv).add_(far.v[..., :d_v])
            level.odd(dC).addcmul_(far.q[..., ops.ssm], rect.rise)
            level.even(dB).addcmul_(far.k[..., ops.ssm], rect.fall)

        def cut(x: Tensor) -> Tensor:
            return x.unflatten(0, (shape.batch, -1))[:, :, :T]

        dq, dk, dv, dC, dB = (cut(x) for x in (dq, dk, dv, dC, dB))
        dC, dB, dlog_alpha, dtheta, dlam = through_rotation(
            dC, dB, C.to(work), B.to(work), unit, lam.to(work), doc_ids, scale=scale
        )
    grads = [x.to(like.dtype).contiguous() for x, like in zip((dq, dk, dv, dC, dB), (q, k, v, C, B), strict=True)]
    return *grads, dlog_alpha.to(work).contiguous(), dtheta.to(work).contiguous(), dlam


bisected_gradients = _bisected_backward  # of the rows' whole softmax, which may have more keys than these


def through_rotation(
    dC: Tensor, dB: Tensor, C: Tensor, B: Tensor, unit: Tensor, lam: Tensor, doc_ids: Tensor | None, *, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """From the gradients of C̃ = (λ/scale) e^g R(Φ) C and B̃ = e^−g R(Φ) B to those of C, B, log α, θ and λ: g's and Φ's
    are summed over what follows."""
    dC, dB, dg, dphase, dlam = turned_back(dC, dB, C, B, unit, lam, scale=scale)
    segments = None if doc_ids is None else Segments.of(doc_ids)
    return dC, dB, suffix_sums(dg, segments), suffix_sums(dphase, segments), dlam


def turned_back(
    dC: Tensor, dB: Tensor, C: Tensor, B: Tensor, unit: Tensor, lam: Tensor, *, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As `through_rotation`, but to the gradients of C, B, g, Φ and λ.

    As complex pairs, d/dΦ and d/dg of C̃ both come from the one product dC̃·conj(C̃): its real part summed over pairs
    is dg, its imaginary part dΦ.
    """
    group = C.shape[1] // B.shape[1]
    back = unit.conj_physical()
    dC_c, dB_c = as_complex(dC.contiguous()), as_complex(dB.contiguous())
    dC_c.unflatten(1, (-1, group)).mul_(back[:, :, None])
    dB_c.mul_(back)
    # conj_physical, never the lazy conj: below a dispatch mode (selective checkpointing, counters) its bit is ignored.
    of_C, of_B = (dz * as_complex(z.contiguous()).conj_physical() for dz, z in ((dC_c, C), (dB_c, B)))
    dC = as_real(dC_c).mul_((lam / scale)[:, None, None])

    decay_C = of_C.real.sum(-1)
    dlam = decay_C.sum((0, 2)) / scale
    decay_C, phase_C = decay_C * (lam / scale)[:, None], of_C.imag * (lam / scale)[:, None, None]
    if group > 1:
        decay_C, phase_C = (x.unflatten(1, (-1, group)).sum(2) for x in (decay_C, phase_C))
    return dC, as_real(dB_c), decay_C - of_B.real.sum(-1), phase_C.add_(of_B.imag), dlam


@_bisected_backward.register_fake
def _bisected_backward_fake(  # type: ignore[no-untyped-def]
    dout, q, k, v, C, B, lam, doc_ids, out, lse, g, turns, scale, leaf, backend="auto", erase=False
):
    work = work_dtype(q.dtype)
    grads = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v, C, B)]
    return *grads, *(torch.empty_like(x, dtype=work) for x in (g, turns, lam))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, C, B, log_alpha, theta, lam, doc_ids, scale, leaf, backend, erase = inputs
    out, lse, g, turns = output
    ctx.save_for_backward(q, k, v, C, B, lam, doc_ids, out, lse, g, turns)
    ctx.mark_non_differentiable(lse, g, turns)
    ctx.set_materialize_grads(False)
    ctx.rest = scale, leaf, backend, erase, log_alpha.dtype, theta.dtype, lam.dtype


def _autograd(ctx: Any, dout: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if dout is None:
        return (None,) * 13
    scale, leaf, backend, erase, *dtypes = ctx.rest
    *grads, dlog_alpha, dtheta, dlam = _bisected_backward(dout, *ctx.saved_tensors, scale, leaf, backend, erase)
    scalars = (x.to(dtype) for x, dtype in zip((dlog_alpha, dtheta, dlam), dtypes, strict=True))
    return *grads, *scalars, None, None, None, None, None


_bisected.register_autograd(_autograd, setup_context=_setup_context)


@register_flop_formula(torch.ops.sisa_dist.bisected)
def flops(q_shape: Any, k_shape: Any, v_shape: Any, C_shape: Any, *_: Any, **__: Any) -> int:
    """Two products over the T(T+1)/2 visible pairs. Multiply and add count as two, as in torch's formulas."""
    batch, heads, T, d_h = q_shape
    return batch * heads * T * (T + 1) * (d_h + C_shape[-1] + v_shape[-1])


@register_flop_formula(torch.ops.sisa_dist.bisected_backward)
def flops_backward(_: Any, q_shape: Any, k_shape: Any, v_shape: Any, C_shape: Any, *__: Any, **___: Any) -> int:
    """Five products: the scores again, dV and dP over d_v, dQ̂ and dK̂ over d_h + d_s."""
    batch, heads, T, d_h = q_shape
    return batch * heads * T * (T + 1) * (3 * (d_h + C_shape[-1]) + 2 * v_shape[-1])
