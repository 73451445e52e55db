"""Hymba: attention heads and state-space heads read one input side by side (Dong et al. 2024, arXiv 2411.13676).

    out = W_out (RMSNorm(attention) + RMSNorm(Mamba)) / 2          each norm over all channels, with its own gain

Both give the channels of `ssm`, so a head's values are ssm channels / n_heads wide. Attention reaches `hymba.window`
tokens back, and everything in a few global layers; meta tokens (model/meta.py) are the first of each document and stay
visible. The Mamba is that of `mamba:`, with norms in the paper's models. Their sharing of keys and values between two
layers is not here. Query heads share k and v heads as `n_kv_heads` says.
"""

from __future__ import annotations

from torch import Tensor, nn

from sisa_dist.config import AttentionConfig, ModelConfig
from sisa_dist.model.mixers.attention import merge_heads, qk_norms, split_heads
from sisa_dist.model.mixers.base import Cache, Mixer
from sisa_dist.model.mixers.mamba import Mamba, MambaCache
from sisa_dist.model.norm import RMSNorm
from sisa_dist.model.precision import at_least_fp32
from sisa_dist.model.rope import RopeTables, apply_rope
from sisa_dist.ops import AttentionCache, WindowCache, causal_attention, window_attention


class HymbaScore(nn.Module):
    """The score as a submodule, so that context parallelism can put another in its place."""

    def __init__(self, attention: AttentionConfig, *, window: int | None, sinks: int) -> None:
        super().__init__()
        self.backend, self.window, self.sinks = attention.backend, window, sinks

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, *, doc_ids: Tensor | None, cache: AttentionCache | WindowCache | None
    ) -> Tensor:
        if cache is not None:
            return cache.attend(q, k, v, doc_ids=doc_ids)
        if self.window is None:
            return causal_attention(q, k, v, doc_ids=doc_ids, backend=self.backend)
        return window_attention(q, k, v, window=self.window, sinks=self.sinks, doc_ids=doc_ids, backend=self.backend)


class HymbaCache:
    """What both kinds of heads keep."""

    def __init__(self, attention: AttentionCache | WindowCache) -> None:
        self.attention, self.mamba = attention, MambaCache()

    @property
    def length(self) -> int:
        """Tokens seen."""
        return self.mamba.length

    def documents(self, doc_ids_Bt: Tensor | None) -> Tensor | None:
        """As `held_and_coming` has it."""
        return self.mamba.documents(doc_ids_Bt)


class Hymba(Mixer):
    """The layer of the equation above. x [B, T, d_model] → [B, T, d_model]."""

    def __init__(self, config: ModelConfig, layer: int, attention: AttentionConfig) -> None:
        super().__init__(config, layer, attention)
        d, d_h, channels = config.d_model, config.width_per_head, config.ssm_width
        self.head_dim, self.value_dim = d_h, channels // config.n_heads
        self.window, self.sinks = config.window_of(layer), config.meta_tokens
        self.wq = nn.Linear(d, config.n_heads * d_h, bias=config.qkv_bias)
        self.wk = nn.Linear(d, config.kv_heads * d_h, bias=config.qkv_bias)
        self.wv = nn.Linear(d, config.kv_heads * self.value_dim, bias=config.qkv_bias)
        self.q_norm, self.k_norm = qk_norms(config)
        self.score = HymbaScore(attention, window=self.window, sinks=self.sinks)
        self.mamba = Mamba(config, layer, attention, output=False)
        self.attention_norm = RMSNorm(channels, eps=config.norm_eps)
        self.ssm_norm = RMSNorm(channels, eps=config.norm_eps)
        self.wout = nn.Linear(channels, d, bias=False)

    def new_cache(self) -> HymbaCache:  # type: ignore[override]
        return HymbaCache(
            AttentionCache() if self.window is None else WindowCache(window=self.window, sinks=self.sinks)
        )

    @staticmethod
    def multiply_adds(config: ModelConfig, layer: int, seq_len: int) -> float:
        d_h, value_dim = config.width_per_head, config.ssm_width // config.n_heads
        projections = config.d_model * (config.n_heads * d_h + config.kv_heads * (d_h + value_dim))
        score = (
            config.n_heads * (d_h + value_dim) * keys_per_query(seq_len, config.window_of(layer), config.meta_tokens)
        )
        return projections + score + Mamba.multiply_adds(config, layer, seq_len)  # W_out is among Mamba's

    def forward(
        self, x_BTD: Tensor, rope: RopeTables, doc_ids: Tensor | None = None, cache: Cache | None = None
    ) -> Tensor:
        assert cache is None or isinstance(cache, HymbaCache)
        caches = (None, None) if cache is None else (cache.attention, cache.mamba)
        q_BHTK = apply_rope(self.q_norm(split_heads(self.wq(x_BTD), self.head_dim)), rope)
        k_BHTK = apply_rope(self.k_norm(split_heads(self.wk(x_BTD), self.head_dim)), rope)
        v_BHTV = split_heads(self.wv(x_BTD), self.value_dim)
        attended_BTC = merge_heads(self.score(q_BHTK, k_BHTK, v_BHTV, doc_ids=doc_ids, cache=caches[0]))
        carried_BTC = self.mamba(x_BTD, rope, doc_ids, caches[1])
        both_BTC = self.attention_norm(at_least_fp32(attended_BTC)) + self.ssm_norm(at_least_fp32(carried_BTC))
        return self.wout((both_BTC / 2).to(x_BTD.dtype))


def keys_per_query(seq_len: int, window: int | None, sinks: int) -> float:
    """Visible to a query of one causal document, on average; `window` None: all before it."""
    if window is None or seq_len <= window:
        return (seq_len + 1) / 2
    return (_capped(seq_len, window) + _capped(seq_len - window, sinks)) / seq_len


def _capped(n: int, most: int) -> float:
    """Σ_{i=1}^{n} min(i, most)."""
    rising = min(n, most)
    return rising * (rising + 1) / 2 + (n - rising) * most
