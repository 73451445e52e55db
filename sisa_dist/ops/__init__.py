"""Attention as functions of tensors: the SISA score on its exact paths, plain attention, decode caches, linear recurrences.

Knows nothing of modules, configs or processes. Everything runs with autocast off and casts explicitly.
"""

from sisa_dist.ops.attention import causal_attention
from sisa_dist.ops.decode import AttentionCache, SisaCache
from sisa_dist.ops.score import sisa_attention
from sisa_dist.ops.ssd import ssd, ssd_step

__all__ = ["AttentionCache", "SisaCache", "causal_attention", "sisa_attention", "ssd", "ssd_step"]
