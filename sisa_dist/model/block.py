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

from contextlib import nullcontext

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sisa_dist.config import AttentionConfig, ModelConfig
from sisa_dist.model.feed_forward import feed_forward
from sisa_dist.model.memory import in_chunks, inputs_on_host
from sisa_dist.model.mixers import MIXERS, Cache
from sisa_dist.model.moe import MoE
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
        # What it keeps for the backward; an engine sets them.
        self.activation_checkpointing = False
        self.activation_offload = False  # with activation_checkpointing
        self.mlp_chunk: int | None = None  # tokens; without effect on a mixture of experts, which routes whole windows

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
            with inputs_on_host() if self.activation_offload else nullcontext():
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
        if isinstance(self.mlp, MoE):
            y_BTD, routing = self.mlp(x_BTD)
            return (mixed_BTD + y_BTD, *routing)
        if self.mlp_chunk is not None:
            return mixed_BTD + in_chunks(self.mlp, self.mlp_chunk, x_BTD, *for_gate)
        return mixed_BTD + self.mlp(x_BTD, *for_gate)
