"""Mamba-3: trapezoidal steps, a rotating state, several inputs a step (Lahoti et al. 2026, arXiv 2603.15569).

    Δ_t = softplus(W_dt u_t + dt_bias)      A_t = −f(W_A u_t), at most −1e-4      λ_t = σ(W_trap u_t)      per head
    B̃, C̃ = rot_Φ(RMSNorm(W_B u) + bias_B), rot_Φ(RMSNorm(W_C u) + bias_C)        Φ_t = Φ_{t−1} + π tanh(W_angle u_t) Δ_t
    h_t = e^{Δ_t A_t} (h_{t−1} + (1−λ_t) Δ_t B̃_{t−1} x_{t−1}ᵀ) + λ_t Δ_t B̃_t x_tᵀ
    y_t = C̃_tᵀ h_t + D x_t                 out = W_out (y · silu(z))             x, z = W_x u, W_z u

f is softplus, or since June 2026 1 + u for u ≥ 0 and 1/(1−u) below (`mamba3.decay: rational`). A document's first
token has no B̃_{t−1} x_{t−1}. Of d_state channels the first half turns, in adjacent pairs, by angles all heads share and
Δ of each head; biases start at 1. No convolution, no activation on x. The late term of step t+1 belongs to key t, so
in chunks (`ops.ssd`) key j weighs λ_jΔ_j + (1−λ_{j+1})Δ_{j+1} for all that come later and λ_jΔ_j for its own token:

    y_i = Σ_{j<i} e^{g_i−g_j} (λ_jΔ_j + (1−λ_{j+1})Δ_{j+1}) (C̃_i·B̃_j) x_j + λ_iΔ_i (C̃_i·B̃_i) x_i + D x_i

MIMO (`mamba3.rank` R > 1) is that of the authors' released code and its step reference (state-spaces/mamba,
modules/mamba3.py and tests/ops/tilelang/test_mamba3_mimo.py); the text of the paper was not compared. One state, R rows
of B̃ and C̃ a token, each with its biases, under one gain; x^r = x ⊙ m_x^r goes in by B̃^r, y^r = C̃^rᵀ h + D x^r comes
out by C̃^r, and Σ_r m_o^r ⊙ y^r ⊙ silu(z ⊙ m_z^r) goes to W_out. m_x, m_z, m_o are [R, P] a head and start at 1/R, 1 and
1/R. The released MIMO kernel pairs channels i and i + d_state/2, its reference adjacent ones, as here: the same but
for the order of rows. Rows of W_B and W_C are (group, r, channel) here and (r, group, channel) there. The optional
norm before W_out, off by default there, is left out.
"""

from __future__ import annotations

import math
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sisa_dist.config import AttentionConfig, ModelConfig
from sisa_dist.model.init import Constant, Init, InverseSoftplus
from sisa_dist.model.mixers.attention import merge_heads, split_heads
from sisa_dist.model.mixers.base import Cache, Mixer
from sisa_dist.model.mixers.mamba2 import Skip, continued, ssd_multiply_adds
from sisa_dist.model.mixers.recurrent import RecurrentCache, emptied
from sisa_dist.model.mixers.scans import NextStep, RunningPhase, Ssd
from sisa_dist.model.norm import RMSNorm
from sisa_dist.model.precision import at_least_fp32
from sisa_dist.model.rope import RopeTables
from sisa_dist.ops.rotation import turn

A_MOST = -1e-4
BC_EPS = 1e-5


class Rates3(nn.Module):
    """Δ, Δ·A and λ of the equations above, per head and fp32. dt_bias: Δ log-uniform in [1e-3, 1e-1] at W_dt u = 0."""

    init_rules: ClassVar[dict[str, Init]] = {"dt_bias": InverseSoftplus(1e-3, 1e-1)}
    fp32_in_forward = True  # read by the engines: bf16 must not reach these parameters

    def __init__(self, n_heads: int, form: Literal["softplus", "rational"]) -> None:
        super().__init__()
        self.form = form
        self.dt_bias = nn.Parameter(torch.empty(n_heads))

    def forward(self, dt_BTH: Tensor, a_BTH: Tensor, trap_BTH: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Each [B, H, T]."""
        # Contiguous before softplus: its gradient then has the layout that a compiler foresees.
        dt, u, trap = (at_least_fp32(z).transpose(1, 2).contiguous() for z in (dt_BTH, a_BTH, trap_BTH))
        delta_BHT = F.softplus(dt + self.dt_bias[:, None])
        # Where u > 0 the other branch has no pole to pass on.
        f = F.softplus(u) if self.form == "softplus" else torch.where(u >= 0, 1 + u, 1 / (1 - u.clamp(max=0)))
        return delta_BHT, delta_BHT * (-f).clamp(max=A_MOST), trap.sigmoid()


class HeadBias(nn.Module):
    """Adds `size` numbers of each head, fp32. Kept flat, so that it is a vector to the optimizer: no decay."""

    init_rules: ClassVar[dict[str, Init]] = {"bias": Constant(1.0)}
    fp32_in_forward = True

    def __init__(self, n_heads: int, size: int) -> None:
        super().__init__()
        self.size = size
        self.bias = nn.Parameter(torch.empty(n_heads * size))

    def forward(self, x_BGTS: Tensor) -> Tensor:
        """[B, G, T, size] → [B, H, T, size]: head h takes group h // (H / G)."""
        bias_GHS = self.bias.view(x_BGTS.shape[1], -1, self.size)
        return (at_least_fp32(x_BGTS)[:, :, None] + bias_GHS[:, :, None]).flatten(1, 2)


class Ranks(nn.Module):
    """m_x, m_z and m_o of the equations above: what makes R inputs and gates of one, and one output of R. fp32."""

    fp32_in_forward = True

    def __init__(self, n_heads: int, rank: int, head_dim: int) -> None:
        super().__init__()
        self.init_rules: dict[str, Init] = {"x": Constant(1 / rank), "z": Constant(1.0), "out": Constant(1 / rank)}
        self.x, self.z, self.out = (nn.Parameter(torch.empty(n_heads, rank, head_dim)) for _ in range(3))

    def forward(self, x_BHTP: Tensor, z_BHTP: Tensor) -> tuple[Tensor, Tensor]:
        """x and the factors of y, Σ_r of which is the output: both [B, H, T·R, P]."""
        x_BHTRP = at_least_fp32(x_BHTP)[:, :, :, None] * self.x[:, None]
        gate_BHTRP = F.silu(at_least_fp32(z_BHTP)[:, :, :, None] * self.z[:, None]) * self.out[:, None]
        return x_BHTRP.flatten(2, 3), gate_BHTRP.flatten(2, 3)


class Mamba3Cache(RecurrentCache):
    """The state of one layer after its last token, that token's B̃ and x, and Φ."""

    def __init__(self) -> None:
        super().__init__()
        self.state: Tensor | None = None  # [B, H, N, P] fp32
        self.last: tuple[Tensor, Tensor] | None = None  # B̃ [B, H, R, N] and x [B, H, R, P]
        self.phase: Tensor | None = None  # [B, H, 1, N/4] fp64, mod 2π

    def turn(self, theta_BHTm: Tensor) -> Tensor:
        """Φ of further tokens. It is never reset: only its differences within a document are used."""
        phase = theta_BHTm.cumsum(2, dtype=torch.float64)
        phase = (phase if self.phase is None else phase + self.phase).remainder(2 * math.pi)
        self.phase = phase[:, :, -1:].detach().clone()  # a view would hold on to the whole chunk, and to its graph
        return phase.to(theta_BHTm.dtype)


class Mamba3(Mixer):
    """The layer of the equations above. u [B, T, d_model] → [B, T, d_model]. RoPE's tables are not used."""

    def __init__(self, config: ModelConfig, layer: int, attention: AttentionConfig) -> None:
        super().__init__(config, layer, attention)
        d, ssm, channels, heads = config.d_model, config.state_space, config.ssm_width, config.ssm_heads
        options = config.mamba3_options
        self.head_dim, self.d_state, self.rank = ssm.head_dim, ssm.d_state, options.rank
        self.scan, self.phase, self.following = Ssd(ssm.chunk, options.rank), RunningPhase(), NextStep()
        self.wz = nn.Linear(d, channels, bias=False)
        self.wx = nn.Linear(d, channels, bias=False)
        self.wB = nn.Linear(d, ssm.n_groups * self.rank * ssm.d_state, bias=False)
        self.wC = nn.Linear(d, ssm.n_groups * self.rank * ssm.d_state, bias=False)
        self.wdt = nn.Linear(d, heads, bias=False)
        self.wA = nn.Linear(d, heads, bias=False)
        self.wtrap = nn.Linear(d, heads, bias=False)
        self.wangle = nn.Linear(d, ssm.d_state // 4, bias=False)
        self.rates = Rates3(heads, options.decay)
        self.B_norm = RMSNorm(ssm.d_state, eps=BC_EPS)
        self.C_norm = RMSNorm(ssm.d_state, eps=BC_EPS)
        self.B_bias = HeadBias(heads, self.rank * ssm.d_state)
        self.C_bias = HeadBias(heads, self.rank * ssm.d_state)
        self.mimo = Ranks(heads, self.rank, ssm.head_dim) if self.rank > 1 else None
        self.skip = Skip(heads)
        self.wout = nn.Linear(channels, d, bias=False)

    @staticmethod
    def new_cache() -> Mamba3Cache:
        return Mamba3Cache()

    @staticmethod
    def multiply_adds(config: ModelConfig, layer: int, seq_len: int) -> float:
        ssm, rank, heads = config.state_space, config.mamba3_options.rank, config.ssm_heads
        columns = 2 * config.ssm_width + 2 * ssm.n_groups * rank * ssm.d_state + 3 * heads + ssm.d_state // 4
        # B̃ and C̃ are each head's own.
        scan = ssd_multiply_adds(config, heads, seq_len, rank=rank, diagonal=True)
        return config.d_model * (columns + config.ssm_width) + scan

    def forward(
        self, x_BTD: Tensor, rope: RopeTables, doc_ids: Tensor | None = None, cache: Cache | None = None
    ) -> Tensor:
        assert cache is None or isinstance(cache, Mamba3Cache)
        new_B = None if cache is None else cache.advance(x_BTD, x_BTD.shape[1], doc_ids)
        delta_BHT, log_decay_BHT, lam_BHT = self.rates(self.wdt(x_BTD), self.wA(x_BTD), self.wtrap(x_BTD))
        angle_B1Tm = math.pi * at_least_fp32(self.wangle(x_BTD)).tanh()[:, None]
        theta_BHTm = angle_B1Tm * delta_BHT[..., None]
        phase_BHTm = self.phase(theta_BHTm, doc_ids) if cache is None else cache.turn(theta_BHTm)
        B_BHRN = self._turned(self.B_bias(self._normed(self.wB(x_BTD), self.B_norm)), phase_BHTm)
        C_BHRN = self._turned(self.C_bias(self._normed(self.wC(x_BTD), self.C_norm)), phase_BHTm)
        x_BHRP, z_BHTP = (split_heads(w(x_BTD), self.head_dim) for w in (self.wx, self.wz))
        if self.mimo is None:
            gate_BHRP = F.silu(at_least_fp32(z_BHTP))
        else:
            x_BHRP, gate_BHRP = self.mimo(x_BHRP, z_BHTP)

        own_BHT, carried_BHT = lam_BHT * delta_BHT, (1 - lam_BHT) * delta_BHT
        if cache is None:
            terms = x_BHRP, log_decay_BHT, B_BHRN, C_BHRN, own_BHT + self.following(carried_BHT, doc_ids)
            y_BHRP = self.scan(*terms, diagonal=own_BHT, doc_ids=doc_ids)
        else:
            y_BHRP = self._continued(x_BHRP, log_decay_BHT, B_BHRN, C_BHRN, own_BHT, carried_BHT, doc_ids, new_B, cache)
        y_BHRP = (y_BHRP + self.skip(x_BHRP)) * gate_BHRP
        if self.mimo is not None:
            y_BHRP = y_BHRP.unflatten(2, (-1, self.rank)).sum(3)
        return self.wout(merge_heads(y_BHRP).to(x_BTD.dtype))

    def _normed(self, x_BTD: Tensor, norm: RMSNorm) -> Tensor:
        """[B, T, G·R·N] → [B, G, T, R·N], each row of N normed."""
        x_BGTS = split_heads(x_BTD, self.rank * self.d_state)
        return norm(x_BGTS.unflatten(-1, (self.rank, self.d_state))).flatten(-2)

    def _turned(self, x_BHTS: Tensor, phase_BHTm: Tensor) -> Tensor:
        """[B, H, T, R·N] → [B, H, T·R, N], the first half of each row's channels turned by its token's Φ."""
        x_BHTRN = x_BHTS.unflatten(-1, (self.rank, self.d_state))
        return turn(x_BHTRN, phase_BHTm[:, :, :, None]).flatten(2, 3)

    def _continued(
        self,
        x: Tensor,
        log_decay_BHT: Tensor,
        B: Tensor,
        C: Tensor,
        own_BHT: Tensor,
        carried_BHT: Tensor,
        doc_ids: Tensor | None,
        new_B: Tensor | None,
        cache: Mamba3Cache,
    ) -> Tensor:
        """As the recurrence has it: what the last token seen still gives enters the state with the first of these."""
        T, state = own_BHT.shape[2], cache.state
        if cache.last is not None and state is not None:
            B_last, x_last = cache.last
            late = B_last.mT @ x_last.to(B_last.dtype) * carried_BHT[:, :, :1, None]
            state = emptied(state + late.to(state.dtype), new_B)
        y, cache.state = continued(
            *(x, log_decay_BHT, B, C, own_BHT + self.following(carried_BHT, doc_ids)),
            state=state,
            chunk=self.scan.chunk,
            rank=self.rank,
            doc_ids=doc_ids,
            diagonal=None if T == 1 else own_BHT,
        )
        cache.last = B[:, :, -self.rank :].detach().clone(), x[:, :, -self.rank :].detach().clone()
        return y
