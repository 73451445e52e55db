"""The feed-forward part of a block by its name in the config, and what it costs."""

from __future__ import annotations

from sisa_dist.config import ModelConfig
from sisa_dist.model.mlp import GELU, MLP_MATRICES, SwiGLU
from sisa_dist.model.moe import MoE


def feed_forward(config: ModelConfig, layer: int) -> SwiGLU | GELU | MoE | None:
    """Of the kind the config names for the layer; None where it has none."""
    kind = config.layer_mlps[layer]
    if kind == "none":
        return None
    if kind == "moe":
        return MoE(config)
    if kind == "gelu":
        return GELU(config.d_model, config.d_ff, bias=config.mlp_bias)
    by = config.multiplier_options
    return SwiGLU(config.d_model, config.d_ff, bias=config.mlp_bias, multipliers=(by.mlp_gate, by.mlp_down))


def feed_forward_multiply_adds(config: ModelConfig, layer: int) -> float:
    """Of a forward, per token; of a mixture the experts that a token goes to, not those that stand by."""
    kind = config.layer_mlps[layer]
    if kind == "moe":
        assert config.moe is not None
        active = config.moe.top_k * config.expert_d_ff + config.shared_d_ff
        return config.d_model * (3 * active + config.experts)
    return MLP_MATRICES[kind] * config.d_model * config.d_ff
