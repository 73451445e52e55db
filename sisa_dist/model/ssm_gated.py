"""SwiGLU whose gate the mixer's C_t joins: the deeper FFN-SSM integration that arXiv 2606.02332 leaves to future work.

    x     = norm(h)                                      one norm for mixer and MLP
    out   = h + mixer(x) + W_down (silu(W_gate x + u) · W_up x)
    u_t   = [U_1 C_t,1 ; … ; U_H C_t,H]                  U_h [d_ff/H, d_s], C_t,h = W_C,h x_t

Ours: the paper gives no equation. U is 0 at first, so a new model is the parallel block without it; U is decayed as
every matrix is, towards that block. Head h reaches its own slice of the gate only, so tensor parallelism by heads,
which deals out the same slices, needs no collective more than the plain MLP.

C_t is the projection itself, as it stands in the score s_ij = … λ e^{g_i−g_j} C_iᵀ R(Φ_j − Φ_i) B_j, not R(Φ_i) C_i.
The score sees differences of Φ alone; a rotated C_t would bring into the MLP where Φ starts counting and which way it
turns, and packed documents, a cache or parts of a sequence would have to bring along a running phase. Unrotated, u_t
depends on token t alone. λ, and the scale that SSMax gives C, belong to the score and stay out too.

The price: W_gate x + u = (W_gate + U W_C) x, so the block computes no function that the parallel block cannot. What
differs is how it learns: the MLP's gradient shapes W_C, and a trained U can be folded into W_gate.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from sisa_dist.model.init import Constant, Init
from sisa_dist.model.mlp import SwiGLU


class HeadwiseLinear(nn.Module):
    """A linear map of each head by itself, U [H, out, in], 0 at first, without bias. Computed in its input's dtype."""

    init_rules: ClassVar[dict[str, Init]] = {"weight": Constant(0.0)}

    def __init__(self, n_heads: int, in_per_head: int, out_per_head: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_heads, out_per_head, in_per_head))

    def forward(self, C_BHTS: Tensor) -> Tensor:
        """[B, H, T, in] → [B, T, H·out]; H is whatever this rank holds."""
        # Where an engine stores fp32 the cast copy lives until the backward: d_ff · d_s values, few beside the MLP's.
        return torch.einsum("bhts,hfs->bthf", C_BHTS, self.weight.to(C_BHTS.dtype)).flatten(2)


class SSMGatedSwiGLU(SwiGLU):
    """The MLP of the equations above."""

    def __init__(
        self, d_model: int, d_ff: int, *, bias: bool, multipliers: tuple[float, float], n_heads: int, d_s: int
    ) -> None:
        super().__init__(d_model, d_ff, bias=bias, multipliers=multipliers)
        self.ssm_gate = HeadwiseLinear(n_heads, d_s, d_ff // n_heads)

    def forward(self, x_BTD: Tensor, C_BHTS: Tensor) -> Tensor:  # type: ignore[override]
        """x [B, T, d_model] and C [B, H, T, d_s] of the same tokens → [B, T, d_model]."""
        return self.gated(self.gate(x_BTD) + self.ssm_gate(C_BHTS), x_BTD)
