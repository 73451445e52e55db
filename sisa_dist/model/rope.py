"""Rotary position embedding over the pairs (i, i + channels/2) of the first channels of a head, as transformers does.

The paper pairs adjacent channels; the two differ by a permutation of the rows of W_Q and W_K, and this way an
imported checkpoint needs none. Tables are fp32 and made per forward: a buffer would be cast by the engines.
Positions count from the start of a document. Only their differences enter the score, so this is not needed for the
mathematics: it makes a packed document's q and k those of the document alone to the bit, in any precision.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sisa_dist.model.precision import at_least_fp32
from sisa_dist.ops.documents import Segments


class RopeTables(NamedTuple):
    cos_TP: Tensor  # [T, channels/2] fp32; [B, 1, T, channels/2] with documents, to stand against [B, H, T, channels]
    sin_TP: Tensor


def rope_tables(
    start: int,
    length: int,
    *,
    channels: int,
    theta: float,
    device: torch.device,
    doc_ids_BT: Tensor | None = None,
) -> RopeTables:
    """cos and sin of position · theta^(−2i/channels) for positions start .. start+length−1 (Su et al. 2021).

    With doc_ids `[B, start+length]`, of the cached tokens too, a token's position is its place in its document.
    """
    # Angles in fp64: at position 1e5 an fp32 angle is off by up to 4e-3.
    frequency_P = theta ** (-torch.arange(0, channels, 2, dtype=torch.float64, device=device) / channels)
    position_T = torch.arange(start, start + length, device=device)
    if doc_ids_BT is not None:
        position_T = (position_T - Segments.of(doc_ids_BT).first[:, start:])[:, None]
    angle_TP = position_T[..., None] * frequency_P
    return RopeTables(angle_TP.cos().float(), angle_TP.sin().float())


def apply_rope(x_BHTK: Tensor, tables: RopeTables) -> Tensor:
    """x turned by its position, computed in fp32, in x's dtype. Channels behind those of the tables stay put."""
    cos, sin = tables
    pairs = cos.shape[-1]
    a, b, still = at_least_fp32(x_BHTK).split((pairs, pairs, x_BHTK.shape[-1] - 2 * pairs), dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin, still), dim=-1).to(x_BHTK.dtype)
