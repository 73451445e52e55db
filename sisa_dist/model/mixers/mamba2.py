"""Mamba-2: a selective state-space model with one decay per head (Dao & Gu 2024, arXiv 2405.21060).

    x, B, C = silu(conv(W_x u)), silu(conv(W_B u)), silu(conv(W_C u))      depthwise, causal, 4 taps
    Δ_t = softplus(W_dt u_t + dt_bias)          A = −e^{A_log}             per head, fp32
    h_t = e^{Δ_t A} h_{t−1} + Δ_t B_t x_tᵀ      y_t = C_tᵀ h_t + D x_t
    out = W_out RMSNorm(y · silu(W_z u))                                   over all heads, or within each group

B and C are shared by the heads of a group. The released models stack norm and mixer without MLPs (`model.mlp: none`).
How h is computed in chunks: `sisa_dist.ops.ssd`. What is fused there into one projection is one matrix a kind here.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sisa_dist.config import AttentionConfig, ModelConfig
from sisa_dist.model.init import Constant, Init, InverseSoftplus, LogIndex, Uniform
from sisa_dist.model.mixers.attention import merge_heads, split_heads
from sisa_dist.model.mixers.base import Cache, Mixer
from sisa_dist.model.mixers.recurrent import RecurrentCache, emptied
from sisa_dist.model.mixers.scans import Ssd
from sisa_dist.model.norm import RMSNorm
from sisa_dist.model.precision import at_least_fp32
from sisa_dist.model.rope import RopeTables
from sisa_dist.model.scale import scaled
from sisa_dist.ops import ssd, ssd_step


class CausalConv(nn.Module):
    """silu(bias_c + Σ_k weight_ck · x_{t−taps+1+k,c}), fp32, in x's dtype. Nothing before a document's first token."""

    fp32_in_forward = True  # read by the engines: bf16 must not reach these parameters

    def __init__(self, channels: int, taps: int) -> None:
        super().__init__()
        self.taps = taps
        self.init_rules: dict[str, Init] = {"weight": Uniform(taps**-0.5), "bias": Constant(0.0)}
        self.weight = nn.Parameter(torch.empty(channels, taps))
        self.bias = nn.Parameter(torch.empty(channels))

    def forward(self, x_BTD: Tensor, doc_ids: Tensor | None, before_BkD: Tensor | None) -> tuple[Tensor, Tensor]:
        """`before` [B, taps−1, D]: the inputs before the first, of its document, None for none. Also gives those
        before the next, of the last token's document."""
        T, reach = x_BTD.shape[1], self.taps - 1
        if before_BkD is None:
            before_BkD = x_BTD.new_zeros(x_BTD.shape[0], reach, x_BTD.shape[2])
        all_BTD = torch.cat((before_BkD, x_BTD), dim=1)
        ids = None if doc_ids is None else F.pad(doc_ids, (reach, 0), mode="replicate")
        y_BTD: Tensor = self.bias + self.weight[:, -1] * at_least_fp32(x_BTD)
        for back in range(1, self.taps):
            earlier_BTD = at_least_fp32(all_BTD[:, reach - back : reach - back + T])
            if ids is not None:
                foreign_BT = ids[:, reach:] != ids[:, reach - back : reach - back + T]
                earlier_BTD = earlier_BTD.masked_fill(foreign_BT[..., None], 0.0)
            y_BTD = y_BTD + self.weight[:, -1 - back] * earlier_BTD
        before_BkD = all_BTD[:, T:].detach().clone()  # a view would hold on to the whole chunk, and to its graph
        if ids is not None:
            before_BkD = before_BkD.masked_fill((ids[:, T:] != ids[:, -1:])[..., None], 0.0)
        return F.silu(y_BTD).to(x_BTD.dtype), before_BkD


class Rates(nn.Module):
    """Δ = softplus(dt + dt_bias) and the log decay Δ·A, A = −e^{A_log}, per head and fp32.

    dt_bias: Δ log-uniform in [1e-3, 1e-1] at dt = 0; A_log = log(1 … H).
    """

    init_rules: ClassVar[dict[str, Init]] = {"dt_bias": InverseSoftplus(1e-3, 1e-1), "A_log": LogIndex()}
    fp32_in_forward = True

    def __init__(self, n_heads: int) -> None:
        super().__init__()
        self.dt_bias = nn.Parameter(torch.empty(n_heads))
        self.A_log = nn.Parameter(torch.empty(n_heads))

    def forward(self, dt_BTH: Tensor) -> tuple[Tensor, Tensor]:
        """Δ and ΔA, [B, H, T] fp32."""
        # Contiguous before softplus: its gradient then has the layout that a compiler foresees.
        dt_BHT = at_least_fp32(dt_BTH).transpose(1, 2).contiguous()
        delta_BHT = F.softplus(dt_BHT + self.dt_bias[:, None])
        return delta_BHT, -delta_BHT * self.A_log.exp()[:, None]


class Skip(nn.Module):
    """D, one number per head, fp32: y + D x."""

    init_rules: ClassVar[dict[str, Init]] = {"D": Constant(1.0)}
    fp32_in_forward = True

    def __init__(self, n_heads: int) -> None:
        super().__init__()
        self.D = nn.Parameter(torch.empty(n_heads))

    def forward(self, x_BHTP: Tensor) -> Tensor:
        """D x, fp32."""
        return self.D[:, None, None] * at_least_fp32(x_BHTP)


class Mamba2Cache(RecurrentCache):
    """The state of one layer and the inputs its convolutions still reach."""

    def __init__(self) -> None:
        super().__init__()
        self.state: Tensor | None = None  # [B, H, N, P] fp32
        self.before: list[Tensor | None] = [None] * 3  # of x, B, C: [B, taps − 1, channels]


class Mamba2(Mixer):
    """The layer of the equations above. u [B, T, d_model] → [B, T, d_model]. RoPE's tables are not used.

    `multipliers`: constants on what u is projected to, in the order z, x, B, C, dt. `norm` after_gate is the RMSNorm
    above; before_gate: RMSNorm(y) · silu(W_z u).
    """

    def __init__(
        self,
        config: ModelConfig,
        layer: int,
        attention: AttentionConfig,
        *,
        multipliers: tuple[float, ...] = (1.0,) * 5,
        norm: Literal["none", "before_gate", "after_gate"] = "after_gate",
    ) -> None:
        super().__init__(config, layer, attention)
        self.multipliers, self.norm_first = multipliers, norm == "before_gate"
        d, ssm, channels, heads = config.d_model, config.state_space, config.ssm_width, config.ssm_heads
        self.head_dim, self.d_state, self.scan = ssm.head_dim, ssm.d_state, Ssd(ssm.chunk)
        shared = ssm.n_groups * ssm.d_state
        self.wz = nn.Linear(d, channels, bias=False)
        self.wx = nn.Linear(d, channels, bias=False)
        self.wB = nn.Linear(d, shared, bias=False)
        self.wC = nn.Linear(d, shared, bias=False)
        self.wdt = nn.Linear(d, heads, bias=False)
        self.conv_x = CausalConv(channels, ssm.conv)
        self.conv_B = CausalConv(shared, ssm.conv)
        self.conv_C = CausalConv(shared, ssm.conv)
        self.rates = Rates(heads)
        self.skip = Skip(heads)
        self.gated_norm = (
            nn.Identity() if norm == "none" else RMSNorm(channels, eps=config.norm_eps, groups=ssm.n_groups)
        )
        self.wout = nn.Linear(channels, d, bias=False)

    @staticmethod
    def new_cache() -> Mamba2Cache:
        return Mamba2Cache()

    @staticmethod
    def multiply_adds(config: ModelConfig, layer: int, seq_len: int) -> float:
        ssm = config.state_space
        columns = 2 * config.ssm_width + 2 * ssm.n_groups * ssm.d_state + config.ssm_heads
        return config.d_model * (columns + config.ssm_width) + ssd_multiply_adds(config, ssm.n_groups, seq_len)

    def forward(
        self, x_BTD: Tensor, rope: RopeTables, doc_ids: Tensor | None = None, cache: Cache | None = None
    ) -> Tensor:
        assert cache is None or isinstance(cache, Mamba2Cache)
        by_z, by_x, by_B, by_C, by_dt = self.multipliers
        z_BTD = scaled(self.wz(x_BTD), by_z)
        delta_BHT, log_decay_BHT = self.rates(scaled(self.wdt(x_BTD), by_dt))
        new_B = None if cache is None else cache.advance(x_BTD, x_BTD.shape[1], doc_ids)
        before = [None] * 3 if cache is None else [emptied(x, new_B) for x in cache.before]
        channels_BTD, before_x = self.conv_x(scaled(self.wx(x_BTD), by_x), doc_ids, before[0])
        B_BTD, before_B = self.conv_B(scaled(self.wB(x_BTD), by_B), doc_ids, before[1])
        C_BTD, before_C = self.conv_C(scaled(self.wC(x_BTD), by_C), doc_ids, before[2])
        x_BHTP = split_heads(channels_BTD, self.head_dim)
        B_BGTN, C_BGTN = split_heads(B_BTD, self.d_state), split_heads(C_BTD, self.d_state)
        terms = x_BHTP, log_decay_BHT, B_BGTN, C_BGTN, delta_BHT
        if cache is None:
            y_BHTP = self.scan(*terms, doc_ids=doc_ids)
        else:
            state = emptied(cache.state, new_B)
            y_BHTP, cache.state = continued(*terms, state=state, chunk=self.scan.chunk, doc_ids=doc_ids)
            cache.before = [before_x, before_B, before_C]
        y_BTD, gate_BTD = merge_heads(y_BHTP + self.skip(x_BHTP)), F.silu(at_least_fp32(z_BTD))
        y_BTD = self.gated_norm(y_BTD) * gate_BTD if self.norm_first else self.gated_norm(y_BTD * gate_BTD)
        return self.wout(y_BTD.to(x_BTD.dtype))


def continued(
    *terms: Tensor,
    state: Tensor | None,
    chunk: int,
    rank: int = 1,
    doc_ids: Tensor | None = None,
    diagonal: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`ssd` of what follows `state`: one token by the recurrence, more in chunks. No gradients."""
    if terms[1].shape[2] == 1 and state is not None and diagonal is None:
        return ssd_step(*terms, state=state, rank=rank)
    with torch.no_grad():
        return ssd(*terms, state=state, chunk=chunk, rank=rank, doc_ids=doc_ids, diagonal=diagonal)


def ssd_multiply_adds(
    config: ModelConfig, groups: int, seq_len: int, *, rank: int = 1, diagonal: bool = False
) -> float:
    """A token's share of `ops.ssd`, as it is done: C·B once a group, its product with x and the states once a head."""
    ssm, heads = config.state_space, config.ssm_heads
    length = min(ssm.chunk, seq_len)
    tokens = -(-seq_len // length) * length / seq_len  # with those that fill up the last chunk
    own = 1 if diagonal and rank > 1 else 0  # a token's own rows meet its x in a small product by themselves
    within = rank * rank * (length * groups * ssm.d_state + (length + own) * heads * ssm.head_dim)
    states = (2 if seq_len > length else 1) * rank * heads * ssm.d_state * ssm.head_dim
    return tokens * (within + states)
