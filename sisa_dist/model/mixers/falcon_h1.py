"""Falcon-H1: attention and Mamba-2 read one input side by side and are added (Zuo et al. 2025, arXiv 2507.22448).

    out = m_attention_out · Attention(m_attention_in · x) + m_ssm_out · Mamba2(m_ssm_in · x)

with k · m_key in the attention, and a multiplier of its own on each of z, x, B, C, dt in the Mamba-2. They are
constants, of `falcon_h1:`; those outside the mixer are `model.multipliers`. By default the Mamba-2 is without its norm,
as in the released models. Under tensor parallelism two sums leave the mixer, one a branch, where one would do.
"""

from __future__ import annotations

from torch import Tensor

from sisa_dist.config import AttentionConfig, ModelConfig
from sisa_dist.model.mixers.attention import Attention
from sisa_dist.model.mixers.base import Cache, Mixer
from sisa_dist.model.mixers.mamba2 import Mamba2, Mamba2Cache
from sisa_dist.model.rope import RopeTables
from sisa_dist.model.scale import scaled
from sisa_dist.ops import AttentionCache


class FalconH1Cache:
    """What both branches keep."""

    def __init__(self) -> None:
        self.attention, self.mamba = AttentionCache(), Mamba2Cache()

    @property
    def length(self) -> int:
        """Tokens seen."""
        return self.attention.length

    def documents(self, doc_ids_Bt: Tensor | None) -> Tensor | None:
        """As `held_and_coming` has it."""
        return self.attention.documents(doc_ids_Bt)


class FalconH1(Mixer):
    """The layer of the equation above. x [B, T, d_model] → [B, T, d_model]."""

    def __init__(self, config: ModelConfig, layer: int, attention: AttentionConfig) -> None:
        super().__init__(config, layer, attention)
        self.by = by = config.falcon_h1_options
        self.attention = Attention(config, layer, attention, key_multiplier=by.key)
        self.mamba = Mamba2(
            config, layer, attention, multipliers=(by.ssm_z, by.ssm_x, by.ssm_B, by.ssm_C, by.ssm_dt), norm=by.norm
        )

    @staticmethod
    def new_cache() -> FalconH1Cache:
        return FalconH1Cache()

    @staticmethod
    def multiply_adds(config: ModelConfig, layer: int, seq_len: int) -> float:
        return Attention.multiply_adds(config, layer, seq_len) + Mamba2.multiply_adds(config, layer, seq_len)

    def forward(
        self, x_BTD: Tensor, rope: RopeTables, doc_ids: Tensor | None = None, cache: Cache | None = None
    ) -> Tensor:
        assert cache is None or isinstance(cache, FalconH1Cache)
        caches = (None, None) if cache is None else (cache.attention, cache.mamba)
        attended_BTD = self.attention(scaled(x_BTD, self.by.attention_in), rope, doc_ids, caches[0])
        carried_BTD = self.mamba(scaled(x_BTD, self.by.ssm_in), rope, doc_ids, caches[1])
        return scaled(attended_BTD, self.by.attention_out) + scaled(carried_BTD, self.by.ssm_out)
