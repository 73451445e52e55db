"""Forgetting attention (Lin et al. 2025, arXiv 2503.02130), exact at any length and decay, as one operator.

    s_ij = q_i·k_j·scale + L_i − L_j,    L_t = Σ_{k≤t} log f_k,    y_i = Σ_j softmax_{j≤i}(s_ij) v_j

It is cut as bisect.py cuts SISA: leaves on the diagonal, dense, with the bias element by element; then at each level
odd spans against the whole even span before them, merged by log-sum-exp. Within a level the bias splits at c, L at the
even span's end: c − L_j ≤ 0 rides as further channels of k̂ against ones in q̂, and L_i − c ≤ 0, the same for a whole
row, is added to the row's lse afterwards. Neither is a difference of long sums, so nothing cancels: with one c for the
whole sequence bf16 is off by 0.1 at L = −52 and by 0.8 at −250.

A row's softmax does not see what is added to the whole row, so the gradient of L comes from the keys' side alone.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from sisa_dist.config import UserError
from sisa_dist.ops.backends import Rows, attend, attend_backward, check_name
from sisa_dist.ops.bisect import EXCLUDED, LEAF
from sisa_dist.ops.documents import Segments, crossing, mask_value, suffix_sums
from sisa_dist.ops.leaf import span_sums
from sisa_dist.ops.operands import Buffers, Shape
from sisa_dist.ops.precision import exp_, no_autocast, widen, work_dtype
from sisa_dist.ops.products import (
    chunks,
    fold_heads,
    scaled_bmm,
    score_gradient,
    softmax_product_,
    unfold_heads,
)
from sisa_dist.ops.spans import Level, decay_sums, levels

# Channels of k̂ over which the bias of a query head is dealt out, where one holds 8 or 11 bits: with two, a bias of 100
# nats that content stands against is right to a thousandth of a nat; with one, to 0.2.
PARTS_16_BIT = 2


def forgetting_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_f: Tensor,
    *,
    scale: float | None = None,
    doc_ids: Tensor | None = None,
    leaf: int | None = None,
    backend: str = "auto",
) -> Tensor:
    """Causal attention with a forget gate; the formula is above.

    q `[B, H, T, d]`, k `[B, H_kv, T, d]`, v `[B, H_kv, T, d_v]`, one floating dtype; H_kv divides H, and query head h
    reads kv head h // (H / H_kv). log_f `[B, H, T]`, nats per token, ≤ 0, may be wider. `scale` defaults to 1/√d.
    `doc_ids` `[B, T]`, integer and non-decreasing along T: a token sees only its own document. `leaf`: tokens of a
    diagonal block; `backend`: one of `ops.backends.NAMES`, for the rectangles beside them.

    Returns `[B, H, T, d_v]` in q's dtype. Raises UserError for shapes that do not fit and for a backend that cannot
    serve them here.
    """
    if q.ndim != 4 or k.ndim != 4 or v.ndim != 4 or k.shape[:3] != v.shape[:3] or q.shape[::3] != k.shape[::3]:
        raise UserError(f"forgetting: q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)} do not fit")
    if q.shape[2] != k.shape[2] or q.shape[1] % k.shape[1] or log_f.shape != q.shape[:3]:
        raise UserError(
            f"forgetting: q {tuple(q.shape)}, k {tuple(k.shape)} and log_f {tuple(log_f.shape)} need one T, H_kv must "
            "divide H, and every query head has its own log_f"
        )
    if doc_ids is not None and doc_ids.shape != (q.shape[0], q.shape[2]):
        raise UserError(f"forgetting: doc_ids {tuple(doc_ids.shape)} must be [B, T] = {[q.shape[0], q.shape[2]]}")
    check_name(backend, q.device)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    leaf = min(LEAF if leaf is None else leaf, q.shape[2])
    with no_autocast(q.device):
        return _forgetting(q, k, v, log_f, doc_ids, scale, leaf, backend)[0]


class _Rectangle(NamedTuple):
    q: Tensor
    k: Tensor
    v: Tensor
    rise: Tensor  # L_i − c `[M, num, rows]`, nats
    outside: Tensor | None  # bool `[M, num, rows]`: queries no document crosses to


class _Operands(Buffers):
    """q̂ = [q ; 1 where the query head's bias stands], k̂ = [k ; (c − L_j)/scale of each query head of the group]."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        L: Tensor,
        doc_ids: Tensor | None,
        *,
        leaf: int,
        scale: float,
        backend: str,
    ) -> None:
        batch, heads, tokens, d_h = q.shape
        group = heads // k.shape[1]
        self.parts = PARTS_16_BIT if q.dtype.itemsize == 2 else 1
        more = group * self.parts
        shape = Shape(batch, heads, k.shape[1], tokens, leaf, d_h, v.shape[-1], more, masked=False)
        super().__init__(q, k, v, doc_ids, shape, backend=backend)
        self.scale, self.L = scale, self.hold(L)
        self.bias = slice(d_h, d_h + more)
        own = torch.eye(group, dtype=q.dtype, device=q.device).repeat_interleave(self.parts, 1)  # [group, more]
        self.q.view(batch * k.shape[1], group, -1, shape.width)[..., self.bias] = own[:, None]

    def rectangle(self, level: Level) -> _Rectangle:
        """The level re-based to its even spans' ends; overwrites the one before it."""
        work, even_k = work_dtype(self.q.dtype), level.even(self.k)
        end = level.even(self.L)[:, :, -1:]
        lowest = mask_value(self.scale, self.q.dtype)  # at which a key has no weight, and which fp16 can hold
        bias = ((end - level.even(self.L)) / self.scale).clamp_(min=lowest).to(work)  # [M, num, span]
        bias = bias.unflatten(0, (-1, self.shape.group)).movedim(1, -1)  # [N, num, span, group]
        outside = None
        if self.doc_q is not None and self.doc_k is not None:
            across = crossing(self.doc_q, self.doc_k, level)
            bias = bias.masked_fill(~across.keys[..., None], lowest)
            outside = ~across.rows
        slots = even_k[..., self.bias].unflatten(-1, (self.shape.group, self.parts))
        for part in range(self.parts):
            slots[..., part] = bias
            bias = bias - slots[..., part]
        return _Rectangle(level.odd(self.q), even_k, level.even(self.v), (level.odd(self.L) - end).to(work), outside)

    def of_bias(self, dk_hat: Tensor) -> Tensor:
        """Σ_i ds_ij `[M, num, span]` from the gradient of k̂: every part of a bias has the same."""
        return dk_hat[..., self.bias][..., :: self.parts].movedim(-1, 1).flatten(0, 1) / self.scale

    def leaves(self) -> _Leaves:
        N, group, d_h = self.k.shape[0], self.shape.group, self.shape.d_h
        q, k, v = (
            widen(fold_heads(self.in_leaves(x), N))
            for x in (self.q[..., :d_h], self.k[..., :d_h], self.v[..., : self.shape.d_v])
        )
        L = self.in_leaves(self.L).unflatten(0, (N, group)).transpose(1, 2).flatten(0, 1)
        return _Leaves(q, k, v, L, self.hidden())


class _Leaves(NamedTuple):
    """The diagonal blocks: q `[N·n, group·leaf, d_h]`, k, v `[N·n, leaf, ·]`, L `[N·n, group, leaf]` fp64."""

    q: Tensor
    k: Tensor
    v: Tensor
    L: Tensor
    hidden: Tensor  # bool, `[leaf, leaf]` or `[N·n, leaf, leaf]`

    def chunks(self) -> Any:
        return chunks(self.q.shape[0], self.q.shape[1] * self.k.shape[1], self.q.device)

    def scores(self, c: slice, *, scale: float) -> Tensor:
        """`[·, group·leaf, leaf]`, −inf where hidden."""
        bias = span_sums(self.L[c].flatten(0, 1), self.q.dtype).unflatten(0, (-1, self.L.shape[1]))
        hidden = self.hidden if self.hidden.ndim == 2 else self.hidden[c][:, None]
        score = bias.masked_fill_(hidden, float("-inf")).flatten(1, 2)
        return score.baddbmm_(self.q[c], self.k[c].mT, beta=1, alpha=scale)

    def forward(self, *, scale: float) -> tuple[Tensor, Tensor]:
        """out and lse in the folded layout."""
        q, v = self.q, self.v
        out, lse = q.new_empty(*q.shape[:2], v.shape[-1]), q.new_empty(*q.shape[:2], 1)
        for c in self.chunks():
            softmax_product_(self.scores(c, scale=scale), v[c], out=out[c], lse=lse[c])
        return out, lse

    def backward(
        self, dout: Tensor, lse: Tensor, delta: Tensor, *, scale: float
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Gradients of q, k, v in the folded layout, and Σ_i ds_ij `[N·n, group, leaf]`."""
        dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (self.q, self.k, self.v))
        of_bias = torch.empty_like(self.L, dtype=dq.dtype)
        for c in self.chunks():
            prob = exp_(self.scores(c, scale=scale).sub_(lse[c]))
            torch.bmm(prob.mT, dout[c], out=dv[c])
            dscore = score_gradient(prob, dout[c], self.v[c], delta[c])
            scaled_bmm(dscore, self.k[c], scale, out=dq[c])
            scaled_bmm(dscore.mT, self.q[c], scale, out=dk[c])
            of_bias[c] = dscore.unflatten(1, (self.L.shape[1], -1)).sum(2)
        return dq, dk, dv, of_bias


@torch.library.custom_op(
    "sisa_dist::forgetting",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, Tensor log_f, Tensor? doc_ids, float scale, int leaf, str backend) -> "
    "(Tensor out, Tensor lse, Tensor L)",
)
def _forgetting(q, k, v, log_f, doc_ids, scale, leaf, backend):  # type: ignore[no-untyped-def]
    """out [B,H,T,d_v]; for the backward lse [B,H,T] and L [B,H,T] fp64."""
    work = work_dtype(q.dtype)
    with no_autocast(q.device):
        L = decay_sums(log_f, work=work)
        ops = _Operands(q, k, v, L, doc_ids, leaf=leaf, scale=scale, backend=backend)
        shape, M, N = ops.shape, ops.q.shape[0], ops.k.shape[0]
        out, lse = (unfold_heads(x, N, M).flatten(1, 2) for x in ops.leaves().forward(scale=scale))
        lse = lse[..., 0]
        for level in levels(shape.padded, leaf):
            rect = ops.rectangle(level)
            far_out, far_lse = attend(rect.q, rect.k, rect.v, d_v=shape.d_v, scale=scale, backend=backend)
            far_lse = far_lse.to(work) + rect.rise
            if rect.outside is not None:
                far_lse = far_lse.masked_fill(rect.outside, float("-inf"))
            near_lse = level.odd(lse)
            share = torch.sigmoid(far_lse - near_lse)[..., None]
            level.odd(out).lerp_(far_out[..., : shape.d_v].to(work), share)
            near_lse.copy_(torch.logaddexp(near_lse, far_lse))
    out, lse = (x.unflatten(0, (shape.batch, shape.heads))[:, :, : shape.tokens] for x in (out, lse))
    return out.to(q.dtype).contiguous(), lse.contiguous(), L


@_forgetting.register_fake
def _forgetting_fake(q, k, v, log_f, doc_ids, scale, leaf, backend):  # type: ignore[no-untyped-def]
    return (
        q.new_empty(*q.shape[:3], v.shape[-1]),
        q.new_empty(q.shape[:3], dtype=work_dtype(q.dtype)),
        torch.empty_like(log_f, dtype=torch.float64, memory_format=torch.contiguous_format),
    )


@torch.library.custom_op(
    "sisa_dist::forgetting_backward",
    mutates_args=(),
    schema="(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor? doc_ids, Tensor out, Tensor lse, Tensor L, "
    "float scale, int leaf, str backend) -> (Tensor dq, Tensor dk, Tensor dv, Tensor dlog_f)",
)
def _forgetting_backward(dout, q, k, v, doc_ids, out, lse, L, scale, leaf, backend):  # type: ignore[no-untyped-def]
    """Gradients in the dtypes of q, k, v; of log f in fp32 (fp64 where q is)."""
    work = work_dtype(q.dtype)
    with no_autocast(q.device):
        ops = _Operands(q, k, v, L, doc_ids, leaf=leaf, scale=scale, backend=backend)
        shape, M, N = ops.shape, ops.q.shape[0], ops.k.shape[0]
        d_h, d_v = shape.d_h, shape.d_v
        dout, out = ops.like_v(dout), ops.like_v(out)
        lse = ops.spread(lse[..., None])[..., 0]
        delta = (dout[..., :d_v].to(work) * out[..., :d_v]).sum(-1)
        near = (dout[..., :d_v], lse[..., None], delta[..., None])
        folded = (widen(fold_heads(ops.in_leaves(x), N)) for x in near)
        dq, dk, dv, of_bias = ops.leaves().backward(*folded, scale=scale)
        dq = unfold_heads(dq, N, M).flatten(1, 2)
        dk, dv = (x.unflatten(0, (N, -1)).flatten(1, 2) for x in (dk, dv))
        of_bias = of_bias.unflatten(0, (N, -1)).transpose(1, 2).flatten(2, 3).flatten(0, 1)  # [M, padded]
        for level in levels(shape.padded, leaf):
            rect = ops.rectangle(level)
            row_lse = level.odd(lse) - rect.rise  # what the kernel forms is the score less the row's own bias
            if rect.outside is not None:
                row_lse = row_lse.masked_fill(rect.outside, EXCLUDED)
            of_rows = Rows(level.odd(dout), level.odd(out), row_lse, level.odd(delta))
            far = attend_backward(of_rows, rect.q, rect.k, rect.v, d_v=d_v, scale=scale, backend=backend)
            level.odd(dq).add_(far.q[..., :d_h])
            level.even(dk).add_(far.k[..., :d_h])
            level.even(dv).add_(far.v[..., :d_v])
            level.even(of_bias).add_(ops.of_bias(far.k))
        dq, dk, dv, of_bias = (x.unflatten(0, (shape.batch, -1))[:, :, : shape.tokens] for x in (dq, dk, dv, of_bias))
        dlog_f = suffix_sums(-of_bias, None if doc_ids is None else Segments.of(doc_ids))
    grads = [x.to(like.dtype).contiguous() for x, like in zip((dq, dk, dv), (q, k, v), strict=True)]
    return *grads, dlog_f.to(work).contiguous()


@_forgetting_backward.register_fake
def _forgetting_backward_fake(dout, q, k, v, doc_ids, out, lse, L, scale, leaf, backend):  # type: ignore[no-untyped-def]
    grads = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v)]
    return *grads, torch.empty_like(L, dtype=work_dtype(q.dtype))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, log_f, doc_ids, *rest = inputs
    out, lse, L = output
    ctx.save_for_backward(q, k, v, doc_ids, out, lse, L)
    ctx.mark_non_differentiable(lse, L)
    ctx.set_materialize_grads(False)
    ctx.rest, ctx.gate_dtype = rest, log_f.dtype


def _autograd(ctx: Any, dout: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if dout is None:
        return (None,) * 8
    *grads, dlog_f = _forgetting_backward(dout, *ctx.saved_tensors, *ctx.rest)
    return *grads, dlog_f.to(ctx.gate_dtype), None, None, None, None


_forgetting.register_autograd(_autograd, setup_context=_setup_context)


@register_flop_formula(torch.ops.sisa_dist.forgetting)
def _flops(q_shape: Any, k_shape: Any, v_shape: Any, *_: Any, **__: Any) -> int:
    """Two products over the T(T+1)/2 visible pairs. Multiply and add count as two, as in torch's formulas."""
    batch, heads, T, d = q_shape
    return batch * heads * T * (T + 1) * (d + v_shape[-1])


@register_flop_formula(torch.ops.sisa_dist.forgetting_backward)
def _flops_backward(_: Any, q_shape: Any, k_shape: Any, v_shape: Any, *__: Any, **___: Any) -> int:
    """Five products: the scores again, dV and dP over d_v, dQ and dK over d."""
    batch, heads, T, d = q_shape
    return batch * heads * T * (T + 1) * (3 * d + 2 * v_shape[-1])
