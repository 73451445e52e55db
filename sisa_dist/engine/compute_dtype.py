"""bf16 compute over fp32 parameters, for an engine that stores and shares parameters in one dtype.

DeepSpeed's own modes do not fit the promise on precision: `bf16` rounds every parameter before forward, λ and decay
too, and `torch_autocast` decides by operator, not by module. So parameters stay fp32 masters throughout, and matrices
are cast where they are used, which is what FSDP2's mixed precision does by module. A cast weight is never kept: the
backward casts it again, or each rank would hold the whole model in bf16 from forward to backward.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sisa_dist.model import LM


class _CastLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.dtype, ctx.bias_dtype = dtype, None if bias is None else bias.dtype
        if bias is None:
            return F.linear(x, weight.to(dtype))
        # Not F.linear: ZeRO-3 puts one of its own there, which rounds the product before it adds the bias.
        return torch.addmm(bias.to(dtype), x.flatten(0, -2), weight.to(dtype).t()).unflatten(0, x.shape[:-1])

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, Tensor | None, None]:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        dweight = dy.flatten(0, -2).t() @ x.flatten(0, -2)
        dbias = None if ctx.bias_dtype is None else dy.flatten(0, -2).sum(0).to(ctx.bias_dtype)
        return dy @ weight.to(ctx.dtype), dweight.to(weight.dtype), dbias, None


def compute_in(model: LM, dtype: torch.dtype) -> None:
    """Linear layers compute in `dtype` and the embedding's output has it, and with it the residual stream.

    Norms, `Decay` and `Importance` see fp32; the head casts its weight to its input's dtype by itself.
    """
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.__class__ = _casting(type(module))  # type: ignore[arg-type]
            module.__dict__["compute_dtype"] = dtype
    model.embed.register_forward_hook(lambda module, arguments, output: output.to(dtype))


@functools.cache
def _casting(cls: type[nn.Linear]) -> type[nn.Linear]:
    """A module may have a class of its own already, where its kv heads are held whole."""

    def forward(module: nn.Linear, x: Tensor) -> Tensor:
        return _CastLinear.apply(x, module.weight, module.bias, module.__dict__["compute_dtype"])

    return type(cls.__name__, (cls,), {"forward": forward, "__module__": cls.__module__})
