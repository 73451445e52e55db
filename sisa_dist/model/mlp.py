"""The feed-forward networks: SwiGLU (Shazeer 2020) and the two-matrix one with GELU (GPT-2, GPT-NeoX)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from sisa_dist.model.scale import scaled


class SwiGLU(nn.Module):
    """down(silu(gate(x)) · up(x)). Gate and up are separate matrices: a fused one is cut wrongly under tp.

    `multipliers`: constants on what gate gives and on what down gives.
    """

    def __init__(self, d_model: int, d_ff: int, *, bias: bool, multipliers: tuple[float, float] = (1.0, 1.0)) -> None:
        super().__init__()
        self.multipliers = multipliers
        self.gate = nn.Linear(d_model, d_ff, bias=bias)
        self.up = nn.Linear(d_model, d_ff, bias=bias)
        self.down = nn.Linear(d_ff, d_model, bias=bias)

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.gated(self.gate(x_BTD), x_BTD)

    def gated(self, gate_BTF: Tensor, x_BTD: Tensor) -> Tensor:
        by_gate, by_down = self.multipliers
        return scaled(self.down(F.silu(scaled(gate_BTF, by_gate)) * self.up(x_BTD)), by_down)


class GELU(nn.Module):
    """down(gelu(up(x))), with gelu(x) = x · Φ(x) exactly."""

    def __init__(self, d_model: int, d_ff: int, *, bias: bool) -> None:
        super().__init__()
        self.up = nn.Linear(d_model, d_ff, bias=bias)
        self.down = nn.Linear(d_ff, d_model, bias=bias)

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x_BTD)))


MLP_MATRICES = {"swiglu": 3, "gelu": 2, "none": 0}  # of d_model × d_ff
