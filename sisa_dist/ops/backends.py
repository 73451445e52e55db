"""Softmax attention over one rectangle of scores, forward with log-sum-exp and backward from *global* out and lse.

The bisected path needs exactly two functions that SDPA does not expose: a forward that returns lse, so that pieces of
a row can be merged, and a backward that takes out and lse of the whole row, as ring attention does. They are reached
here through three backends behind one interface: PyTorch's CPU flash ops, its CUDA flash ops, and plain batched
matrix products. Nothing here knows about decay, levels or documents.

Layout: q `[M, n, R, D]`, k and v `[N, n, S, D]`, M a multiple of N (query batch m reads kv batch m // (M / N)), v
zero beyond its first `d_v` channels, so that one width D reaches a flash kernel. out, dout `[M, n, R, D]` likewise;
lse `[M, n, R]`, natural logarithm. n may come as any strided view.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

aten = torch.ops.aten

# Up to this many keys a rectangle is cheaper on CPU as batched products than as CPU flash, whose blocks are then
# mostly overhead.
PRODUCTS_UP_TO = 256


class Gradients(NamedTuple):
    q: Tensor
    k: Tensor
    v: Tensor


def choose(q: Tensor, *, num_keys: int) -> str:
    """Backend for a rectangle: `cpu_flash`, `cuda_flash` or `products`. From device, dtype and shape only."""
    if q.device.type == "cpu" and num_keys > PRODUCTS_UP_TO:
        return "cpu_flash"
    if q.device.type == "cuda" and q.dtype in (torch.bfloat16, torch.float16) and q.shape[-1] <= 256:
        return "cuda_flash"
    return "products"


def attend(q: Tensor, k: Tensor, v: Tensor, *, d_v: int, scale: float) -> tuple[Tensor, Tensor]:
    """Returns out `[M, n, R, ≥ d_v]` (channels beyond d_v are zero or absent) and lse `[M, n, R]`."""
    backend = choose(q, num_keys=k.shape[2])
    if backend == "products":
        return _products_forward(q, k, v[..., :d_v], scale=scale)
    q, k, v = (x.transpose(0, 1) for x in (q, k, v))
    if backend == "cuda_flash":
        out, lse = aten._scaled_dot_product_flash_attention(q, k, v, 0.0, False, False, scale=scale)[:2]
    else:
        out, lse = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, False, scale=scale)
    return out.transpose(0, 1), lse.transpose(0, 1)


def attend_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    *,
    d_v: int,
    scale: float,
) -> Gradients:
    """Gradients of a rectangle's q, k, v (v's with ≥ d_v channels), given out and lse of the rows' whole softmax.

    A row with lse = +1e30 takes no part: its probabilities, and with them all it would contribute, are exactly zero.
    """
    backend = choose(q, num_keys=k.shape[2])
    if backend == "products":
        return _products_backward(dout[..., :d_v], q, k, v[..., :d_v], out[..., :d_v], lse, scale=scale)
    dout, q, k, v, out, lse = (x.transpose(0, 1) for x in (dout, q, k, v, out, lse))
    if backend == "cuda_flash":
        seed = torch.zeros(2, dtype=torch.int64, device=q.device)  # dropout is 0: never read
        grads = aten._scaled_dot_product_flash_attention_backward(
            dout, q, k, v, out, lse.contiguous(), None, None, q.shape[2], k.shape[2], 0.0, False, seed, seed[:0],
            scale=scale,
        )  # fmt: skip
    else:
        grads = aten._scaled_dot_product_flash_attention_for_cpu_backward(
            dout, q, k, v, out, lse, 0.0, False, scale=scale
        )
    return Gradients(*(x.transpose(0, 1) for x in grads))


def fold_heads(x: Tensor, num_kv: int) -> Tensor:
    """[M, n, R, D] → [N·n, (M/N)·R, D]: the query heads of a group stand as more rows over the same keys."""
    if x.shape[0] == num_kv:
        return x.flatten(0, 1)
    return x.unflatten(0, (num_kv, -1)).transpose(1, 2).flatten(2, 3).flatten(0, 1)


def unfold_heads(x: Tensor, num_kv: int, num_q: int) -> Tensor:
    """Inverse of `fold_heads`; also for [N·n, (M/N)·R] without D."""
    if num_q == num_kv:
        return x.unflatten(0, (num_kv, -1))
    return x.unflatten(0, (num_kv, -1)).unflatten(2, (num_q // num_kv, -1)).transpose(1, 2).flatten(0, 1)


def scaled_bmm(a: Tensor, b: Tensor, scale: float) -> Tensor:
    """scale · a @ b in one pass (the product's own alpha), a `[n, R, D]`, b `[n, D, S]`."""
    return torch.baddbmm(a.new_empty(()), a, b, beta=0, alpha=scale)


def _products_forward(q: Tensor, k: Tensor, v: Tensor, *, scale: float) -> tuple[Tensor, Tensor]:
    M, N, dtype = q.shape[0], k.shape[0], q.dtype
    q, k, v = (widen(fold_heads(x, N)) for x in (q, k, v))
    score = scaled_bmm(q, k.mT, scale)
    out, lse = softmax_product_(score, v)
    return unfold_heads(out, N, M).to(dtype), unfold_heads(lse, N, M)


def softmax_product_(score: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """softmax(score) @ v and lse, overwriting score `[n, R, S]`; every row needs one finite score."""
    top = score.amax(-1, keepdim=True)
    total = score.sub_(top).exp_().sum(-1, keepdim=True)
    return torch.bmm(score, v).div_(total), (top + total.log()).squeeze(-1)


def _products_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *, scale: float
) -> Gradients:
    M, N, dtype = q.shape[0], k.shape[0], q.dtype
    dout, q, k, v, out = (widen(fold_heads(x, N)) for x in (dout, q, k, v, out))
    lse = fold_heads(lse[..., None], N)
    prob = scaled_bmm(q, k.mT, scale).sub_(lse).exp_()
    dscore = score_gradient(prob, dout, v, out)
    dq, dk = scaled_bmm(dscore, k, scale), scaled_bmm(dscore.mT, q, scale)
    dv = torch.bmm(prob.mT, dout)
    return Gradients(unfold_heads(dq, N, M).to(dtype), *(x.unflatten(0, (N, -1)).to(dtype) for x in (dk, dv)))


def score_gradient(prob: Tensor, dout: Tensor, v: Tensor, out: Tensor) -> Tensor:
    """P ∘ (dO Vᵀ − rowsum(dO ∘ O)), all `[n, R, ·]`."""
    delta = (dout * out).sum(-1, keepdim=True)
    return torch.bmm(dout, v.mT).sub_(delta).mul_(prob)


def widen(x: Tensor) -> Tensor:
    """16-bit to fp32 (products keep their sums in fp32), others as they are."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
