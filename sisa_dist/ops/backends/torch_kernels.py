"""PyTorch's own attention kernels, by their aten operators: CPU flash, CUDA flash, cuDNN, memory-efficient.

The operators are private to PyTorch and move between versions; what is assumed of them is written at each. Checked
against the schemas and shape functions of torch 2.11 and 2.13 (tests/ops/test_backends_torch.py). Dropout is always 0,
so the random state that the backward operators take is never read.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from sisa_dist.ops.backends.kernel import FLOATS, HALVES, Kernel, fold_back, widen_heads

aten = torch.ops.aten
Three = tuple[Tensor, Tensor, Tensor]


def _cpu_flash(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    return aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, scale=scale)


def _cpu_flash_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *, causal: bool, scale: float
) -> Three:
    return aten._scaled_dot_product_flash_attention_for_cpu_backward(dout, q, k, v, out, lse, 0.0, causal, scale=scale)


def _flash(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    out, lse, *_ = aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, False, scale=scale)
    return out, lse


def _flash_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *, causal: bool, scale: float
) -> Three:
    seed = torch.empty(2, dtype=torch.uint64, device=q.device)
    return aten._scaled_dot_product_flash_attention_backward(
        dout, q, k, v, out, lse.contiguous(), None, None, q.shape[2], k.shape[2], 0.0, causal, seed, seed[:0],
        scale=scale,
    )  # fmt: skip


def _cudnn(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    out, lse, *_ = aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, causal, False, scale=scale)
    return out, lse.reshape(q.shape[:3])


@functools.cache
def _cudnn_lse_dims(device: torch.device) -> int:
    """4 for statistics [b, h, R, 1] (torch 2.9 on), 3 for [b, h, R]: the backward wants what the forward gives."""
    x = torch.zeros(1, 1, 64, 64, dtype=torch.float16, device=device)
    return aten._scaled_dot_product_cudnn_attention(x, x, x, None, True, 0.0, False, False, scale=1.0)[1].ndim


def _cudnn_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *, causal: bool, scale: float
) -> Three:
    lse = lse.contiguous()
    if _cudnn_lse_dims(q.device) == 4:
        lse = lse[..., None]
    seed = torch.empty((), dtype=torch.int64, device=q.device)
    return aten._scaled_dot_product_cudnn_attention_backward(
        dout, q, k, v, out, lse, seed, seed, None, None, None, q.shape[2], k.shape[2], 0.0, causal, scale=scale
    )  # fmt: skip


def _efficient(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    k, v = (widen_heads(x, q.shape[1]) for x in (k, v))
    out, lse, *_ = aten._scaled_dot_product_efficient_attention(q, k, v, None, True, 0.0, causal, scale=scale)
    return out, lse[..., : q.shape[2]]  # its rows are padded to a multiple of 32


def _efficient_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *, causal: bool, scale: float
) -> Three:
    kv_heads = k.shape[1]
    k, v = (widen_heads(x, q.shape[1]) for x in (k, v))
    # The kernel takes out's row stride to be heads × width, which only its own layout [b, R, h, E] has; lse is read
    # in blocks of 32 rows, and e^(s − inf) = 0 beyond the last.
    out = out.transpose(1, 2).contiguous().transpose(1, 2)
    lse = F.pad(lse, (0, -lse.shape[2] % 32), value=float("inf"))
    seed = torch.empty((), dtype=torch.int64, device=q.device)
    dq, dk, dv, _ = aten._scaled_dot_product_efficient_attention_backward(
        dout, q, k, v, None, out, lse, seed, seed, 0.0, [True, True, True, False], causal, scale=scale
    )
    return dq, fold_back(dk, kv_heads), fold_back(dv, kv_heads)


CPU_FLASH = Kernel(_cpu_flash, _cpu_flash_backward, FLOATS, "cpu", max_width=1 << 20, one_width=True)
SDPA_FLASH = Kernel(_flash, _flash_backward, HALVES, "cuda", one_width=True)
SDPA_CUDNN = Kernel(_cudnn, _cudnn_backward, HALVES, "cuda")
SDPA_EFFICIENT = Kernel(_efficient, _efficient_backward, HALVES | {torch.float32}, "cuda", max_width=1 << 16)
