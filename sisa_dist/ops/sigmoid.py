"""SISA with a sigmoid in place of the softmax (SISA-2; sigmoid attention: Ramapuram et al. 2024, arXiv 2409.04431).

    y_i = Σ_{j≤i} σ(s_ij + b_i) v_j,   s SISA's score,   b_i = −log(tokens i sees, itself among them)

Rows are not normalised, so this is no softmax kernel's business: the spans are those of bisect.py, every rectangle is
batched products over tiles of the scores, and the levels simply add. Only inputs and running sums are kept for the
backward. Products are in fp32, fp64 for fp64 inputs: on a GPU much slower than the flash kernels of the softmax, which
this is compared with, not meant to replace.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from sisa_dist.ops.bisect import LEAF, flops, flops_backward, through_rotation
from sisa_dist.ops.documents import Segments, tokens_seen
from sisa_dist.ops.leaf import LeafGradients, Leaves, blocks_of, part, scores, scores_backward_
from sisa_dist.ops.operands import Operands, Rectangle, Shape
from sisa_dist.ops.precision import no_autocast, widen, work_dtype
from sisa_dist.ops.products import CPU_CHUNK, chunks, fold_heads, scaled_bmm, unfold_heads
from sisa_dist.ops.score import check_inputs
from sisa_dist.ops.spans import Level, decay_sums, phase_turns, turn

GPU_TILE = 1 << 27  # scores held at once off the CPU: 0.5 GB of fp32, twice that in the backward


def sigmoid_sisa_attention(
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
    leaf: int | None = None,
) -> Tensor:
    """Causal sigmoid attention over SISA's score; the formula is above.

    Inputs, documents and errors as in `sisa_attention`; `leaf`: tokens of a diagonal block. Exact at any length and
    decay. Returns `[B, H, T, d_v]` in q's dtype.
    """
    check_inputs(q, k, v, C, B, log_alpha, theta, lam, doc_ids, "auto", scale, None, leaf)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    leaf = min(LEAF if leaf is None else leaf, q.shape[2])
    with no_autocast(q.device):
        return _sigmoid(q, k, v, C, B, log_alpha, theta, lam, doc_ids, scale, leaf)[0]


def sigmoid_weights_(score: Tensor, seen: Tensor) -> Tensor:
    """σ(score − log seen) in place."""
    return score.sub_(seen.to(score.dtype).log()).sigmoid_()


class _Operands(Operands):
    """And b `[B·H, padded]` of the rows."""

    def __init__(
        self, inputs: tuple[Tensor, ...], g: Tensor, unit: Tensor, doc_ids: Tensor | None, *, scale: float, leaf: int
    ) -> None:
        q, k, v, C, B, lam = inputs
        batch, heads, tokens, d_h = q.shape
        shape = Shape(batch, heads, k.shape[1], tokens, leaf, d_h, v.shape[-1], C.shape[-1], masked=doc_ids is not None)
        lam_over_scale = lam.to(work_dtype(q.dtype)) / scale
        super().__init__(q, k, v, C, B, g, unit, lam_over_scale, doc_ids, shape, scale=scale, backend="products")
        seen_BT = tokens_seen(doc_ids, shape.tokens, device=q.device)
        b_BT = -seen_BT.to(work_dtype(q.dtype)).log()
        self.b = self.hold(b_BT[:, None].expand(shape.batch, shape.heads, -1))

    def blocks(self) -> tuple[Leaves, Tensor]:
        """The leaves, all blocks in one batch dimension, and b of their rows `[N·n, group·leaf, 1]`."""
        return blocks_of(self.leaves()), fold_heads(self.in_leaves(self.b)[..., None], self.k.shape[0])

    def far(self, level: Level) -> tuple[Rectangle, tuple[Tensor, Tensor, Tensor, Tensor]]:
        """The level's rectangle, and its q̂, k̂, v̂ and b folded; b is −∞ at rows outside the crossing document."""
        rect, b = self.rectangle(level), level.odd(self.b)
        if rect.outside is not None:
            b = b.masked_fill(rect.outside, float("-inf"))
        N, v = self.k.shape[0], rect.v[..., : self.shape.d_v]
        q_hat, k_hat, v_hat, b = (fold_heads(x, N) for x in (rect.q, rect.k, v, b[..., None]))
        return rect, (widen(q_hat), widen(k_hat), widen(v_hat), b)


def _tiles(q_hat: Tensor, k_hat: Tensor) -> Iterator[tuple[slice, slice]]:
    """Slices of the batch and of the rows to score one after the other."""
    (num, rows), keys = q_hat.shape[:2], k_hat.shape[1]
    held = CPU_CHUNK if q_hat.device.type == "cpu" else GPU_TILE
    high = max(1, min(rows, held // keys))
    wide = max(1, held // (high * keys))
    for start in range(0, num, wide):
        for row in range(0, rows, high):
            yield slice(start, min(start + wide, num)), slice(row, min(row + high, rows))


@torch.library.custom_op(
    "sisa_dist::sigmoid_sisa",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, Tensor C, Tensor B, Tensor log_alpha, Tensor theta, Tensor lam, "
    "Tensor? doc_ids, float scale, int leaf) -> (Tensor out, Tensor g, Tensor turns)",
)
def _sigmoid(q, k, v, C, B, log_alpha, theta, lam, doc_ids, scale, leaf):  # type: ignore[no-untyped-def]
    """out [B,H,T,d_v]; for the backward g [B,H_kv,T] fp64 and the phase in turns [B,H_kv,T,d_s/2]."""
    work = work_dtype(q.dtype)
    with no_autocast(q.device):
        g = decay_sums(log_alpha, work=work)
        turns = phase_turns(theta, None if doc_ids is None else Segments.of(doc_ids).first, work=work)
        ops = _Operands((q, k, v, C, B, lam), g, turn(turns), doc_ids, scale=scale, leaf=leaf)
        shape, M, N = ops.shape, ops.q.shape[0], ops.k.shape[0]
        blocks, b = ops.blocks()
        near = blocks.q.new_empty(*blocks.q.shape[:2], shape.d_v)
        for c in chunks(near.shape[0], near.shape[1] * leaf, q.device):
            weight = scores(part(blocks, c), scale=scale)[0].add_(b[c]).sigmoid_()
            torch.bmm(weight, blocks.v[c], out=near[c])
        out = unfold_heads(near, N, M).flatten(1, 2)
        for level in ops.levels:
            _, (q_hat, k_hat, v_hat, b) = ops.far(level)
            far = q_hat.new_empty(*q_hat.shape[:2], shape.d_v)
            for c, r in _tiles(q_hat, k_hat):
                weight = scaled_bmm(q_hat[c, r], k_hat[c].mT, scale).add_(b[c, r]).sigmoid_()
                far[c, r] = torch.bmm(weight, v_hat[c])
            level.odd(out).add_(unfold_heads(far, N, M))
    out = out.unflatten(0, (shape.batch, shape.heads))[:, :, : shape.tokens]
    return out.to(q.dtype).contiguous(), g, turns


@_sigmoid.register_fake
def _sigmoid_fake(q, k, v, C, B, log_alpha, theta, lam, doc_ids, scale, leaf):  # type: ignore[no-untyped-def]
    return (
        q.new_empty(*q.shape[:3], v.shape[-1]),
        torch.empty_like(log_alpha, dtype=torch.float64, memory_format=torch.contiguous_format),
        torch.empty_like(theta, dtype=work_dtype(q.dtype), memory_format=torch.contiguous_format),
    )


@torch.library.custom_op(
    "sisa_dist::sigmoid_sisa_backward",
    mutates_args=(),
    schema="(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor C, Tensor B, Tensor lam, Tensor? doc_ids, Tensor g, "
    "Tensor turns, float scale, int leaf) -> "
    "(Tensor dq, Tensor dk, Tensor dv, Tensor dC, Tensor dB, Tensor dlog_alpha, Tensor dtheta, Tensor dlam)",
)
def _sigmoid_backward(dout, q, k, v, C, B, lam, doc_ids, g, turns, scale, leaf):  # type: ignore[no-untyped-def]
    """Gradients in the dtypes of q, k, v, C, B; of log α, θ and λ in fp32 (fp64 where q is)."""
    work = work_dtype(q.dtype)
    with no_autocast(q.device):
        unit = turn(turns)
        ops = _Operands((q, k, v, C, B, lam), g, unit, doc_ids, scale=scale, leaf=leaf)
        shape, N = ops.shape, ops.k.shape[0]
        d_h, T = shape.d_h, shape.tokens
        dout = ops.spread(dout, dtype=work)
        dq, dk, dv, dC, dB = (x.flatten(1, 2) for x in _leaf_backward(ops, dout, scale=scale))
        for level in ops.levels:
            rect, (q_hat, k_hat, v_hat, b) = ops.far(level)
            far_dout = fold_heads(level.odd(dout), N)
            far_q = torch.empty_like(q_hat, memory_format=torch.contiguous_format)
            far_k, far_v = (torch.zeros_like(x, memory_format=torch.contiguous_format) for x in (k_hat, v_hat))
            for c, r in _tiles(q_hat, k_hat):
                weight = scaled_bmm(q_hat[c, r], k_hat[c].mT, scale).add_(b[c, r]).sigmoid_()
                far_v[c].baddbmm_(weight.mT, far_dout[c, r])
                dscore = _score_gradient(weight, far_dout[c, r], v_hat[c])
                far_q[c, r] = scaled_bmm(dscore, k_hat[c], scale)
                far_k[c].baddbmm_(dscore.mT, q_hat[c, r], alpha=scale)
            far_q = unfold_heads(far_q, N, ops.q.shape[0])
            far_k, far_v = (x.unflatten(0, (N, -1)) for x in (far_k, far_v))
            level.odd(dq).add_(far_q[..., :d_h])
            level.even(dk).add_(far_k[..., :d_h])
            level.even(dv).add_(far_v)
            level.odd(dC).addcmul_(far_q[..., ops.ssm], rect.rise)
            level.even(dB).addcmul_(far_k[..., ops.ssm], rect.fall)
        dq, dk, dv, dC, dB = (x.unflatten(0, (shape.batch, -1))[:, :, :T] for x in (dq, dk, dv, dC, dB))
        dC, dB, dlog_alpha, dtheta, dlam = through_rotation(
            dC, dB, C.to(work), B.to(work), unit, lam.to(work), doc_ids, scale=scale
        )
    grads = [x.to(like.dtype).contiguous() for x, like in zip((dq, dk, dv, dC, dB), (q, k, v, C, B), strict=True)]
    return *grads, dlog_alpha.to(work).contiguous(), dtheta.to(work).contiguous(), dlam


def _leaf_backward(ops: _Operands, dout: Tensor, *, scale: float) -> LeafGradients:
    """Gradients of the diagonal blocks, in `[M, n, leaf, ·]` and `[N, n, leaf, ·]`."""
    blocks, b = ops.blocks()
    M, N = ops.q.shape[0], ops.k.shape[0]
    dout = fold_heads(ops.in_leaves(dout), N)
    dq, dk, dv, dC, dB = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in blocks[:5])
    for c in chunks(dq.shape[0], dq.shape[1] * dk.shape[1], dq.device):
        here = part(blocks, c)
        score, decay = scores(here, scale=scale)
        weight = score.add_(b[c]).sigmoid_()
        torch.bmm(weight.mT, dout[c], out=dv[c])
        dscore = _score_gradient(weight, dout[c], here.v)
        scores_backward_(dscore, here, decay, (dq[c], dk[c], dC[c], dB[c]), scale=scale)
    dk, dv, dB = (x.unflatten(0, (N, -1)) for x in (dk, dv, dB))
    return LeafGradients(unfold_heads(dq, N, M), dk, dv, unfold_heads(dC, N, M), dB)


def _score_gradient(weight: Tensor, dout: Tensor, v: Tensor) -> Tensor:
    """σ' ∘ dO Vᵀ, σ' = σ(1 − σ)."""
    return torch.bmm(dout, v.mT).mul_(weight).mul_(1 - weight)


@_sigmoid_backward.register_fake
def _sigmoid_backward_fake(dout, q, k, v, C, B, lam, doc_ids, g, turns, scale, leaf):  # type: ignore[no-untyped-def]
    grads = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v, C, B)]
    return *grads, *(torch.empty_like(x, dtype=work_dtype(q.dtype)) for x in (g, turns, lam))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, C, B, log_alpha, theta, lam, doc_ids, *ctx.rest = inputs
    _, g, turns = output
    ctx.save_for_backward(q, k, v, C, B, lam, doc_ids, g, turns)
    ctx.mark_non_differentiable(g, turns)
    ctx.set_materialize_grads(False)
    ctx.dtypes = log_alpha.dtype, theta.dtype, lam.dtype


def _autograd(ctx: Any, dout: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if dout is None:
        return (None,) * 11
    *grads, dlog_alpha, dtheta, dlam = _sigmoid_backward(dout, *ctx.saved_tensors, *ctx.rest)
    scalars = (x.to(dtype) for x, dtype in zip((dlog_alpha, dtheta, dlam), ctx.dtypes, strict=True))
    return *grads, *scalars, None, None, None


_sigmoid.register_autograd(_autograd, setup_context=_setup_context)


# The same products as under the softmax; its formulas take tensors for shapes already, hence get_raw.
register_flop_formula(torch.ops.sisa_dist.sigmoid_sisa, get_raw=True)(flops)
register_flop_formula(torch.ops.sisa_dist.sigmoid_sisa_backward, get_raw=True)(flops_backward)
