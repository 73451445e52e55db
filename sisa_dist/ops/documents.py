"""Packed documents on the bisected path: what of a level one document leaves visible, and sums that stop at its edge.

At each pair of spans only one document can cross from the even span into the odd one: the last of the even span. Its
part is a rectangle; which rows and keys belong to it differs per pair, so the level still runs as one batch, with the
other keys masked by one extra score channel and the other rows dropped at the merge. g and Φ are never reset: only
their differences inside a document enter. doc_ids is non-decreasing, so equality with the last even token decides.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sisa_dist.ops.spans import Level


class Crossing(NamedTuple):
    rows: Tensor  # bool [M, num, rows]: queries of the crossing document
    keys: Tensor  # bool [N, num, span]: its keys


def crossing(doc_q_MT: Tensor, doc_k_NT: Tensor, level: Level) -> Crossing:
    """Rows and keys of the document that crosses each pair of the level."""
    last_q, last_k = level.even(doc_q_MT)[:, :, -1:], level.even(doc_k_NT)[:, :, -1:]
    return Crossing(level.odd(doc_q_MT) == last_q, level.even(doc_k_NT) == last_k)


def mask_value(scale: float, dtype: torch.dtype) -> float:
    """Key value of the mask channel (the query's is 1), so that scale · value = −1e4 nats: e^−1e4 is 0 even in fp64.

    fp16 cannot hold more than 65 504, which still is thousands of nats at any usual scale.
    """
    return max(-1e4 / scale, -6e4) if dtype == torch.float16 else -1e4 / scale


class Segments(NamedTuple):
    """Indices `[B, T]` of the first and the last token of each token's document."""

    first: Tensor
    last: Tensor

    @staticmethod
    def of(doc_ids_BT: Tensor) -> Segments:
        T = doc_ids_BT.shape[1]
        place = torch.arange(T, device=doc_ids_BT.device).expand_as(doc_ids_BT)
        edge = doc_ids_BT[:, 1:] != doc_ids_BT[:, :-1]
        starts, ends = torch.zeros_like(place), torch.full_like(place, T - 1)
        starts[:, 1:] = torch.where(edge, place[:, 1:], 0)
        ends[:, :-1] = torch.where(edge, place[:, :-1], T - 1)
        return Segments(starts.cummax(1).values, ends.flip(1).cummin(1).values.flip(1))


def tokens_seen(doc_ids_BT: Tensor | None, num_tokens: int, *, start: int = 0, device: torch.device) -> Tensor:
    """How many tokens each sees, itself among them: `[1, T]`, or with documents `[B, T]`, int64.

    `start` tokens, of no other document, came before the first; not together with documents.
    """
    place = torch.arange(start + 1, start + num_tokens + 1, device=device)[None]
    return place if doc_ids_BT is None else place - Segments.of(doc_ids_BT).first


def suffix_sums(x_BGT: Tensor, segments: Segments | None) -> Tensor:
    """Σ over t' ≥ t of the same document along dim 2 of `[B, H_kv, T, ...]`, fp64; exactly 0 at its first token.

    The score sees only differences of running sums, so the sum over a whole document is 0 but for rounding, and the
    gradient of its first log α and θ is that sum: it is set, not computed. A document without gradient gets exact
    zeros, because two equal prefix sums are subtracted.
    """
    prefix = x_BGT.cumsum(2, dtype=torch.float64)
    if segments is None:
        result = torch.sub(prefix[:, :, -1:], prefix).add_(x_BGT)
        result[:, :, 0] = 0
        return result
    first, last = (s.view(s.shape[0], 1, -1, *(1,) * (x_BGT.ndim - 3)) for s in segments)
    total = prefix.gather(2, last.expand(prefix.shape))
    is_first = torch.arange(x_BGT.shape[2], device=x_BGT.device).view_as(first[:1]) == first
    return (total - prefix).add_(x_BGT).masked_fill_(is_first, 0)
