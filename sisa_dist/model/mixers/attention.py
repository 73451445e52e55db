"""Causal softmax attention with RoPE and grouped-query heads: the Transformer SISA is compared with."""

from __future__ import annotations

from torch import Tensor, nn

from sisa_dist.config import AttentionConfig, ModelConfig
from sisa_dist.model.mixers.base import Cache, Mixer
from sisa_dist.model.norm import RMSNorm
from sisa_dist.model.rope import RopeTables, apply_rope
from sisa_dist.ops import AttentionCache, causal_attention


class AttentionScore(nn.Module):
    """The score as a submodule, so that context parallelism can put another in its place."""

    def __init__(self, attention: AttentionConfig) -> None:
        super().__init__()
        self.backend = attention.backend

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, *, doc_ids: Tensor | None, cache: AttentionCache | None
    ) -> Tensor:
        if cache is not None:
            return cache.attend(q, k, v, doc_ids=doc_ids)
        return causal_attention(q, k, v, doc_ids=doc_ids, backend=self.backend)


class Attention(Mixer):
    """y = softmax(q·k/√d_h) v per head, out = W_O y. Vaswani et al. 2017; RoPE on q and k."""

    def __init__(self, config: ModelConfig, layer: int, attention: AttentionConfig) -> None:
        super().__init__(config, layer, attention)
        d, d_h = config.d_model, config.width_per_head
        self.head_dim = d_h
        self.wq = nn.Linear(d, config.n_heads * d_h, bias=config.qkv_bias)
        self.wk = nn.Linear(d, config.kv_heads * d_h, bias=config.qkv_bias)
        self.wv = nn.Linear(d, config.kv_heads * d_h, bias=config.qkv_bias)
        self.wo = nn.Linear(config.n_heads * d_h, d, bias=config.output_bias)
        self.q_norm, self.k_norm = qk_norms(config)
        self.score = AttentionScore(attention)

    @staticmethod
    def new_cache() -> AttentionCache:
        return AttentionCache()

    @staticmethod
    def multiply_adds(config: ModelConfig, layer: int, seq_len: int) -> float:
        return attention_multiply_adds(config, seq_len)

    def forward(
        self, x_BTD: Tensor, rope: RopeTables, doc_ids: Tensor | None = None, cache: Cache | None = None
    ) -> Tensor:
        assert cache is None or isinstance(cache, AttentionCache)
        q_BHTK = apply_rope(self.q_norm(split_heads(self.wq(x_BTD), self.head_dim)), rope)
        k_BHTK = apply_rope(self.k_norm(split_heads(self.wk(x_BTD), self.head_dim)), rope)
        v_BHTK = split_heads(self.wv(x_BTD), self.head_dim)
        y_BHTK = self.score(q_BHTK, k_BHTK, v_BHTK, doc_ids=doc_ids, cache=cache)
        return self.wo(merge_heads(y_BHTK))


def attention_multiply_adds(config: ModelConfig, seq_len: int, *, score_channels: int = 0) -> float:
    """Of the projections to q, k, v and back, and of a score with `score_channels` beside those of a head."""
    d, d_h, heads = config.d_model, config.width_per_head, config.n_heads
    # A query meets (T + 1) / 2 keys on average: scores of width d_h and more, values of width d_h.
    return d * d_h * 2 * (heads + config.kv_heads) + heads * (2 * d_h + score_channels) * (seq_len + 1) / 2


def qk_norms(config: ModelConfig) -> tuple[nn.Module, nn.Module]:
    """The norms of each head's q and k, one gain shared by all heads (Dehghani et al. 2023); identities without."""
    if not config.qk_norm:
        return nn.Identity(), nn.Identity()
    d_h = config.width_per_head
    return RMSNorm(d_h, eps=config.norm_eps), RMSNorm(d_h, eps=config.norm_eps)


def split_heads(x_BTD: Tensor, width: int) -> Tensor:
    """[B, T, H·width] → [B, H, T, width]; H is whatever this rank holds."""
    return x_BTD.view(*x_BTD.shape[:2], -1, width).transpose(1, 2)


def merge_heads(x_BHTK: Tensor) -> Tensor:
    """[B, H, T, width] → [B, T, H·width]."""
    return x_BHTK.transpose(1, 2).flatten(2)
