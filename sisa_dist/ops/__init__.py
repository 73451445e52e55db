"""Attention as functions of tensors: the SISA score on its exact paths, plain and forgetting attention, caches.

Knows nothing of modules, configs or processes. Everything runs with autocast off and casts explicitly.
"""

from sisa_dist.ops.attention import causal_attention
from sisa_dist.ops.decode import AttentionCache, ForgettingCache, SigmoidSisaCache, SisaCache
from sisa_dist.ops.documents import tokens_seen
from sisa_dist.ops.forgetting import forgetting_attention
from sisa_dist.ops.score import sisa_attention
from sisa_dist.ops.sigmoid import sigmoid_sisa_attention

__all__ = [
    "AttentionCache",
    "ForgettingCache",
    "SigmoidSisaCache",
    "SisaCache",
    "causal_attention",
    "forgetting_attention",
    "sigmoid_sisa_attention",
    "sisa_attention",
    "tokens_seen",
]
