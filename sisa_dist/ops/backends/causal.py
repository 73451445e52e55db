"""One causal softmax attention over a chosen kernel, as one operator.

On CPU `F.scaled_dot_product_attention` does this; here is what a GPU and every backend asked for by name use, because
SDPA neither lets a kernel be checked nor takes flash-attn's. As a `torch.library.custom_op` the choice and its probe
stay out of compiled graphs and fake tensors, and compile, selective checkpointing and FLOP counters see one node. Its
double backward is not implemented and raises.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from sisa_dist.ops.backends.choice import KERNELS, Case, choose
from sisa_dist.ops.backends.kernel import Kernel, pad_to, round_up
from sisa_dist.ops.precision import no_autocast, work_dtype


def causal_call(q: Tensor, k: Tensor, v: Tensor, *, scale: float, backend: str) -> Tensor:
    """q `[B, H, T, d]`, k `[B, H_kv, T, d]`, v `[B, H_kv, T, d_v]` → `[B, H, T, d_v]`, tokens before heads in memory.

    Raises UserError where the backend cannot serve these shapes here.
    """
    return _causal(q, k, v, scale, backend)[0]


def _prepare(q: Tensor, k: Tensor, v: Tensor, backend: str) -> tuple[Kernel, int, int]:
    group = q.shape[1] // k.shape[1]
    case = Case(q.device, q.dtype, round_up(q.shape[-1]), round_up(v.shape[-1]), group, causal=True)
    kernel = KERNELS[choose(case, backend)]
    return kernel, *kernel.widths(case.d_qk, case.d_v)


def _tokens_first(x: Tensor) -> Tensor:
    """[B, H, T, d] as a view of [B, T, H, d]: what flash kernels write and the output projection reads."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


@torch.library.custom_op(
    "sisa_dist::causal",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, float scale, str backend) -> (Tensor out, Tensor lse)",
)
def _causal(q, k, v, scale, backend):  # type: ignore[no-untyped-def]
    """out [B,H,T,d_v]; for the backward lse [B,H,T]."""
    d_v = v.shape[-1]
    kernel, D, E = _prepare(q, k, v, backend)
    with no_autocast(q.device):
        out, lse = kernel.forward(pad_to(q, D), pad_to(k, D), pad_to(v, E), causal=True, scale=scale)
    return _tokens_first(out[..., :d_v].to(q.dtype)), lse.to(work_dtype(q.dtype)).contiguous()


causal_forward = _causal  # with lse, for who merges it with other keys of the same rows


@_causal.register_fake
def _causal_fake(q, k, v, scale, backend):  # type: ignore[no-untyped-def]
    B, H, T, _ = q.shape
    return q.new_empty(B, T, H, v.shape[-1]).transpose(1, 2), q.new_empty(B, H, T, dtype=work_dtype(q.dtype))


@torch.library.custom_op(
    "sisa_dist::causal_backward",
    mutates_args=(),
    schema="(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, float scale, str backend) -> "
    "(Tensor dq, Tensor dk, Tensor dv)",
)
def _causal_backward(dout, q, k, v, out, lse, scale, backend):  # type: ignore[no-untyped-def]
    kernel, D, E = _prepare(q, k, v, backend)
    with no_autocast(q.device):
        grads = kernel.backward(
            pad_to(dout, E), pad_to(q, D), pad_to(k, D), pad_to(v, E), pad_to(out, E), lse, causal=True, scale=scale
        )
    return tuple(
        dx[..., : x.shape[-1]].to(x.dtype, memory_format=torch.contiguous_format, copy=True)
        for dx, x in zip(grads, (q, k, v), strict=True)
    )


causal_gradients = _causal_backward  # of the rows' whole softmax, which may have more keys than these


@_causal_backward.register_fake
def _causal_backward_fake(dout, q, k, v, out, lse, scale, backend):  # type: ignore[no-untyped-def]
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, ctx.scale, ctx.backend = inputs
    out, lse = output
    ctx.save_for_backward(q, k, v, out, lse)
    ctx.mark_non_differentiable(lse)
    ctx.set_materialize_grads(False)


def _autograd(ctx: Any, dout: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if dout is None:
        return (None,) * 5
    return *_causal_backward(dout, *ctx.saved_tensors, ctx.scale, ctx.backend), None, None


_causal.register_autograd(_autograd, setup_context=_setup_context)


@register_flop_formula(torch.ops.sisa_dist.causal)
def _flops(q_shape: Any, k_shape: Any, v_shape: Any, *_: Any, **__: Any) -> int:
    """Two products over the T(T+1)/2 visible pairs. Multiply and add count as two, as in torch's formulas."""
    batch, heads, T, d = q_shape
    return batch * heads * T * (T + 1) * (d + v_shape[-1])


@register_flop_formula(torch.ops.sisa_dist.causal_backward)
def _flops_backward(_: Any, q_shape: Any, k_shape: Any, v_shape: Any, *__: Any, **___: Any) -> int:
    """Five products: the scores again, dV and dP over d_v, dQ and dK over d."""
    batch, heads, T, d = q_shape
    return batch * heads * T * (T + 1) * (3 * d + 2 * v_shape[-1])
