"""One pre-norm block, in one of these forms:

    h += mixer(norm1(h)), h += mlp(norm2(h))
    h += mixer(norm1(h)) + mlp(norm2(h))                       parallel_residual, as GPT-NeoX
    h += mixer(x) + mlp(x), x = norm1(h)                       ffn parallel, as GPT-J and PaLM
    h += y + mlp(x, C), (y, C) = mixer(x), x = norm1(h)        ffn ssm_gated (ssm_gated.py)

A block may be without MLP. Where there is none, or one norm serves both, there is no norm2.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sisa_dist.config import AttentionConfig, ModelConfig
from sisa_dist.model.feed_forward import feed_forward
from sisa_dist.model.mixers import MIXERS, Cache
from sisa_dist.model.norm import residual_norm
from sisa_dist.model.rope import RopeTables


class Block(nn.Module):
    def __init__(self, config: ModelConfig, layer: int, attention: AttentionConfig) -> None:
        super().__init__()
        self.norm1 = residual_norm(config)
        self.mixer = MIXERS[config.layer_mixers[layer]](config, layer, attention)
        self.mlp = feed_forward(config, layer)
        self.ffn = config.layer_ffns[layer]
        if self.mlp is not None and self.ffn == "sequential":
            self.norm2 = residual_norm(config)
        self.parallel_residual = config.parallel_residual
        self.activation_checkpointing = False

    def forward(
        self,
        h_BTD: Tensor,
        rope: RopeTables,
        doc_ids: Tensor | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        # Inside forward, so that FSDP wraps the recomputation and gathers the parameters for it.
        if self.activation_checkpointing and h_BTD.requires_grad:
            return checkpoint(self._forward, h_BTD, rope, doc_ids, cache, use_reentrant=False)
        return self._forward(h_BTD, rope, doc_ids, cache)

    def _forward(self, h_BTD: Tensor, rope: RopeTables, doc_ids: Tensor | None, cache: Cache | None) -> Tensor:
        if self.mlp is None:
            return h_BTD + self.mixer(self.norm1(h_BTD), rope, doc_ids, cache)
        if self.ffn != "sequential":
            return self._one_norm(h_BTD, rope, doc_ids, cache)
        if self.parallel_residual:
            return h_BTD + self.mixer(self.norm1(h_BTD), rope, doc_ids, cache) + self.mlp(self.norm2(h_BTD))
        h_BTD = h_BTD + self.mixer(self.norm1(h_BTD), rope, doc_ids, cache)
        return h_BTD + self.mlp(self.norm2(h_BTD))

    def _one_norm(self, h_BTD: Tensor, rope: RopeTables, doc_ids: Tensor | None, cache: Cache | None) -> Tensor:
        """Mixer and MLP beside each other. Under tp each enters and leaves its region, as in the other forms."""
        assert self.mlp is not None
        x_BTD = self.norm1(h_BTD)
        if self.ffn == "ssm_gated":
            y_BTD, C_BHTS = self.mixer(x_BTD, rope, doc_ids, cache)
            return h_BTD + y_BTD + self.mlp(x_BTD, C_BHTS)
        return h_BTD + self.mixer(x_BTD, rope, doc_ids, cache) + self.mlp(x_BTD)
