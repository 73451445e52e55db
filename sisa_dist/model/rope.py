"""Rotary position embedding over the pairs (i, i + channels/2) of the first channels of a head, as transformers does.

The paper pairs adjacent channels; the two differ by a permutation of the rows of W_Q and W_K, and this way an
imported checkpoint needs none. Tables are fp32 and made per forward: a buffer would be cast by the engines.
Positions count from the start of a document. Only their differences enter the score, so this is not needed for the
mathematics: it makes a packed document's q and k those of the document alone to the bit, in any precision.
Scaled kinds: `rope_scaling.py`. Their temperature is in the tables, as in transformers, so it is on the turned channels
of q and k alone. SISA's importance term has none: nothing of Φ is stretched, and its weight, λ, is learned.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sisa_dist.config.rope import RopeScalingConfig
from sisa_dist.model.precision import at_least_fp32
from sisa_dist.model.rope_scaling import attention_factor, frequencies
from sisa_dist.ops.documents import Segments, tokens_seen


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
    scaling: RopeScalingConfig | None = None,
    total_length: int | None = None,
) -> RopeTables:
    """cos and sin of position · frequency for positions start .. start+length−1, times the kind's attention factor.

    With doc_ids `[B, start+length]`, of the cached tokens too, a token's position is its place in its document. Kinds
    that go by length take that of the token's document; the last one goes on to `total_length` tokens, if more come.
    """
    position_BT = tokens_seen(doc_ids_BT, length, start=start, device=device) - 1
    position_T = position_BT[0] if doc_ids_BT is None else position_BT[:, None]
    total = max(start + length, total_length or 0)
    whole: Tensor | int = total
    if doc_ids_BT is not None and scaling is not None and scaling.goes_by_length:
        whole = _document_lengths(doc_ids_BT, to_come=total - start - length)[:, None, start:]
    frequency_P = frequencies(channels, theta, scaling, length=whole, device=device)
    # Angles in fp64: at position 1e5 an fp32 angle is off by up to 4e-3.
    angle_TP = position_T[..., None] * frequency_P
    size = attention_factor(scaling)
    return RopeTables((angle_TP.cos() * size).float(), (angle_TP.sin() * size).float())


def _document_lengths(doc_ids_BT: Tensor, *, to_come: int) -> Tensor:
    """[B, T] tokens of each token's document; the last of a row has `to_come` more."""
    first, last = Segments.of(doc_ids_BT)
    return last - first + 1 + to_come * (doc_ids_BT == doc_ids_BT[:, -1:])


def apply_rope(x_BHTK: Tensor, tables: RopeTables) -> Tensor:
    """x turned by its position, computed in fp32, in x's dtype. Channels behind those of the tables stay put."""
    cos, sin = tables
    pairs = cos.shape[-1]
    a, b, still = at_least_fp32(x_BHTK).split((pairs, pairs, x_BHTK.shape[-1] - 2 * pairs), dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin, still), dim=-1).to(x_BHTK.dtype)
