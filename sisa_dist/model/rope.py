"""Rotary position embedding over the pairs (i, i + head_dim/2), as transformers pairs them.

The paper pairs adjacent channels; the two differ by a permutation of the rows of W_Q and W_K, and this way an
imported checkpoint needs none. Tables are fp32 and made per forward: a buffer would be cast by the engines.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sisa_dist.model.precision import at_least_fp32


class RopeTables(NamedTuple):
    cos_TK: Tensor  # [T, head_dim/2] fp32
    sin_TK: Tensor


def rope_tables(start: int, length: int, *, head_dim: int, theta: float, device: torch.device) -> RopeTables:
    """cos and sin of position · theta^(−2i/head_dim) for positions start .. start+length−1 (Su et al. 2021)."""
    # Angles in fp64: at position 1e5 an fp32 angle is off by up to 4e-3.
    frequency_K = theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float64, device=device) / head_dim)
    position_T = torch.arange(start, start + length, dtype=torch.float64, device=device)
    angle_TK = position_T[:, None] * frequency_K
    return RopeTables(angle_TK.cos().float(), angle_TK.sin().float())


def apply_rope(x_BHTK: Tensor, tables: RopeTables) -> Tensor:
    """x turned by its position, computed in fp32, in x's dtype."""
    a, b = at_least_fp32(x_BHTK).chunk(2, dim=-1)
    cos, sin = tables
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x_BHTK.dtype)
