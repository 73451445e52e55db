"""One pre-norm block: h += mixer(norm(h)); h += mlp(norm(h))."""

from __future__ import annotations

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sisa_dist.config import AttentionConfig, ModelConfig
from sisa_dist.model.mixers import MIXERS
from sisa_dist.model.mlp import SwiGLU
from sisa_dist.model.norm import RMSNorm
from sisa_dist.model.rope import RopeTables
from sisa_dist.ops import AttentionCache, SisaCache


class Block(nn.Module):
    def __init__(self, config: ModelConfig, layer: int, attention: AttentionConfig) -> None:
        super().__init__()
        self.norm1 = RMSNorm(config.d_model, eps=config.norm_eps)
        self.mixer = MIXERS[config.layer_mixers[layer]](config, layer, attention)
        self.norm2 = RMSNorm(config.d_model, eps=config.norm_eps)
        self.mlp = SwiGLU(config.d_model, config.d_ff)
        self.activation_checkpointing = False

    def forward(
        self,
        h_BTD: Tensor,
        rope: RopeTables,
        doc_ids: Tensor | None = None,
        cache: AttentionCache | SisaCache | None = None,
    ) -> Tensor:
        # Inside forward, so that FSDP wraps the recomputation and gathers the parameters for it.
        if self.activation_checkpointing and h_BTD.requires_grad:
            return checkpoint(self._forward, h_BTD, rope, doc_ids, cache, use_reentrant=False)
        return self._forward(h_BTD, rope, doc_ids, cache)

    def _forward(
        self, h_BTD: Tensor, rope: RopeTables, doc_ids: Tensor | None, cache: AttentionCache | SisaCache | None
    ) -> Tensor:
        h_BTD = h_BTD + self.mixer(self.norm1(h_BTD), rope, doc_ids, cache)
        return h_BTD + self.mlp(self.norm2(h_BTD))
