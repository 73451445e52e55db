"""The score of windows that lie on several ranks equals one process's, output and every gradient, in fp64 to 1e-10."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from ops.ops_cases import assert_close, make, value_and_gradients
from torch import Tensor

from distributed.pool import run_job
from sisa_dist.parallel.context import ZigzagPlacement
from sisa_dist.parallel.context_group import Context
from sisa_dist.parallel.context_score import context_attention

T = 48


def score_on_ranks(kind: str, options: dict[str, Any], with_documents: bool) -> dict[str, Tensor]:
    """Output and gradients of this rank's positions; λ's summed over ranks."""
    context = Context(dist.group.WORLD, kind)
    placement = ZigzagPlacement(context)
    x = {name: z.detach() for name, z in make(T, **options).items()}
    cotangent = _cotangent(x)
    mine = {n: (z if n == "lam" else placement.own(z, dim=2)).clone().requires_grad_() for n, z in x.items()}
    docs = documents() if with_documents else None
    out = context_attention(*mine.values(), context=context, doc_ids=docs, leaf=4, backend="auto")
    grads = dict(zip(mine, torch.autograd.grad(out, list(mine.values()), placement.own(cotangent, dim=2)), strict=True))
    dist.all_reduce(grads["lam"])
    found = {"out": out.detach(), **grads}
    return {n: z if n == "lam" else _whole(z, placement) for n, z in found.items()}


def _whole(x: Tensor, placement: ZigzagPlacement) -> Tensor:
    return placement.whole(x.transpose(1, 2).contiguous()).transpose(1, 2)


def _cotangent(x: dict[str, Tensor]) -> Tensor:
    gen = torch.Generator().manual_seed(1)
    shape = (*x["q"].shape[:3], x["v"].shape[-1])
    return torch.randn(shape, generator=gen, dtype=torch.float64).to(torch.bfloat16).to(x["q"].dtype)


def documents() -> Tensor:
    """Row 0: one document ends inside a stretch, one spans several; row 1: edges on the stretches' edges."""
    rows = torch.zeros(2, T, dtype=torch.int64)
    rows[0, 5:] += 1
    rows[0, 37:] += 3
    rows[1, 12:] += 1
    rows[1, 24:] += 1
    rows[1, 46:] += 1
    return rows


CASES = {
    "weak decay": {"decay": 0.03},
    "strong decay": {"decay": 6.0},
    "decay that underflows": {"decay": 120.0},
    "grouped heads": {"heads": 4, "kv_heads": 2, "decay": 0.3, "theta": 40.0},
    "other widths": {"d_h": 6, "d_v": 10, "d_s": 2, "decay": 0.3},
    "no decay channels": {"d_s": 0, "heads": 4, "kv_heads": 2},
}


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("kind", ["all_gather", "ring"])
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("with_documents", [False, True])
def test_the_score_over_ranks_equals_one_process(name: str, kind: str, ranks: int, with_documents: bool) -> None:
    options = CASES[name]
    docs = documents() if with_documents else None
    want = value_and_gradients(make(T, **options), path="dense", doc_ids=docs)
    got = run_job(ranks, score_on_ranks, kind, options, with_documents)
    for found in got:
        assert_close({n: found[n] for n in want}, want, 1e-10)
