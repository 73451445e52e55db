"""Packed documents on the bisected path: what of a level one document leaves visible, and sums that stop at its edge.

At each pair of spans only one document can cross from the even span into the odd one: the last of the even span. Its
part is a rectangle; which rows and keys belong to it differs per pair, so the level still runs as one batch, with the
other keys masked by one extra score channel and the other rows dropped at the merge. g and Φ are never reset: only
their differences inside a document enter. doc_ids is non-decreasing, so equality with the last even token decides.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from sisa_dist.ops.spans import Level


class Crossing(NamedTuple):
    rows: Tensor  # bool [M, num, rows]: queries of the crossing document
    keys: Tensor  # bool [N, num, span]: its keys


def crossing(doc_q_MT: Tensor, doc_k_NT: Tensor, level: Level) -> Crossing:
    """Rows and keys of the document that crosses each pair of the level."""
    last_q, last_k = level.even(doc_q_MT)[:, :, -1:], level.even(doc_k_NT)[:, :, -1:]
    return Crossing(level.odd(doc_q_MT) == last_q, level.even(doc_k_NT) == last_k)


def within_reach(levels: Iterable[Level], doc_ids_BT: Tensor) -> Iterator[Level]:
    """The levels without what no crossing document reaches: fewer keys and rows, or no level at all.

    Only on a CPU, where reading doc_ids waits for nothing; elsewhere, and on fake tensors, every level whole. It takes
    away what is masked and would add exactly 0, so it changes time alone.
    """
    readable = doc_ids_BT.device.type == "cpu" and not isinstance(doc_ids_BT, FakeTensor)
    for level in levels:
        if not readable:
            yield level
            continue
        rows, keys = (x.sum(-1) for x in crossing(doc_ids_BT, doc_ids_BT, level))
        longest_rows, longest_keys = int(rows.max()), int((keys * (rows > 0)).max())
        if longest_rows:
            yield level._replace(last_keys=_even(longest_keys, level.span), first_rows=_even(longest_rows, level.rows))


def _even(length: int, most: int) -> int:
    """Rounded up, so that products and their workspaces come in few sizes."""
    return min(most, -(-length // 32) * 32)


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


class _InDocuments(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, segments: Segments, sums: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.segments, ctx.dtype = segments, x.dtype
        return sums(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        return suffix_sums(grad, ctx.segments).to(ctx.dtype), None, None


def sums_in_documents(x_BGT: Tensor, segments: Segments, sums: Callable[[Tensor], Tensor]) -> Tensor:
    """`sums`, running sums along dim 2 of `[B, H_kv, T, ...]`, of which only differences inside a document are used.

    Autograd's reverse sum would hand each document's rounding error to all documents before it: here they get 0.
    """
    return _InDocuments.apply(x_BGT, segments, sums)
