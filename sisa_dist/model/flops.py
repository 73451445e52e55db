"""Floating-point operations of a training step, for MFU. Matmuls only; a multiply-add is two."""

from __future__ import annotations

from sisa_dist.config import ModelConfig
from sisa_dist.model.feed_forward import feed_forward_multiply_adds
from sisa_dist.model.mixers import MIXERS


def training_flops_per_token(config: ModelConfig, seq_len: int) -> float:
    """Forward and backward, averaged over a causal sequence of seq_len; recomputation is not counted."""
    per_token = float(config.d_model * config.padded_vocab_size)
    for layer, mixer in enumerate(config.layer_mixers):
        per_token += MIXERS[mixer].multiply_adds(config, layer, seq_len)
        per_token += feed_forward_multiply_adds(config, layer)
    return 3 * 2 * per_token
