"""What feeds forward in a block: one of the MLPs, with or without the mixer's C_t at its gate, or nothing."""

from __future__ import annotations

from sisa_dist.config import ModelConfig
from sisa_dist.model.mlp import GELU, MLP_MATRICES, MLPS, SwiGLU
from sisa_dist.model.ssm_gated import SSMGatedSwiGLU


def feed_forward(config: ModelConfig, layer: int) -> SwiGLU | GELU | None:
    """The MLP of a block, of the kind the config names for the layer; None where it has none."""
    kind, d, d_ff, bias = config.layer_mlps[layer], config.d_model, config.d_ff, config.mlp_bias
    if config.layer_ffns[layer] == "ssm_gated":
        return SSMGatedSwiGLU(d, d_ff, bias=bias, n_heads=config.n_heads, d_s=config.layer_d_s[layer])
    return None if kind == "none" else MLPS[kind](d, d_ff, bias=bias)


def feed_forward_multiply_adds(config: ModelConfig, layer: int) -> int:
    """Of a forward, per token; matmuls only."""
    width = MLP_MATRICES[config.layer_mlps[layer]] * config.d_model
    if config.layer_ffns[layer] == "ssm_gated":
        width += config.layer_d_s[layer]
    return width * config.d_ff
