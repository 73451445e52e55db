"""Floating-point operations of a training step, for MFU. Matmuls only; a multiply-add is two."""

from __future__ import annotations

from sisa_dist.config import ModelConfig


def training_flops_per_token(config: ModelConfig, seq_len: int) -> float:
    """Forward and backward, averaged over a causal sequence of seq_len; recomputation is not counted."""
    d, d_h, heads, kv_heads = config.d_model, config.width_per_head, config.n_heads, config.kv_heads
    per_token = float(d * config.padded_vocab_size)
    mlp_matrices = 3 if config.mlp == "swiglu" else 2
    for d_s in config.layer_d_s:
        per_token += d * d_h * (2 * heads + 2 * kv_heads) + mlp_matrices * d * config.d_ff
        if d_s:
            per_token += d * (heads * d_s + kv_heads * d_s + kv_heads * d_s // 2 + kv_heads)
        # A query meets (T + 1) / 2 keys on average: scores of width d_h + d_s, values of width d_h.
        per_token += heads * (2 * d_h + d_s) * (seq_len + 1) / 2
    return 3 * 2 * per_token
