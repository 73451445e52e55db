"""What feeds forward in a block: an MLP, with or without the mixer's C_t at its gate, a mixture of them, or nothing."""

from __future__ import annotations

from sisa_dist.config import ModelConfig
from sisa_dist.model.mlp import GELU, MLP_MATRICES, SwiGLU
from sisa_dist.model.moe import MoE
from sisa_dist.model.ssm_gated import SSMGatedSwiGLU


def feed_forward(config: ModelConfig, layer: int) -> SwiGLU | GELU | MoE | None:
    """Of the kind the config names for the layer; None where it has none."""
    kind, d, d_ff, bias = config.layer_mlps[layer], config.d_model, config.d_ff, config.mlp_bias
    if kind == "none":
        return None
    if kind == "moe":
        return MoE(config)
    if kind == "gelu":
        return GELU(d, d_ff, bias=bias)
    multipliers = config.multiplier_options.mlp_gate, config.multiplier_options.mlp_down
    if config.layer_ffns[layer] == "ssm_gated":
        heads = {"n_heads": config.n_heads, "d_s": config.layer_d_s[layer]}
        return SSMGatedSwiGLU(d, d_ff, bias=bias, multipliers=multipliers, **heads)
    return SwiGLU(d, d_ff, bias=bias, multipliers=multipliers)


def feed_forward_multiply_adds(config: ModelConfig, layer: int) -> float:
    """Of a forward, per token, matmuls only; of a mixture the experts that a token goes to, not those that stand by."""
    kind = config.layer_mlps[layer]
    if kind == "moe":
        assert config.moe is not None
        active = config.moe.top_k * config.expert_d_ff + config.shared_d_ff
        return config.d_model * (3 * active + config.experts)
    width = MLP_MATRICES[kind] * config.d_model
    if config.layer_ffns[layer] == "ssm_gated":
        width += config.layer_d_s[layer]
    return width * config.d_ff
