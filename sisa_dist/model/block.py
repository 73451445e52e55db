"""One pre-norm block, in one of these forms:

    h += mixer(norm1(h)), h += mlp(norm2(h))
    h += mixer(norm1(h)) + mlp(norm2(h))                       parallel_residual, as GPT-NeoX
    h += mixer(x) + mlp(x), x = norm1(h)                       ffn parallel, as GPT-J and PaLM
    h += y + mlp(x, C), (y, C) = mixer(x), x = norm1(h)        ffn ssm_gated (ssm_gated.py)

A block may be without MLP. Where there is none, or one norm serves both, there is no norm2. Where the MLP is a mixture
of experts, the block's output is followed by how it routed: two more tensors, in a plain tuple, because engines hang
their hooks on what they find there.
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
        gate_P: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor, Tensor]:
        """`gate_P`: of the channels, where d_s is learned (gates.py)."""
        # Inside forward, so that FSDP wraps the recomputation and gathers the parameters for it.
        if self.activation_checkpointing and h_BTD.requires_grad:
            return checkpoint(self._forward, h_BTD, rope, doc_ids, cache, gate_P, use_reentrant=False)
        return self._forward(h_BTD, rope, doc_ids, cache, gate_P)

    def _forward(
        self, h_BTD: Tensor, rope: RopeTables, doc_ids: Tensor | None, cache: Cache | None, gate_P: Tensor | None
    ) -> Tensor | tuple[Tensor, Tensor, Tensor]:
        x_BTD = self.norm1(h_BTD)
        y_BTD = self.mixer(x_BTD, rope, doc_ids, cache, *([] if gate_P is None else [gate_P]))
        for_gate: list[Tensor] = []
        if self.ffn == "ssm_gated":
            y_BTD, *for_gate = y_BTD
        mixed_BTD = h_BTD + y_BTD
        if self.mlp is None:
            return mixed_BTD
        if self.ffn == "sequential":
            x_BTD = self.norm2(h_BTD if self.parallel_residual else mixed_BTD)
        fed = self.mlp(x_BTD, *for_gate)
        if isinstance(fed, tuple):
            y_BTD, routing = fed
            return (mixed_BTD + y_BTD, *routing)
        return mixed_BTD + fed
