"""Mixture of experts: a router chooses top_k SwiGLUs for each token, and no token is dropped (Gale et al. 2022).

Written for the experts this module holds, `share` of all: parallel/plan.py deals out the first dimension of their
tensors, each rank routes every token and computes its own experts, and the sum over ranks is the layer. What the
router costs is added by the model, not here: a layer says how it routed, beside its output.

Balance loss and z-loss are per window, so that a step's sum over windows is the same on any number of data ranks and
micro-batches; a loss over the tokens of whatever batch a rank happens to hold would not be. Per window it presses for
balance inside each one, which is more than a step needs; the bias (Wang et al. 2024, arXiv 2408.15664) balances the
whole step instead, and has no gradient at all.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sisa_dist.config import ModelConfig
from sisa_dist.model.init import Constant, Init, Normal
from sisa_dist.model.mlp import SwiGLU
from sisa_dist.model.precision import at_least_fp32
from sisa_dist.ops.experts import arrange, check_backend, combine, dispatch, grouped_matmul
from sisa_dist.ops.precision import no_autocast


@dataclass(frozen=True)
class Share:
    """Which of all experts are here. Tensor parallelism puts a subclass with a part of them in its place."""

    first: int
    count: int
    total: int

    def sum(self, x: Tensor) -> Tensor:
        """Over the shares of all ranks."""
        return x


class Routing(NamedTuple):
    """How a batch was routed: what the losses and the metrics are made of. A plain tuple of tensors to engines."""

    losses_B2: Tensor  # of each window, fp32: the balance loss and the z-loss, neither weighted
    counts_E: Tensor  # int64, tokens of the batch that chose each expert


class Choice(NamedTuple):
    expert_BTK: Tensor  # int64, best first; of equals the lower
    weight_BTK: Tensor  # fp32
    share_BTE: Tensor  # fp32, scores as shares of 1
    z_BT: Tensor  # fp32, squared log-sum-exp of the logits


class Router(nn.Module):
    """scores = softmax or sigmoid(x · Wᵀ); the top_k by score + bias are chosen, weighted by score alone. In fp32."""

    fp32_in_forward = True

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        assert config.moe is not None
        self.settings = config.moe
        self.init_rules: dict[str, Init] = {"weight": Normal(config.init_std), "bias": Constant(0.0)}
        self.weight = nn.Parameter(torch.empty(config.experts, config.d_model))
        if config.moe.balance == "bias":
            self.bias: Tensor
            self.register_buffer("bias", torch.empty(config.experts))

    def forward(self, x_BTD: Tensor) -> Choice:
        with no_autocast(x_BTD.device):
            logits_BTE = F.linear(at_least_fp32(x_BTD), at_least_fp32(self.weight))
        settings = self.settings
        if settings.scores == "softmax":
            share_BTE = score_BTE = logits_BTE.softmax(-1)
        else:
            score_BTE = logits_BTE.sigmoid()
            share_BTE = score_BTE / (score_BTE.sum(-1, keepdim=True) + 1e-20)
        with torch.no_grad():
            wanted_BTE = score_BTE + self.bias if settings.balance == "bias" else score_BTE
            # A stable sort: topk does not promise which of equals it takes, and ranks must agree.
            expert_BTK = wanted_BTE.sort(dim=-1, descending=True, stable=True).indices[..., : settings.top_k]
        weight_BTK = score_BTE.gather(-1, expert_BTK)
        if settings.normalise_top_k:
            weight_BTK = weight_BTK / (weight_BTK.sum(-1, keepdim=True) + 1e-20)
        return Choice(expert_BTK, weight_BTK, share_BTE, logits_BTE.logsumexp(-1).square())


class Experts(nn.Module):
    """down[e](silu(gate[e](x)) · up[e](x)) of the experts here, weighted and summed for each token: [B·T, D].

    Flat, because FSDP, of which experts over data ranks are a unit, warns of modules that return a view.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        assert config.moe is not None
        total, width, inner = config.experts, config.d_model, config.expert_d_ff
        self.share = Share(0, total, total)
        self.backend = config.moe.backend
        self.init_rules: dict[str, Init] = {name: Normal(config.init_std) for name in ("gate", "up", "down")}
        self.gate = nn.Parameter(torch.empty(total, width, inner))
        self.up = nn.Parameter(torch.empty(total, width, inner))
        self.down = nn.Parameter(torch.empty(total, inner, width))
        check_backend(self.backend, self.gate.device)

    # How many rows an expert gets is known to the device alone: the compiler would break the graph here anyway.
    @torch.compiler.disable
    def forward(self, x_BTD: Tensor, expert_BTK: Tensor, weight_BTK: Tensor) -> Tensor:
        share = self.share
        rows = arrange(expert_BTK.flatten(0, 1), first=share.first, count=share.count, total=share.total)
        y_MD = self.compute(dispatch(x_BTD.flatten(0, 1), rows), rows.ends_E)
        return combine(y_MD, weight_BTK.flatten(0, 1), rows)

    def compute(self, x_MD: Tensor, ends_E: Tensor) -> Tensor:
        """[M, D]: rows ends[e−1]..ends[e]−1 through the expert e of those held here."""
        gate_MF = grouped_matmul(x_MD, self.gate, ends_E, backend=self.backend)
        up_MF = grouped_matmul(x_MD, self.up, ends_E, backend=self.backend)
        return grouped_matmul(F.silu(gate_MF) * up_MF, self.down, ends_E, backend=self.backend)


class MoE(nn.Module):
    """[B, T, d_model] → the same and the Routing of it."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.router = Router(config)
        self.experts = Experts(config)
        self.shared = SwiGLU(config.d_model, config.shared_d_ff, bias=False) if config.shared_d_ff else None
        self.total = nn.Identity()  # where ranks add up their parts of the output

    def forward(self, x_BTD: Tensor) -> tuple[Tensor, Routing]:
        choice = self.router(x_BTD)
        y_BTD = self.experts(x_BTD, choice.expert_BTK, choice.weight_BTK).view_as(x_BTD)
        if self.shared is not None:
            y_BTD = y_BTD + self.shared(x_BTD)
        return self.total(y_BTD), self._routing(choice)

    def _routing(self, choice: Choice) -> Routing:
        """Balance loss of a window: E · Σ_e f_e · P_e, with f_e the share of choices that e got and P_e its mean score;
        1 where all is even (Fedus et al. 2021; by window as DeepSeek-V3, arXiv 2412.19437). Each rank adds up the
        experts it holds, and of the z-loss, a mean over tokens (Zoph et al. 2022), as large a part."""
        share, (_, tokens, top_k) = self.experts.share, choice.expert_BTK.shape
        chosen_BC = choice.expert_BTK.flatten(1)
        counts_BE = torch.zeros_like(choice.share_BTE[:, 0], dtype=torch.int64)
        counts_BE.scatter_add_(1, chosen_BC, torch.ones_like(chosen_BC))
        here = slice(share.first, share.first + share.count)
        product_BE = counts_BE[:, here] * choice.share_BTE.mean(1)[:, here]
        balance_B = product_BE.sum(1) * (share.total / (tokens * top_k))
        z_B = choice.z_BT.mean(1) * (share.count / share.total)
        return Routing(share.sum(torch.stack((balance_B, z_B), 1)), counts_BE.sum(0))
