"""Mixing as functions of tensors: the SISA score on its exact paths, plain and forgetting attention, caches, linear
recurrences.

Knows nothing of modules, configs or processes. Everything runs with autocast off and casts explicitly.
"""

from sisa_dist.ops.attention import causal_attention
from sisa_dist.ops.decode import AttentionCache, ForgettingCache, SigmoidSisaCache, SisaCache
from sisa_dist.ops.documents import held_and_coming, tokens_seen
from sisa_dist.ops.forgetting import forgetting_attention
from sisa_dist.ops.phase import running_phase
from sisa_dist.ops.score import sisa_attention
from sisa_dist.ops.selective import selective_scan
from sisa_dist.ops.sigmoid import sigmoid_sisa_attention
from sisa_dist.ops.ssd import ssd, ssd_step
from sisa_dist.ops.window import WindowCache, window_attention

__all__ = [
    "AttentionCache",
    "ForgettingCache",
    "SigmoidSisaCache",
    "SisaCache",
    "WindowCache",
    "causal_attention",
    "forgetting_attention",
    "held_and_coming",
    "running_phase",
    "selective_scan",
    "sigmoid_sisa_attention",
    "sisa_attention",
    "ssd",
    "ssd_step",
    "tokens_seen",
    "window_attention",
]
