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

# Up to this many keys a rectangle goes by products on CPU. Measured: one core of a Sapphire Rapids Xeon, d_h 64,
# d_s 32, d_v 64, milliseconds per million (query, key) pairs, forward + backward (torch 2.13, MKL; ± 10 %):
#     keys                   64          128         256         512         1024
#     fp32  CPU flash    2.3 + 41    1.9 + 7.9   2.5 + 7.3   2.4 + 6.3   2.5 + 5.7
#           products     3.5 + 6.7   2.8 + 6.1   2.5 + 5.6   2.4 + 5.6   4.6 + 10
#     bf16  CPU flash    1.3 + 43    0.9 + 23    0.7 + 8.4   1.5 + 6.1   1.0 + 4.0
# Flash needs v, out and dout padded to d_h + d_s besides, which is why fp32 changes over at 1024 and not at 512.
# bf16 (AMX) is quick forward, and its small backward blocks are what fp32's are not.
PRODUCTS_UP_TO = 512
PRODUCTS_UP_TO_16_BIT = {"forward": 0, "backward": 256}


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


def choose(device: torch.device, dtype: torch.dtype, *, num_keys: int, width: int, backward: bool) -> str:
    """Backend for a rectangle: `cpu_flash`, `cuda_flash` or `products`; once flash, flash for any more keys."""
    short = dtype in (torch.bfloat16, torch.float16)
    if device.type == "cpu":
        limit = PRODUCTS_UP_TO_16_BIT["backward" if backward else "forward"] if short else PRODUCTS_UP_TO
        return "cpu_flash" if num_keys > limit else "products"
    if device.type == "cuda" and short and width <= 256:
        return "cuda_flash"
    return "products"


def attend(q: Tensor, k: Tensor, v: Tensor, *, d_v: int, scale: float) -> tuple[Tensor, Tensor]:
    """Returns out `[M, n, R, ≥ d_v]` (channels beyond d_v are zero or absent) and lse `[M, n, R]`."""
    backend = choose(q.device, q.dtype, num_keys=k.shape[2], width=q.shape[-1], backward=False)
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
    backend = choose(q.device, q.dtype, num_keys=k.shape[2], width=q.shape[-1], backward=True)
    if backend == "products":
        return Gradients(*products_backward(dout[..., :d_v], q, k, v[..., :d_v], lse, delta, scale=scale))
    dout, q, k, v, out, lse = (x.transpose(0, 1) for x in (dout, q, k, v, out, lse))
    if backend == "cuda_flash":
        seed = torch.empty(2, dtype=torch.uint64, device=q.device)  # no dropout: never read
        grads = aten._scaled_dot_product_flash_attention_backward(
            dout, q, k, v, out, lse.contiguous(), None, None, q.shape[2], k.shape[2], 0.0, False, seed, seed[:0],
            scale=scale,
        )  # fmt: skip
    else:
        grads = aten._scaled_dot_product_flash_attention_for_cpu_backward(
            dout, q, k, v, out, lse, 0.0, False, scale=scale
        )
    return Gradients(*(x.transpose(0, 1) for x in grads))
