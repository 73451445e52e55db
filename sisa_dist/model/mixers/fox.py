"""FoX, the forgetting transformer (Lin et al. 2025, arXiv 2503.02130): softmax attention with a forget gate.

    log f_t = log σ(w_fᵀ x_t + b_f)              L_t = Σ_{k≤t} log f_k              per query head, fp32
    s_ij    = q_i·k_j/√d_h  +  L_i − L_j         y_i = Σ_j softmax_{j≤i}(s_ij) v_j         out = W_O y

No rotary embedding. FoX-Pro besides, z̃ being W_K x or W_V x of a head, a_t = σ(w_aᵀ x_t) one scalar per kv head:

    z_t = a_t z̃_{t−1} + (1 − a_t) z̃_t  for k and v, z̃ before the document's first token being 0
    q ← RMSNorm(q), k ← RMSNorm(k) per head, after the shift          out = W_O (RMSNorm(y) per head · σ(W_G x))

Gains of the q and k norms are shared by heads, as in the paper's experiments; those of the output norm are not.
"""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sisa_dist.config import AttentionConfig, FoxConfig, ModelConfig, UserError
from sisa_dist.model.init import Constant, Init, Normal
from sisa_dist.model.mixers.attention import attention_multiply_adds, merge_heads, qk_norms, split_heads
from sisa_dist.model.mixers.base import Cache, Mixer
from sisa_dist.model.precision import at_least_fp32
from sisa_dist.model.rope import RopeTables
from sisa_dist.ops import ForgettingCache, forgetting_attention


class ForgetGate(nn.Module):
    """log f = log σ(w_fᵀ x + b_f) ≤ 0 per query head, fp32 throughout; b_f starts at 0, which halves at every token."""

    fp32_in_forward = True  # read by the engines: bf16 must not reach these parameters

    def __init__(self, d_model: int, n_heads: int, *, std: float) -> None:
        super().__init__()
        self.init_rules: dict[str, Init] = {"weight": Normal(std), "bias": Constant(0.0)}
        self.weight = nn.Parameter(torch.empty(n_heads, d_model))
        self.bias = nn.Parameter(torch.empty(n_heads))

    def forward(self, x_BTD: Tensor) -> Tensor:
        """[B, H, T] fp32."""
        return F.logsigmoid(F.linear(at_least_fp32(x_BTD), self.weight, self.bias)).transpose(1, 2)


class HeadNorm(nn.Module):
    """RMSNorm over each head's channels, with a gain for every channel of every head; returns x's dtype."""

    init_rules: ClassVar[dict[str, Init]] = {"weight": Constant(1.0)}
    fp32_in_forward = True

    def __init__(self, n_heads: int, head_dim: int, *, eps: float) -> None:
        super().__init__()
        self.head_dim, self.eps = head_dim, eps
        self.weight = nn.Parameter(torch.empty(n_heads * head_dim))

    def forward(self, x_BTK: Tensor) -> Tensor:
        """[B, T, H·head_dim]"""
        heads = at_least_fp32(x_BTK).unflatten(-1, (-1, self.head_dim))
        return (F.rms_norm(heads, (self.head_dim,), None, self.eps).flatten(-2) * self.weight).to(x_BTK.dtype)


class FoxCache(ForgettingCache):
    """And what the shift of the next token needs: k and v of the last one, before their shift."""

    def __init__(self) -> None:
        super().__init__()
        self.unshifted: dict[str, Tensor] = {}


class FoxScore(nn.Module):
    """The score as a submodule, so that context parallelism can put another in its place."""

    def __init__(self, attention: AttentionConfig) -> None:
        super().__init__()
        self.leaf, self.backend = attention.leaf, attention.backend

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, log_f: Tensor, *, doc_ids: Tensor | None, cache: FoxCache | None
    ) -> Tensor:
        if cache is not None:
            return cache.attend(q, k, v, log_f, doc_ids=doc_ids, leaf=self.leaf, backend=self.backend)
        return forgetting_attention(q, k, v, log_f, doc_ids=doc_ids, leaf=self.leaf, backend=self.backend)


class FoX(Mixer):
    """The layer of the equations above. x [B, T, d_model] → [B, T, d_model]."""

    def __init__(self, config: ModelConfig, layer: int, attention: AttentionConfig) -> None:
        super().__init__(config, layer, attention)
        d, d_h, heads, kv_heads = config.d_model, config.width_per_head, config.n_heads, config.kv_heads
        self.head_dim, self.pro = d_h, _pro(config)
        self.wq = nn.Linear(d, heads * d_h, bias=config.qkv_bias)
        self.wk = nn.Linear(d, kv_heads * d_h, bias=config.qkv_bias)
        self.wv = nn.Linear(d, kv_heads * d_h, bias=config.qkv_bias)
        self.forget = ForgetGate(d, heads, std=config.init_std)
        self.q_norm, self.k_norm = qk_norms(config, wanted=config.qk_norm or self.pro)
        if self.pro:
            self.k_shift = nn.Linear(d, kv_heads, bias=False)
            self.v_shift = nn.Linear(d, kv_heads, bias=False)
            self.output_norm = HeadNorm(heads, d_h, eps=config.norm_eps)
            self.output_gate = nn.Linear(d, heads * d_h, bias=False)
        self.wo = nn.Linear(heads * d_h, d, bias=config.output_bias)
        self.score = FoxScore(attention)

    @staticmethod
    def new_cache() -> FoxCache:
        return FoxCache()

    @staticmethod
    def multiply_adds(config: ModelConfig, layer: int, seq_len: int) -> float:
        gates = config.n_heads
        if _pro(config):
            gates += 2 * config.kv_heads + config.n_heads * config.width_per_head
        return config.d_model * gates + attention_multiply_adds(config, seq_len)

    def forward(
        self, x_BTD: Tensor, rope: RopeTables, doc_ids: Tensor | None = None, cache: Cache | None = None
    ) -> Tensor:
        assert cache is None or isinstance(cache, FoxCache)
        q_BHTK, k_BHTK, v_BHTK = (split_heads(w(x_BTD), self.head_dim) for w in (self.wq, self.wk, self.wv))
        if self.pro:
            k_BHTK = self._shifted("k", k_BHTK, self.k_shift(x_BTD), doc_ids, cache)
            v_BHTK = self._shifted("v", v_BHTK, self.v_shift(x_BTD), doc_ids, cache)
        q_BHTK, k_BHTK = self.q_norm(q_BHTK), self.k_norm(k_BHTK)
        y_BTK = merge_heads(self.score(q_BHTK, k_BHTK, v_BHTK, self.forget(x_BTD), doc_ids=doc_ids, cache=cache))
        if self.pro:
            y_BTK = self.output_norm(y_BTK) * torch.sigmoid(self.output_gate(x_BTD))
        return self.wo(y_BTK)

    def _shifted(
        self, name: str, z_BHTK: Tensor, mix_BTH: Tensor, doc_ids: Tensor | None, cache: FoxCache | None
    ) -> Tensor:
        """a_t z_{t−1} + (1 − a_t) z_t, mixed in fp32, in z's dtype."""
        z = at_least_fp32(z_BHTK)
        first = torch.zeros_like(z[:, :, :1]) if cache is None or not cache.length else cache.unshifted[name]
        if len(first) != len(z):
            raise UserError(f"cache: a chunk of {len(z)} rows does not continue {len(first)}: start a new cache")
        before = torch.cat((first, z[:, :, :-1]), dim=2)
        ids = doc_ids if cache is None else cache.documents(doc_ids)  # of the tokens held too
        if ids is not None:
            begins_BT = F.pad(ids.diff(dim=1) != 0, (1, 0), value=True)[:, -z.shape[2] :]
            before = before.masked_fill(begins_BT[:, None, :, None], 0.0)
        if cache is not None:
            cache.unshifted[name] = z[:, :, -1:].detach().clone()
        return torch.lerp(z, before, torch.sigmoid(at_least_fp32(mix_BTH)).transpose(1, 2)[..., None]).to(z_BHTK.dtype)


def _pro(config: ModelConfig) -> bool:
    return (config.fox or FoxConfig()).pro
