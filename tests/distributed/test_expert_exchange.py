"""Tokens that travel to their experts: a rank that nobody chose, one that everybody did, windows of unlike lengths."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from distributed.pool import run_job
from sisa_dist.config import ModelConfig
from sisa_dist.model.moe import Experts
from sisa_dist.parallel.expert import exchange_tokens

EXPERTS, WIDTH, RANKS = 4, 16, 2
WEIGHTS = ("gate", "up", "down")


def _experts() -> Experts:
    model = ModelConfig(
        vocab_size=61,
        d_model=WIDTH,
        n_layers=1,
        n_heads=2,
        d_ff=8,
        mlp="moe",
        mixer="attention",
        moe={"experts": EXPERTS},  # type: ignore[arg-type]
    )
    experts = Experts(model)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name in WEIGHTS:
            getattr(experts, name).normal_(generator=generator)
    return experts


def _tokens(rank: int, chosen: tuple[int, int] | None) -> tuple[Tensor, Tensor, Tensor]:
    """x, experts and weights of a rank's tokens: 5 of rank 0, 12 of rank 1; `chosen` by all of them, or any."""
    generator = torch.Generator().manual_seed(1 + rank)
    shape = 1, (5, 12)[rank]
    x_BTD = torch.randn(*shape, WIDTH, generator=generator)
    expert_BTK = torch.rand(*shape, EXPERTS, generator=generator).argsort(-1)[..., :2]
    if chosen is not None:
        expert_BTK = torch.tensor(chosen).expand(*shape, 2)
    return x_BTD.requires_grad_(), expert_BTK, torch.rand(*shape, 2, generator=generator).requires_grad_()


def _dealt_out(chosen: tuple[int, int] | None) -> dict[str, Tensor]:
    experts, rank = _experts(), dist.get_rank()
    here = slice(rank * EXPERTS // RANKS, (rank + 1) * EXPERTS // RANKS)
    for name in WEIGHTS:
        experts._parameters[name] = torch.nn.Parameter(getattr(experts, name).detach()[here].clone())
    exchange_tokens(experts, dist.group.WORLD)  # type: ignore[arg-type]
    return _results(experts, [_tokens(rank, chosen)])


def _results(experts: Experts, ranks: list[tuple[Tensor, Tensor, Tensor]]) -> dict[str, Tensor]:
    found = {}
    for number, (x_BTD, expert_BTK, weight_BTK) in enumerate(ranks):
        y_BTD = experts(x_BTD, expert_BTK, weight_BTK)
        y_BTD.sin().sum().backward()
        found |= {f"y {number}": y_BTD.detach(), f"x {number}": x_BTD.grad, f"weight {number}": weight_BTK.grad}
    return found | {name: getattr(experts, name).grad for name in WEIGHTS}


@pytest.mark.parametrize("chosen", [None, (0, 1), (2, 3), (3, 0)], ids=str)
def test_output_and_every_gradient_are_those_of_all_experts_in_one_place(chosen: tuple[int, int] | None) -> None:
    want = _results(_experts(), [_tokens(rank, chosen) for rank in range(RANKS)])
    got = run_job(RANKS, _dealt_out, chosen)
    for rank, found in enumerate(got):
        for name in ("y", "x", "weight"):
            torch.testing.assert_close(found[f"{name} 0"], want[f"{name} {rank}"], rtol=1e-5, atol=1e-6)
    for name in WEIGHTS:
        assert want[name].abs().max() > 0.1
        torch.testing.assert_close(torch.cat([found[name] for found in got]), want[name], rtol=1e-5, atol=1e-5)
