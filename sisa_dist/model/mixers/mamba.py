"""Mamba: a selective state-space model whose channels each have d_state decays of their own (Gu & Dao 2023,
arXiv 2312.00752); Jamba's (Lieber et al. 2024, arXiv 2403.19887) with `mamba.norms`.

    x = silu(conv(W_x u))                               depthwise, causal, 4 taps
    dt, B, C = the rows of W_select x                   dt of dt_rank numbers; Jamba: an RMSNorm on each of the three
    Δ_t = softplus(W_dt dt_t + dt_bias)                 per channel, fp32
    h_t = e^{Δ_t A} h_{t−1} + Δ_t x_t B_tᵀ              A = −e^{A_log} [channels, d_state], fp32
    out = W_out ((h_t C_t + D x_t) · silu(W_z u))

Of `ssm` only d_state, the width, conv and chunk are read. Jamba is a pattern of layers: attention without positions
(rotary_fraction 0) at i mod 8 = 4, this elsewhere. How h is computed in chunks: `sisa_dist.ops.selective`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sisa_dist.config import AttentionConfig, ModelConfig
from sisa_dist.model.init import Init, InverseSoftplus, LogIndex, Uniform
from sisa_dist.model.mixers.base import Cache, Mixer
from sisa_dist.model.mixers.mamba2 import CausalConv, Skip
from sisa_dist.model.mixers.recurrent import RecurrentCache, emptied
from sisa_dist.model.mixers.scans import SelectiveScan
from sisa_dist.model.norm import RMSNorm
from sisa_dist.model.precision import at_least_fp32
from sisa_dist.model.rope import RopeTables
from sisa_dist.ops import selective_scan


class ChannelRates(nn.Module):
    """Δ = softplus(dt + dt_bias), and A = −e^{A_log}, per channel and fp32.

    dt_bias: Δ log-uniform in [1e-3, 1e-1] at dt = 0; A_log = log(1 … d_state) in every channel.
    """

    fp32_in_forward = True  # read by the engines: bf16 must not reach these parameters

    def __init__(self, channels: int, d_state: int) -> None:
        super().__init__()
        self.d_state = d_state
        self.init_rules: dict[str, Init] = {"dt_bias": InverseSoftplus(1e-3, 1e-1), "A_log": LogIndex(period=d_state)}
        self.dt_bias = nn.Parameter(torch.empty(channels))
        # One vector, channel by channel: a matrix would be weight-decayed.
        self.A_log = nn.Parameter(torch.empty(channels * d_state))

    def forward(self, dt_BTD: Tensor) -> tuple[Tensor, Tensor]:
        """Δ [B, T, D] and A [D, N], fp32."""
        return F.softplus(at_least_fp32(dt_BTD) + self.dt_bias), -self.A_log.view(-1, self.d_state).exp()


class MambaCache(RecurrentCache):
    """The state of one layer and the inputs its convolution still reaches."""

    def __init__(self) -> None:
        super().__init__()
        self.state: Tensor | None = None  # [B, D, N] fp32
        self.before: Tensor | None = None  # [B, taps − 1, D]


class Mamba(Mixer):
    """The layer of the equations above. u [B, T, d_model] → [B, T, d_model]. RoPE's tables are not used.

    Without `output` there is no W_out, and what it would read is given: [B, T, channels] in at least fp32.
    """

    def __init__(self, config: ModelConfig, layer: int, attention: AttentionConfig, *, output: bool = True) -> None:
        super().__init__(config, layer, attention)
        d, ssm, channels = config.d_model, config.state_space, config.ssm_width
        self.widths, self.scan = [config.dt_rank, ssm.d_state, ssm.d_state], SelectiveScan(ssm.chunk)
        self.wz = nn.Linear(d, channels, bias=False)
        self.wx = nn.Linear(d, channels, bias=False)
        # One matrix for three: its columns are cut, not its rows, and so one sum over ranks serves all.
        self.wselect = nn.Linear(channels, sum(self.widths), bias=False)
        self.wdt = nn.Linear(config.dt_rank, channels, bias=False)
        self.wdt.init_rules = {"weight": Uniform(config.dt_rank**-0.5)}  # type: ignore[assignment]
        self.conv_x = CausalConv(channels, ssm.conv)
        self.rates = ChannelRates(channels, ssm.d_state)
        self.skip = Skip(channels)
        self.dt_norm, self.B_norm, self.C_norm = (
            RMSNorm(width, eps=config.norm_eps) if config.mamba_options.norms else nn.Identity()
            for width in self.widths
        )
        self.wout = nn.Linear(channels, d, bias=False) if output else None

    @staticmethod
    def new_cache() -> MambaCache:
        return MambaCache()

    @staticmethod
    def multiply_adds(config: ModelConfig, layer: int, seq_len: int) -> float:
        # Of the scan only y = h C is a matrix product; making h takes about 2 log₂(chunk) more of d_state a channel.
        d_state, rank = config.state_space.d_state, config.dt_rank
        return config.ssm_width * (3 * config.d_model + 2 * (rank + d_state) + d_state)

    def forward(
        self, x_BTD: Tensor, rope: RopeTables, doc_ids: Tensor | None = None, cache: Cache | None = None
    ) -> Tensor:
        assert cache is None or isinstance(cache, MambaCache)
        z_BTD = self.wz(x_BTD)
        new_B = None if cache is None else cache.advance(x_BTD, x_BTD.shape[1], doc_ids)
        before = None if cache is None else emptied(cache.before, new_B)
        channels_BTD, before = self.conv_x(self.wx(x_BTD), doc_ids, before)
        dt_BTR, B_BTN, C_BTN = self.wselect(channels_BTD).split(self.widths, dim=-1)
        delta_BTD, A_DN = self.rates(self.wdt(self.dt_norm(dt_BTR)))
        terms = channels_BTD, delta_BTD, A_DN, self.B_norm(B_BTN), self.C_norm(C_BTN)
        if cache is None:
            y_BTD = self.scan(*terms, doc_ids=doc_ids)
        else:
            with torch.no_grad():
                state = emptied(cache.state, new_B)
                y_BTD, cache.state = selective_scan(*terms, chunk=self.scan.chunk, state=state, doc_ids=doc_ids)
            cache.before = before
        # A channel is a head one channel wide.
        y_BTD = y_BTD + self.skip(channels_BTD.mT[..., None])[..., 0].mT
        y_BTD = y_BTD * F.silu(at_least_fp32(z_BTD))
        return y_BTD if self.wout is None else self.wout(y_BTD.to(x_BTD.dtype))
