"""Context parallelism: windows are cut among the ranks of cp, and scores are put in place that meet keys of others.

Everything but the score, and what recurrent mixers carry (context_state.py), acts on each position by itself, so it
runs unchanged on a rank's own positions; parameters are those of any data rank, and their gradients, of other positions
on each rank, are summed as a data rank's are. Nothing is random, and a window's positions are the same wherever they
lie.

`ulysses` (Jacobs et al. 2023, arXiv 2309.14509) sends positions for heads instead: each rank has some heads of whole
windows for the score alone, which is then the plain one. A rank sends (R − 1)/R of its q, k, v, C, B, log α and θ, and
of the output.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sisa_dist.model import LM
from sisa_dist.model.mixers.attention import AttentionScore
from sisa_dist.model.mixers.hymba import HymbaScore
from sisa_dist.model.mixers.sisa import SisaScore
from sisa_dist.model.mixers.ssmax import SSMax
from sisa_dist.model.placement import Placement
from sisa_dist.parallel import collectives
from sisa_dist.parallel.context_group import Context
from sisa_dist.parallel.context_score import context_attention
from sisa_dist.parallel.context_state import place_in_mixer


@dataclass(frozen=True)
class ZigzagPlacement(Placement):
    """An early and a late stretch of every window, of 2R equal ones: causal work is then the same on all ranks."""

    context: Context

    def window(self, length: int) -> int:
        return length * self.context.size

    def own(self, x: Tensor, *, dim: int = 1) -> Tensor:
        return self.context.own(x.unflatten(dim, (2 * self.context.size, -1)), dim=dim).flatten(dim, dim + 1)

    def whole(self, x_Bt: Tensor) -> Tensor:
        sent = x_Bt.byte() if x_Bt.dtype == torch.bool else x_Bt
        parts = sent.unflatten(1, (2, -1)).movedim(1, 0)
        return self.context.in_order(parts).movedim(0, 1).flatten(1, 2).to(x_Bt.dtype)


class ContextScore(nn.Module):
    """In the place of a mixer's score: `context_attention` on what it is given, no positions of its own."""

    def __init__(self, context: Context, score: SisaScore | AttentionScore | HymbaScore) -> None:
        super().__init__()
        self.context, self.backend = context, score.backend
        self.leaf = score.leaf if isinstance(score, SisaScore) else None

    def forward(self, *qkv_and_rest: Tensor, doc_ids: Tensor | None, cache: Any) -> Tensor:
        assert cache is None, "decoding is not done under context parallelism"
        inputs = qkv_and_rest
        if len(inputs) == 3:  # attention
            q, k, _ = inputs
            C, B, still = q.new_empty(*q.shape[:3], 0), k.new_empty(*k.shape[:3], 0), k.new_zeros(k.shape[:3])
            inputs = (*inputs, C, B, still, B, q.new_zeros(q.shape[1]))
        return context_attention(*inputs, context=self.context, doc_ids=doc_ids, leaf=self.leaf, backend=self.backend)


class UlyssesScore(nn.Module):
    """In the place of a mixer's score: the same score, of whole windows and a share of the heads."""

    def __init__(self, context: Context, score: nn.Module) -> None:
        super().__init__()
        self.context, self.inner = context, score

    @torch.compiler.disable
    def forward(self, *qkv_and_rest: Tensor, doc_ids: Tensor | None, cache: Any) -> Tensor:
        assert cache is None, "decoding is not done under context parallelism"
        context = self.context
        *by_token, last = qkv_and_rest
        whole = [_ToHeads.apply(x, context) for x in by_token]
        # λ has no tokens; attention's last input is v
        whole.append(last.chunk(context.size)[context.rank] if last.ndim == 1 else _ToHeads.apply(last, context))
        return _ToTokens.apply(self.inner(*whole, doc_ids=doc_ids, cache=None), context)


class _ToHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, context: Context) -> Tensor:
        ctx.context = context
        return _to_heads(x, context)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return _to_tokens(grad, ctx.context), None


class _ToTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, context: Context) -> Tensor:
        ctx.context = context
        return _to_tokens(x, context)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return _to_heads(grad, ctx.context), None


def _to_heads(x_BHt: Tensor, context: Context) -> Tensor:
    """[B, H, T/R, ...] of this rank's positions → [B, H/R, T, ...] in the window's order, of this rank's heads."""
    ones = [1] * context.size
    parts = x_BHt.unflatten(1, (context.size, -1)).movedim(1, 0)
    parts = collectives.all_to_all(parts, context.group, sent=ones, received=ones)  # [R, B, H/R, T/R, ...] by sender
    every = parts.unflatten(3, (2, -1)).movedim(3, 1).flatten(0, 1)
    return context.sorted(every).movedim(0, 2).flatten(2, 3)


def _to_tokens(x_BHT: Tensor, context: Context) -> Tensor:
    """Inverse of `_to_heads`."""
    ones = [1] * context.size
    parts = context.dealt(x_BHT.unflatten(2, (2 * context.size, -1)).movedim(2, 0))
    parts = parts.unflatten(0, (-1, 2)).movedim(1, 3).flatten(3, 4)
    parts = collectives.all_to_all(parts, context.group, sent=ones, received=ones)
    return parts.movedim(0, 1).flatten(1, 2)


def place_in_context(model: LM, context: Context) -> None:
    """`model` works on this rank's positions of each window it is given; scores and states take in the others'."""
    placement = ZigzagPlacement(context)
    model.placement = placement
    for module in list(model.modules()):
        if isinstance(module, SSMax):
            module.placement = placement
        place_in_mixer(module, context)
        score = getattr(module, "score", None)
        if isinstance(score, SisaScore | AttentionScore | HymbaScore):
            module.score = UlyssesScore(context, score) if context.kind == "ulysses" else ContextScore(context, score)
