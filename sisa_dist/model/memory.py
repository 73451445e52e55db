"""Two ways to hold less of a long sequence: the MLP a chunk of tokens at a time, and blocks' inputs in host memory.

Both are exact: they change when and where a number is made or kept, not which one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint


def in_chunks(mlp: Callable[..., Tensor], size: int, x_BTD: Tensor, *C_BHTS: Tensor) -> Tensor:
    """mlp(x, *C), `size` tokens of each window at a time and made again in the backward: [B, T, d_model].

    What lies between the MLP's matrices, several times d_ff a token, then exists for one chunk only. The price is the
    MLP's forward a second time. Gradients of weights are summed over chunks in their own dtype: in bf16 each chunk's is
    rounded first, where one product over all tokens rounds once.
    """
    if x_BTD.shape[1] <= size:
        return mlp(x_BTD, *C_BHTS)
    chunks = zip(x_BTD.split(size, 1), *(C.split(size, 2) for C in C_BHTS), strict=True)
    if not torch.is_grad_enabled():
        return torch.cat([mlp(*chunk) for chunk in chunks], 1)
    return torch.cat([checkpoint(mlp, *chunk, use_reentrant=False) for chunk in chunks], 1)


def inputs_on_host() -> saved_tensors_hooks:
    """Inside it, what a checkpointed block keeps of its arguments waits in host memory for the backward.

    Copies run on the stream that computes: nothing has to wait for them but what comes after, and nothing overlaps.
    """
    return saved_tensors_hooks(to_host, from_host)


def to_host(x: Tensor) -> Any:
    """A copy in pinned host memory, with the device it came from. Ids stay where they are: all blocks share them."""
    if not x.is_floating_point():
        return x
    host = torch.empty_like(x, device="cpu", pin_memory=x.is_cuda)
    return x.device, host.copy_(x, non_blocking=True)


def from_host(kept: Any) -> Tensor:
    if isinstance(kept, Tensor):
        return kept
    device, host = kept
    return host.to(device, non_blocking=True)
