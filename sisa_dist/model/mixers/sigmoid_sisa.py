"""SISA-2: SISA's score under a sigmoid instead of a softmax, so that a token may attend to nothing at all.

    y_i = Σ_j σ(s_ij + b_i) v_j,    b_i = −log(i + 1), i counted from 0 within the document

s, the projections and their initial values are SISA's. The score's paths and kernels are the softmax's alone: there is
one way to compute this one (`sisa_dist.ops.sigmoid`).
"""

from __future__ import annotations

from torch import Tensor, nn

from sisa_dist.config import AttentionConfig, ModelConfig, UserError
from sisa_dist.model.mixers.sisa import SISA
from sisa_dist.ops import SigmoidSisaCache, SisaCache, sigmoid_sisa_attention


class SigmoidScore(nn.Module):
    """The score as a submodule, so that context parallelism can put another in its place."""

    def __init__(self, attention: AttentionConfig) -> None:
        super().__init__()
        for key, works in (("path", ("auto", "bisected")), ("backend", ("auto", "products"))):
            if getattr(attention, key) not in works:
                raise UserError(
                    f"attention.{key} {getattr(attention, key)} cannot compute the mixer sigmoid_sisa: set it to "
                    f"{' or '.join(works)}"
                )
        self.leaf = attention.leaf

    def forward(self, *qkvCB_log_alpha_theta_lam: Tensor, doc_ids: Tensor | None, cache: SisaCache | None) -> Tensor:
        if cache is not None:
            return cache.attend(*qkvCB_log_alpha_theta_lam, doc_ids=doc_ids)
        return sigmoid_sisa_attention(*qkvCB_log_alpha_theta_lam, doc_ids=doc_ids, leaf=self.leaf)


class SigmoidSISA(SISA):
    """x [B, T, d_model] → [B, T, d_model]."""

    def __init__(self, config: ModelConfig, layer: int, attention: AttentionConfig) -> None:
        super().__init__(config, layer, attention)
        self.ssmax = None  # it is a scale of softmax scores
        self.score = SigmoidScore(attention)

    @staticmethod
    def new_cache() -> SigmoidSisaCache:
        return SigmoidSisaCache()
