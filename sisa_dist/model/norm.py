"""The norms, computed in fp32 whatever the dtype of the residual stream."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sisa_dist.config import ModelConfig
from sisa_dist.model.init import Constant, Init
from sisa_dist.model.precision import at_least_fp32


class RMSNorm(nn.Module):
    """y = x / sqrt(mean(x²) + eps) · gain over the last dim; returns x's dtype. Zhang & Sennrich 2019.

    The mean is taken within each of `groups` equal parts of the channels.
    """

    init_rules: ClassVar[dict[str, Init]] = {"weight": Constant(1.0)}
    fp32_in_forward = True  # read by the engines: bf16 must not reach these parameters

    def __init__(self, width: int, *, eps: float, groups: int = 1) -> None:
        super().__init__()
        self.eps, self.groups = eps, groups
        self.weight = nn.Parameter(torch.empty(width))

    def forward(self, x: Tensor) -> Tensor:
        # A bf16 gain of 1.0011 is 1.0: the gain stays fp32 and the product is rounded once, at the end.
        weight = self.weight
        if self.groups > 1:
            x_grouped = at_least_fp32(x).unflatten(-1, (self.groups, -1))
            return (F.rms_norm(x_grouped, x_grouped.shape[-1:], None, self.eps).flatten(-2) * weight).to(x.dtype)
        return F.rms_norm(at_least_fp32(x), weight.shape, weight, self.eps).to(x.dtype)


class LayerNorm(nn.Module):
    """y = (x − mean(x)) / sqrt(var(x) + eps) · gain + bias over the last dim; returns x's dtype. Ba et al. 2016."""

    init_rules: ClassVar[dict[str, Init]] = {"weight": Constant(1.0), "bias": Constant(0.0)}
    fp32_in_forward = True

    def __init__(self, width: int, *, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(width))
        self.bias = nn.Parameter(torch.empty(width))

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight
        return F.layer_norm(at_least_fp32(x), weight.shape, weight, self.bias, self.eps).to(x.dtype)


def residual_norm(config: ModelConfig) -> RMSNorm | LayerNorm:
    """A norm of the residual stream, of the kind the config names."""
    return (RMSNorm if config.norm == "rmsnorm" else LayerNorm)(config.d_model, eps=config.norm_eps)
