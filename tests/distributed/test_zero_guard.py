"""A step that the guard skips changes nothing under DeepSpeed either, and the next one is as if it had not been."""

from __future__ import annotations

import dataclasses
from typing import Any
from unittest import mock

import pytest
import torch

from distributed import probing
from distributed.grid import Case, micro_batches
from distributed.pool import run_job
from sisa_dist.engine import build_engine
from sisa_dist.parallel.mesh import init_mesh

BASE = Case("tp2_dp2", "sisa", 2, "uniform", "fp32")


def _skips(case: Case, bad: bool) -> dict[str, Any]:
    """Two steps, between them one whose loss is not a number, or none."""
    config = case.config()
    mesh = init_mesh(config.parallel, device="cpu")
    engine: Any = build_engine(config, mesh)

    def step(number: int, **options: Any) -> Any:
        return engine.train_step(micro_batches(case, number, mesh.dp_rank, mesh.dp_size), 1e-3, **options)

    results = [step(0)]
    if bad:
        before = probing.whole(_plain(engine))
        real = engine.zero.module.head.forward
        with mock.patch.object(engine.zero.module.head, "forward", lambda *a, **k: _nan(real(*a, **k))):
            results.append(step(1, stop=mesh.tp_rank == 1))
        after = probing.whole(_plain(engine))
        assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    results.append(step(2))
    return {"results": results, "weights": probing.weights(engine)}


def _plain(engine: Any) -> dict[str, torch.Tensor]:
    """The live memory of weights and moments of this rank."""
    return {
        name: tensor.as_subclass(torch.Tensor) if type(tensor).__name__ == "FlatShard" else tensor
        for name, tensor in engine.state_tensors().items()
    }


def _nan(outcome: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    return outcome[0] * float("nan"), outcome[1]


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_skipped_step_leaves_no_trace(stage: int) -> None:
    case = dataclasses.replace(BASE, engine=(("kind", "deepspeed"), ("zero_stage", stage)))
    straight, broken = run_job(4, _skips, case, False), run_job(4, _skips, case, True)
    for one, other in zip(straight, broken, strict=True):
        first, bad, last = other["results"]
        assert [first.skipped, bad.skipped, last.skipped] == [False, True, False]
        assert bad.stop and not first.stop and not last.stop  # asked of one tp rank, told to all
        assert one["results"] == [first, last]
        assert all(torch.equal(other["weights"][name], tensor) for name, tensor in one["weights"].items())
