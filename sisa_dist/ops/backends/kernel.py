"""What every attention kernel looks like to us. No kernel is here, and none is chosen here.

Layout, heads second as in SDPA: q `[b, h, R, D]`, k `[b, h_kv, S, D]`, v `[b, h_kv, S, E]`; h_kv divides h and query
head i reads kv head i // (h / h_kv). out and dout `[b, h, R, E]`; lse `[b, h, R]` fp32, natural logarithm. Any strides
with the last 1; D and E multiples of 8 for kernels that run on CUDA. causal (R = S only): key j is visible to query
i ≥ j.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

HALVES = frozenset({torch.float16, torch.bfloat16})
FLOATS = HALVES | {torch.float32, torch.float64}


class Forward(Protocol):
    """→ out, lse."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float) -> tuple[Tensor, Tensor]: ...


class Backward(Protocol):
    """→ dq, dk, dv, from what the rows' *whole* softmax gave: out and lse may cover more keys than k.

    A row with lse = 1e30 takes no part: all it would contribute is exactly zero.
    """

    def __call__(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        *,
        causal: bool,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]: ...


class Missing(Protocol):
    """→ why the kernel cannot be called in this installation, with what to install; None where it can."""

    def __call__(self) -> str | None: ...


def never_missing() -> str | None:
    return None


class Kernel(NamedTuple):
    forward: Forward
    backward: Backward
    dtypes: frozenset[torch.dtype]
    device: str  # the only device type it runs on
    max_width: int = 256  # of D and E
    one_width: bool = False  # D must equal E: the narrower of q, k and of v, out, dout is padded with zeros
    missing: Missing = never_missing

    def widths(self, d_qk: int, d_v: int) -> tuple[int, int]:
        """D and E it is called with for heads of these channels, multiples of 8."""
        return (max(d_qk, d_v),) * 2 if self.one_width else (d_qk, d_v)


def round_up(channels: int) -> int:
    """To a multiple of 8, which CUDA's kernels want: 16 bytes of a 16-bit dtype."""
    return -(-channels // 8) * 8


def pad_to(x: Tensor, width: int) -> Tensor:
    """Zeros behind the last dimension; no copy where there are none to add."""
    return x if x.shape[-1] == width else F.pad(x, (0, width - x.shape[-1]))


def widen_heads(x: Tensor, heads: int) -> Tensor:
    """[b, h_kv, S, D] → [b, heads, S, D], kv heads repeated, for kernels without grouped heads."""
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], 1)


def fold_back(dx: Tensor, kv_heads: int) -> Tensor:
    """Gradient of `widen_heads`: [b, heads, S, D] → [b, kv_heads, S, D], summed in fp32 at least."""
    if dx.shape[1] == kv_heads:
        return dx
    return dx.unflatten(1, (kv_heads, -1)).sum(2, dtype=torch.promote_types(dx.dtype, torch.float32))
