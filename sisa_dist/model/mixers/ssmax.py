"""Scalable softmax (SSMax, Nakanishi 2025, arXiv 2501.19399): scores grow with the logarithm of the tokens seen.

A softmax over n scores of bounded size flattens as n grows; times s·log n it does not. s is learned per query head. It
starts at 1 / mean log n over the training sequence, so that scores start as large on average as without.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from sisa_dist.model.init import Constant, Init
from sisa_dist.model.mixers.base import Cache
from sisa_dist.model.placement import Placement
from sisa_dist.model.precision import at_least_fp32
from sisa_dist.ops import tokens_seen


class SSMax(nn.Module):
    """x [B, H, T, K] → s·log(n) x in x's dtype, x being what a score is linear in: q, or C."""

    fp32_in_forward = True  # read by the engines: bf16 must not reach this parameter

    def __init__(self, n_heads: int, *, training_tokens: int) -> None:
        super().__init__()
        # mean of log n over n = 1 … N is log(N!) / N
        self.init_rules: dict[str, Init] = {"scale": Constant(training_tokens / math.lgamma(training_tokens + 1))}
        self.scale = nn.Parameter(torch.empty(n_heads))
        self.placement = Placement()

    def forward(self, *x_BHTK: Tensor, doc_ids: Tensor | None, cache: Cache | None) -> tuple[Tensor, ...]:
        """Each x scaled. n counts within the document, tokens that lie in the cache among them."""
        scale, start = self.scale, 0
        if cache is not None:
            doc_ids, start = cache.documents(doc_ids), cache.length
        length = self.placement.window(x_BHTK[0].shape[2])
        seen = self.placement.own(tokens_seen(doc_ids, length, start=start, device=scale.device))
        factor_BHT1 = scale[:, None, None] * seen.to(scale.dtype).log()[:, None, :, None]
        return tuple((at_least_fp32(x) * factor_BHT1).to(x.dtype) for x in x_BHTK)


def ssmax(n_heads: int, training_tokens: int | None) -> SSMax | None:
    """None where the config has none."""
    return None if training_tokens is None else SSMax(n_heads, training_tokens=training_tokens)
