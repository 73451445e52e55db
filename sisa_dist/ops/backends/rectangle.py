"""Softmax attention over one rectangle of scores, forward with log-sum-exp and backward from *global* out and lse.

The two functions the bisected path needs, over whichever kernel serves; on CPU the number of keys decides between
flash and products, elsewhere the shape class does (choice.py).

Layout: q `[M, n, R, D]`, k `[N, n, S, D]`, v `[N, n, S, ·]`, M a multiple of N (query batch m reads
kv batch m // (M / N)), v `value_width` wide, as the kernel wants it, and zero beyond its first `d_v` channels. out,
dout `[M, n, R, ·]` likewise; lse `[M, n, R]`, natural logarithm. All may be strided views.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sisa_dist.ops.backends.choice import KERNELS, Case, check_name, choose
from sisa_dist.ops.backends.kernel import round_up
from sisa_dist.ops.products import products_backward, products_forward

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


def products_up_to(dtype: torch.dtype, *, backward: bool) -> int:
    """Most keys of a rectangle that `auto` computes by products on CPU."""
    if dtype in (torch.bfloat16, torch.float16):
        return PRODUCTS_UP_TO_16_BIT["backward" if backward else "forward"]
    return PRODUCTS_UP_TO


def _name(case: Case, wanted: str, *, num_keys: int, backward: bool) -> str:
    if case.device.type == "cpu" and wanted == "auto":
        return "cpu_flash" if num_keys > products_up_to(case.dtype, backward=backward) else "products"
    return choose(case, wanted)


def value_width(
    device: torch.device, dtype: torch.dtype, *, num_keys: int, width: int, d_v: int, group: int, backend: str
) -> int:
    """Channels v, out and dout must have for rectangles of up to num_keys keys (0: none) and q̂ of `width` channels.

    d_v where products do it, all of `width` where a kernel wants one width.
    """
    check_name(backend, device)
    if not num_keys:
        return d_v
    case = Case(device, dtype, width, round_up(d_v), group, causal=False)
    names = {_name(case, backend, num_keys=num_keys, backward=backward) for backward in (False, True)}
    return max(d_v if name == "products" else KERNELS[name].widths(width, case.d_v)[1] for name in names)


def attend(q: Tensor, k: Tensor, v: Tensor, *, d_v: int, scale: float, backend: str = "auto") -> tuple[Tensor, Tensor]:
    """Returns out `[M, n, R, ≥ d_v]` (channels beyond d_v are zero or absent) and lse `[M, n, R]`."""
    case = Case(q.device, q.dtype, q.shape[-1], round_up(d_v), q.shape[0] // k.shape[0], causal=False)
    name = _name(case, backend, num_keys=k.shape[2], backward=False)
    if name == "products":
        return products_forward(q, k, v[..., :d_v], scale=scale)
    q, k, v = (x.transpose(0, 1) for x in (q, k, v))
    out, lse = KERNELS[name].forward(q, k, v, causal=False, scale=scale)
    return out.transpose(0, 1), lse.transpose(0, 1)


def attend_backward(
    rows: Rows, q: Tensor, k: Tensor, v: Tensor, *, d_v: int, scale: float, backend: str = "auto"
) -> Gradients:
    """Gradients of a rectangle's q, k, v (v's with ≥ d_v channels), from what its rows' *whole* softmax gave.

    A row with lse = +1e30 takes no part: its probabilities, and with them all it would contribute, are exactly zero.
    """
    dout, out, lse, delta = rows
    case = Case(q.device, q.dtype, q.shape[-1], round_up(d_v), q.shape[0] // k.shape[0], causal=False)
    name = _name(case, backend, num_keys=k.shape[2], backward=True)
    if name == "products":
        return Gradients(*products_backward(dout[..., :d_v], q, k, v[..., :d_v], lse, delta, scale=scale))
    dout, q, k, v, out, lse = (x.transpose(0, 1) for x in (dout, q, k, v, out, lse))
    grads = KERNELS[name].backward(dout, q, k, v, out, lse, causal=False, scale=scale)
    return Gradients(*(x.transpose(0, 1) for x in grads))
