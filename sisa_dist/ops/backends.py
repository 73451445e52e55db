"""Softmax attention over one rectangle of scores, forward with log-sum-exp and backward from *global* out and lse.

The bisected path needs exactly two functions that SDPA does not expose: a forward that returns lse, so that pieces of
a row can be merged, and a backward that takes out and lse of the whole row, as ring attention does. They are reached
here through three backends behind one interface: PyTorch's CPU flash ops, its CUDA flash ops, and plain batched
matrix products. Nothing here knows about decay, levels or documents.

Layout: q `[M, n, R, D]`, k and v `[N, n, S, D]`, M a multiple of N (query batch m reads kv batch m // (M / N)), v
zero beyond its first `d_v` channels, so that one width D reaches a flash kernel. out, dout `[M, n, R, D]` likewise;
lse `[M, n, R]`, natural logarithm. All may be strided views. The products take v, out and dout without padding too.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sisa_dist.ops.products import products_backward, products_forward

aten = torch.ops.aten

# Up to this many keys a rectangle is cheaper on CPU as batched products than as CPU flash, whose blocks are then
# mostly overhead.
PRODUCTS_UP_TO = 256


class Gradients(NamedTuple):
    q: Tensor
    k: Tensor
    v: Tensor


class Rows(NamedTuple):
    """Of the query rows: gradient of out, out, log-sum-exp, and δ = rowsum(dout ∘ out)."""

    dout: Tensor
    out: Tensor
    lse: Tensor
    delta: Tensor


def choose(device: torch.device, dtype: torch.dtype, *, num_keys: int, width: int) -> str:
    """Backend for a rectangle: `cpu_flash`, `cuda_flash` or `products`; once flash, flash for any more keys."""
    if device.type == "cpu" and num_keys > PRODUCTS_UP_TO:
        return "cpu_flash"
    if device.type == "cuda" and dtype in (torch.bfloat16, torch.float16) and width <= 256:
        return "cuda_flash"
    return "products"


def attend(q: Tensor, k: Tensor, v: Tensor, *, d_v: int, scale: float) -> tuple[Tensor, Tensor]:
    """Returns out `[M, n, R, ≥ d_v]` (channels beyond d_v are zero or absent) and lse `[M, n, R]`."""
    backend = choose(q.device, q.dtype, num_keys=k.shape[2], width=q.shape[-1])
    if backend == "products":
        return products_forward(q, k, v[..., :d_v], scale=scale)
    q, k, v = (x.transpose(0, 1) for x in (q, k, v))
    if backend == "cuda_flash":
        out, lse = aten._scaled_dot_product_flash_attention(q, k, v, 0.0, False, False, scale=scale)[:2]
    else:
        out, lse = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, False, scale=scale)
    return out.transpose(0, 1), lse.transpose(0, 1)


def attend_backward(rows: Rows, q: Tensor, k: Tensor, v: Tensor, *, d_v: int, scale: float) -> Gradients:
    """Gradients of a rectangle's q, k, v (v's with ≥ d_v channels), from what its rows' *whole* softmax gave.

    A row with lse = +1e30 takes no part: its probabilities, and with them all it would contribute, are exactly zero.
    """
    dout, out, lse, delta = rows
    backend = choose(q.device, q.dtype, num_keys=k.shape[2], width=q.shape[-1])
    if backend == "products":
        return Gradients(*products_backward(dout[..., :d_v], q, k, v[..., :d_v], lse, delta, scale=scale))
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
