"""Matrix products of groups of rows, each group with a matrix of its own, differentiable; by one of several backends.

The matrices are cast to the rows' dtype where they are used and never kept so: under ZeRO they are fp32 masters.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from sisa_dist.ops.experts.backends import BACKENDS
from sisa_dist.ops.experts.choice import choose


def grouped_matmul(x_MK: Tensor, weight_EKN: Tensor, ends_E: Tensor, *, backend: str = "auto") -> Tensor:
    """[M, N] of x's dtype: rows ends[e−1]..ends[e]−1 times weight[e]. What rows from ends[-1] on give is undefined.

    ends [E] int32, non-decreasing, multiples of rows.ALIGN, at most M. Raises UserError where `backend` cannot serve.
    """
    if isinstance(x_MK, FakeTensor):  # only shapes count, and meta kernels know bf16 alone
        return _Fake.apply(x_MK, weight_EKN)
    aligned = all(width * x_MK.element_size() % 16 == 0 for width in weight_EKN.shape[1:])
    return _GroupedMatmul.apply(x_MK, weight_EKN, ends_E, choose(x_MK.device, x_MK.dtype, backend, aligned))


class _GroupedMatmul(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_MK: Tensor, weight_EKN: Tensor, ends_E: Tensor, name: str) -> Tensor:
        ctx.save_for_backward(x_MK, weight_EKN, ends_E)
        ctx.name = name
        return BACKENDS[name].rows(x_MK, weight_EKN.to(x_MK.dtype), ends_E)

    @staticmethod
    def backward(ctx: Any, dy_MN: Tensor) -> tuple[Tensor, Tensor, None, None]:  # type: ignore[override]
        x_MK, weight_EKN, ends_E = ctx.saved_tensors
        backend, dy_MN = BACKENDS[ctx.name], dy_MN.contiguous()
        dx_MK = backend.rows(dy_MN, weight_EKN.to(x_MK.dtype).transpose(1, 2), ends_E)
        dweight_EKN = backend.matrices(x_MK, dy_MN, ends_E)
        return dx_MK, dweight_EKN.to(weight_EKN.dtype), None, None


class _Fake(torch.autograd.Function):
    """The shapes and the memory of `_GroupedMatmul`, for a rehearsal on tensors without values."""

    @staticmethod
    def forward(ctx: Any, x_MK: Tensor, weight_EKN: Tensor) -> Tensor:
        ctx.save_for_backward(x_MK, weight_EKN)
        weight_EKN = weight_EKN.to(x_MK.dtype)
        return x_MK.new_empty(x_MK.shape[0], weight_EKN.shape[2])

    @staticmethod
    def backward(ctx: Any, dy_MN: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        x_MK, weight_EKN = ctx.saved_tensors
        dx_MK = torch.empty_like(x_MK)
        return dx_MK, x_MK.new_empty(weight_EKN.shape).to(weight_EKN.dtype)
