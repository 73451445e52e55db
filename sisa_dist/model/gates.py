"""Learned d_s: a hard-concrete gate on every pair of channels (2m, 2m+1) of every layer (Louizos et al. 2018,
arXiv 1712.01312), under a budget that is met in every step (ours).

    s        = σ((log u − log(1 − u) + k (log α − τ)) / β)   u uniform, k = 1 / (1 − hardness)
    z        = clip(s · (ζ − γ) + γ, 0, 1)                   B ← z B
    P(z ≠ 0) = σ(k (log α − τ) − β log(−γ / ζ))              m = mean over layers of 2 Σ P(z ≠ 0)

A gate multiplies B alone: on B and C it would stand in the score squared. All heads of a layer share it. With a budget
τ is such that m is the target, which falls from that of a new model to the budget until `anneal_from`. So gates
compete: τ depends on every log α, and a gate's gradient is what it is worth less the mean worth of those it would
displace. Of a Lagrange multiplier instead (Wang et al. 2020, arXiv 1910.04732) in simulations m stood at 30 of 24
when gates hardened, and the rest was cut at once. With `penalty` τ is 0 and penalty · m / max nats are added to the
loss.
Hardness rises from 0 to 1 between `anneal_from` and `anneal_until`. It stands for the temperature: it sharpens the gate
itself, so that the one that evaluation uses hardens too. At 1 the gates are those of the largest log α, as many as the
budget has, or with a penalty those of log α > 0.

Without noise (evaluation, decoding) z = clip(σ(k (log α − τ)) · (ζ − γ) + γ, 0, 1). Noise and share are set from
outside, step by step (engine/gates.py); the share is a buffer, so that a checkpoint knows how hard its gates are.
"""

from __future__ import annotations

import math
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from sisa_dist.config import ModelConfig
from sisa_dist.model.init import Constant, Init
from sisa_dist.model.precision import at_least_fp32

BETA, GAMMA, ZETA = 2 / 3, -0.1, 1.1  # Louizos et al.
START = 2.5  # log α of a new model: open, and 2 % of the draws are not
SHARPEST = 20.0  # most that k is: the gradient of an open gate grows as it does
_REACH = 10.0  # τ lies at most so far below the least log α, or above the largest
_ROUNDS, _CANDIDATES = 10, 33  # of τ: its interval is 32 times smaller after each round


class GateState(NamedTuple):
    """Of a forward that trains, before its step."""

    open_L: Tensor  # channels per head that evaluation has, in each layer of the gates
    expected_L: Tensor  # 2 Σ P(z ≠ 0)


class Gates(nn.Module):
    """() → (z [L, P], cost in nats): a row for each layer that has d_s, P = max / 2, fp32."""

    init_rules: ClassVar[dict[str, Init]] = {
        "log_alpha": Constant(START),
        "step": Constant(0.0),
        "share": Constant(0.0),
    }
    fp32_in_forward = True

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        assert config.learned_d_s is not None
        self.settings = config.learned_d_s
        self.layers = [layer for layer, d_s in enumerate(config.layer_d_s) if d_s]
        self.log_alpha = nn.Parameter(torch.empty(len(self.layers), self.settings.max // 2))
        self.step: Tensor
        self.share: Tensor
        self.register_buffer("step", torch.empty(1))  # of training, done: names the next one's noise
        self.register_buffer("share", torch.empty(1))  # of training.steps
        self.noise_LP: Tensor | None = None  # u of the step that runs
        self.part = 1.0  # of the cost that is counted here: tensor-parallel ranks each count theirs
        self.seen: GateState | None = None

    def forward(self) -> tuple[Tensor, Tensor]:
        log_alpha_LP = at_least_fp32(self.log_alpha)
        share = self.share[0].to(log_alpha_LP)  # offloaded buffers stay on the host
        settings = self.settings
        hard = share >= settings.anneal_until  # not by hardness, which rounding may leave just below 1
        hardness = ((share - settings.anneal_from) / (settings.anneal_until - settings.anneal_from)).clamp(0, 1)
        k = (1 / (1 - hardness)).clamp(max=SHARPEST)
        if settings.budget is not None:
            fallen = (share / max(settings.anneal_from, 1e-9)).clamp(max=1)
            begins = settings.max / (1 + math.exp(BETA * math.log(-GAMMA / ZETA) - START))  # m of a new model, at τ = 0
            target = begins + (settings.budget - begins) * fallen
            sharp_LP = k * (log_alpha_LP - _threshold(log_alpha_LP, k, target * (len(self.layers) / 2)))
        else:
            sharp_LP = k * log_alpha_LP
        hard_LP = self._hard(log_alpha_LP)
        logit_LP = sharp_LP
        if self.noise_LP is not None and torch.is_grad_enabled():
            logit_LP = (self.noise_LP.to(log_alpha_LP).logit(eps=1e-6) + sharp_LP) / BETA
        # Both are computed and one is taken: to ask a tensor which would wait for the device.
        z_LP = torch.where(hard, hard_LP, _stretched(logit_LP))
        with torch.no_grad():
            evaluated_LP = torch.where(hard, hard_LP, _stretched(sharp_LP))
        expected_L = 2 * torch.where(hard, hard_LP, _is_open(sharp_LP)).sum(1)
        if torch.is_grad_enabled():
            self.seen = GateState(2.0 * (evaluated_LP > 0).sum(1), expected_L.detach())
        cost = (settings.penalty or 0.0) / settings.max * expected_L.mean()
        return z_LP, cost * self.part

    def _hard(self, log_alpha_LP: Tensor) -> Tensor:
        """0 or 1, of whole pairs no more than the budget has. Among equals the first are open: ranks must agree, and a
        stable sort promises it."""
        if self.settings.budget is None:
            return (log_alpha_LP > 0).to(log_alpha_LP.dtype)
        count = int(round(self.settings.budget * len(self.layers) / 2, 6))
        chosen = log_alpha_LP.detach().flatten().sort(descending=True, stable=True).indices[:count]
        return torch.zeros_like(log_alpha_LP).flatten().index_fill(0, chosen, 1.0).view_as(log_alpha_LP)

    def values(self) -> Tensor:
        """z [L, P] of evaluation."""
        with torch.no_grad():
            return self()[0]


def gated(B_BHTS: Tensor, z_P: Tensor) -> Tensor:
    """B with the channels 2m and 2m+1 times z[m], in B's dtype."""
    return B_BHTS * z_P.repeat_interleave(2).to(B_BHTS.dtype)


def _is_open(logit: Tensor) -> Tensor:
    """P(z ≠ 0)."""
    return (logit - BETA * math.log(-GAMMA / ZETA)).sigmoid()


def _threshold(log_alpha: Tensor, k: Tensor, count: Tensor) -> Tensor:
    """τ, a scalar, of which Σ P(z ≠ 0) is `count`; the nearest where none is. Its gradient is that of the implicit
    function. Nothing waits for the device.
    """
    wide = log_alpha.double()

    def total(tau: Tensor) -> Tensor:
        return _is_open(k * (wide - tau[..., None, None])).sum((-2, -1))

    with torch.no_grad():
        low, high = wide.min() - _REACH, wide.max() + _REACH
        for _ in range(_ROUNDS):
            tried = low + (high - low) * torch.linspace(0, 1, _CANDIDATES, dtype=wide.dtype, device=wide.device)
            at = (total(tried) > count).sum().clamp(1, _CANDIDATES - 1)  # the first that leaves no more than count open
            # Not tried[at]: to index by a tensor without dimensions reads its value, and waits for the device.
            low, high = tried.index_select(0, torch.stack((at - 1, at))).unbind()
        tau = (low + high) / 2
        p = _is_open(k * (wide - tau))
        slope = (k * p * (1 - p)).sum().clamp(min=1e-30)  # −d total / dτ
    found = total(tau)
    # One step of Newton's, of which only the gradient matters.
    return (tau + (found - found.detach()) / slope).to(log_alpha.dtype)


def _stretched(logit: Tensor) -> Tensor:
    return (logit.sigmoid() * (ZETA - GAMMA) + GAMMA).clamp(0, 1)
