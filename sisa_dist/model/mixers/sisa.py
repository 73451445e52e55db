"""SISA: softmax attention whose score carries a state-space model's importance term (arXiv 2606.02332).

    log α_t = −softplus(w_αᵀ x_t + b_α)          g_t = Σ_{k≤t} log α_k
    θ_t     = W_θ x_t                             Φ_t = Σ_{k≤t} θ_k
    s_ij    = q_i·k_j/√d_h  +  λ · e^{g_i − g_j} · C_iᵀ R(Φ_j − Φ_i) B_j        (i ≥ j)
    y_i     = Σ_j softmax_j(s_ij) v_j             out = W_O y

One RMS-normed x feeds every projection. With grouped-query heads B, α and θ belong to the kv head, C and λ to the
query head (ours; n_kv_heads = n_heads is the paper). Without decay or rotation (`model.sisa`) log α or θ is 0 and has
no parameters. Where d_s is learned a gate multiplies B (gates.py). How s is computed without ever forming it:
`sisa_dist.ops`.
"""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sisa_dist.config import AttentionConfig, ModelConfig
from sisa_dist.model.gates import gated
from sisa_dist.model.init import Constant, Init, Normal
from sisa_dist.model.mixers.attention import attention_multiply_adds, merge_heads, qk_norms, split_heads
from sisa_dist.model.mixers.base import Cache, Mixer
from sisa_dist.model.mixers.ssmax import ssmax
from sisa_dist.model.precision import at_least_fp32
from sisa_dist.model.rope import RopeTables, apply_rope
from sisa_dist.ops import SisaCache, sisa_attention


class Decay(nn.Module):
    """log α = −softplus(w_αᵀ x + b_α) ≤ 0 per kv head, fp32 throughout. b_α = −5: a half-life of ≈ 103 tokens.

    `log_alpha_min` is the declared bound that lets the score run as one SDPA call; log α is clamped to it.
    """

    fp32_in_forward = True  # read by the engines: bf16 must not reach these parameters

    def __init__(self, d_model: int, n_heads: int, *, log_alpha_min: float | None, std: float) -> None:
        super().__init__()
        self.init_rules: dict[str, Init] = {"weight": Normal(std), "bias": Constant(-5.0)}
        self.log_alpha_min = log_alpha_min
        self.logged: Tensor | None = None  # [sum of means of log α, forwards] of training since the last reset
        self.weight = nn.Parameter(torch.empty(n_heads, d_model))
        self.bias = nn.Parameter(torch.empty(n_heads))

    def forward(self, x_BTD: Tensor) -> Tensor:
        """[B, H_kv, T] fp32."""
        # Contiguous, as its gradient will be: of two layouts torch 2.13's compiler foresees softplus_backward wrongly.
        raw_BHT = F.linear(at_least_fp32(x_BTD), self.weight, self.bias).transpose(1, 2).contiguous()
        log_alpha_BHT = -F.softplus(raw_BHT)
        if self.log_alpha_min is not None:
            log_alpha_BHT = log_alpha_BHT.clamp(min=self.log_alpha_min)
        if self.training and torch.is_grad_enabled():
            mean = log_alpha_BHT.detach().mean()
            new = torch.stack((mean, torch.ones_like(mean)))
            self.logged = new if self.logged is None else self.logged + new
        return log_alpha_BHT


class Importance(nn.Module):
    """λ = softplus(λ_raw), one scalar per query head, fp32. λ_raw = −1: λ ≈ 0.313."""

    init_rules: ClassVar[dict[str, Init]] = {"lambda_raw": Constant(-1.0)}
    fp32_in_forward = True

    def __init__(self, n_heads: int) -> None:
        super().__init__()
        self.lambda_raw = nn.Parameter(torch.empty(n_heads))

    def forward(self) -> Tensor:
        return F.softplus(self.lambda_raw)


class SisaScore(nn.Module):
    """The score as a submodule, so that context parallelism can put another in its place."""

    def __init__(self, attention: AttentionConfig, log_alpha_min: float | None) -> None:
        super().__init__()
        self.path, self.leaf, self.log_alpha_min = attention.path, attention.leaf, log_alpha_min
        self.backend = attention.backend

    def forward(self, *qkvCB_log_alpha_theta_lam: Tensor, doc_ids: Tensor | None, cache: SisaCache | None) -> Tensor:
        if cache is not None:
            return cache.attend(*qkvCB_log_alpha_theta_lam, doc_ids=doc_ids)
        return sisa_attention(
            *qkvCB_log_alpha_theta_lam,
            doc_ids=doc_ids,
            path=self.path,
            leaf=self.leaf,
            log_alpha_min=self.log_alpha_min,
            backend=self.backend,
        )


class SISA(Mixer):
    """The layer of the equations above. x [B, T, d_model] → [B, T, d_model]."""

    def __init__(self, config: ModelConfig, layer: int, attention: AttentionConfig) -> None:
        super().__init__(config, layer, attention)
        d, d_h, d_s = config.d_model, config.width_per_head, config.layer_d_s[layer]
        n_heads, n_kv_heads = config.n_heads, config.kv_heads
        self.head_dim, self.d_s = d_h, d_s
        self.gives_C = config.layer_ffns[layer] == "ssm_gated"
        self.wq = nn.Linear(d, n_heads * d_h, bias=config.qkv_bias)
        self.wk = nn.Linear(d, n_kv_heads * d_h, bias=config.qkv_bias)
        self.wv = nn.Linear(d, n_kv_heads * d_h, bias=config.qkv_bias)
        self.wc = nn.Linear(d, n_heads * d_s, bias=False)
        self.wb = nn.Linear(d, n_kv_heads * d_s, bias=False)
        terms, log_alpha_min = config.score_terms, config.log_alpha_min
        self.wtheta = self.decay = None
        if terms.rotation:
            self.wtheta = nn.Linear(d, n_kv_heads * d_s // 2, bias=False)
            self.wtheta.init_rules = {"weight": Normal(0.01)}  # type: ignore[assignment]  # sisa.md §1
        if terms.decay:
            self.decay = Decay(d, n_kv_heads, log_alpha_min=log_alpha_min, std=config.init_std)
        else:
            log_alpha_min = 0.0  # nothing can overflow, so one call is exact at any length
        self.importance = Importance(n_heads)
        self.wo = nn.Linear(n_heads * d_h, d, bias=config.output_bias)
        self.q_norm, self.k_norm = qk_norms(config)
        self.ssmax = ssmax(n_heads, config.ssmax)
        self.score: nn.Module = SisaScore(attention, log_alpha_min)

    @staticmethod
    def new_cache() -> SisaCache:
        return SisaCache()

    def statistics(self) -> dict[str, Tensor]:
        """What the metrics log of this layer: λ [H] and, once trained, the mean log α since `reset_statistics`."""
        found = {"lambda": F.softplus(self.importance.lambda_raw.detach().float())}
        if self.decay is not None and self.decay.logged is not None:
            found["mean_log_alpha"] = self.decay.logged[0] / self.decay.logged[1]
        return found

    def reset_statistics(self) -> None:
        if self.decay is not None:
            self.decay.logged = None

    @staticmethod
    def multiply_adds(config: ModelConfig, layer: int, seq_len: int) -> float:
        heads, kv_heads, d_s = config.n_heads, config.kv_heads, config.layer_d_s[layer]
        terms = config.score_terms
        width = heads * d_s + kv_heads * d_s + terms.rotation * kv_heads * d_s // 2 + terms.decay * kv_heads
        return config.d_model * width + attention_multiply_adds(config, seq_len, score_channels=d_s)

    def forward(
        self,
        x_BTD: Tensor,
        rope: RopeTables,
        doc_ids: Tensor | None = None,
        cache: Cache | None = None,
        gate_P: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        assert cache is None or isinstance(cache, SisaCache)
        q_BHTK = apply_rope(self.q_norm(split_heads(self.wq(x_BTD), self.head_dim)), rope)
        k_BHTK = apply_rope(self.k_norm(split_heads(self.wk(x_BTD), self.head_dim)), rope)
        v_BHTK = split_heads(self.wv(x_BTD), self.head_dim)
        C_BHTS = split_heads(self.wc(x_BTD), self.d_s)
        B_BHTS = split_heads(self.wb(x_BTD), self.d_s)
        if gate_P is not None:
            B_BHTS = gated(B_BHTS, gate_P)
        lam_H = self.importance()
        if self.wtheta is not None:
            theta_BHTP = at_least_fp32(split_heads(self.wtheta(x_BTD), self.d_s // 2))  # its running sum must be fp32
        else:
            theta_BHTP = lam_H.new_zeros(*B_BHTS.shape[:3], self.d_s // 2)
        log_alpha_BHT = lam_H.new_zeros(B_BHTS.shape[:3]) if self.decay is None else self.decay(x_BTD)
        unscaled_C_BHTS = C_BHTS
        if self.ssmax is not None:
            q_BHTK, C_BHTS = self.ssmax(q_BHTK, C_BHTS, doc_ids=doc_ids, cache=cache)
        y_BHTK = self.score(
            q_BHTK, k_BHTK, v_BHTK, C_BHTS, B_BHTS, log_alpha_BHT, theta_BHTP, lam_H, doc_ids=doc_ids, cache=cache
        )
        out_BTD = self.wo(merge_heads(y_BHTK))
        return (out_BTD, unscaled_C_BHTS) if self.gives_C else out_BTD
