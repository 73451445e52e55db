"""Windows cut over context-parallel ranks equal one process, in every form and beside every other way to split.

As test_grid.py: scores, losses, every gradient, norms and weights after five clipped steps.
"""

from __future__ import annotations

import functools

import pytest

from distributed.comparing import errors, red
from distributed.grid import Case, Outcome, run_case, run_plain
from distributed.pool import run_job

ZERO1, ZERO2, ZERO3 = ((("kind", "deepspeed"), ("zero_stage", stage)) for stage in (1, 2, 3))

FAST = [
    Case("cp2", "sisa", 2, "heterogeneous", "fp32", documents=True),
    Case("cp2_ring", "sisa", 4, "uniform", "fp32", checkpointing=True),
    Case("cp2_ulysses", "sisa", 2, "heterogeneous", "fp32", documents=True),
    Case("cp2", "attention", 1, "heterogeneous", "fp32", tied=False),
    Case("cp2", "sisa", 4, "uniform", "bf16", documents=True),
    Case("cp2", "sisa", 4, "uniform", "fp32", engine=ZERO2),
    Case("cp2_ring", "attention", 2, "uniform", "fp32", documents=True, engine=ZERO3),
    Case("cp4", "sisa", 1, "uniform", "fp32", documents=True, qk_norm=True),
    Case("cp4_ring", "sisa", 4, "heterogeneous", "fp32", documents=True),
    Case("cp2_dp2", "sisa", 4, "uniform", "fp32"),
    Case("cp2_tp2", "sisa", 2, "uniform", "fp32", documents=True),
    Case("cp2_tp2_sp_ring", "sisa", 1, "heterogeneous", "fp32", checkpointing=True),
    Case("cp2_tp2", "sisa", 4, "uniform", "fp32", documents=True, engine=ZERO3),
]


@functools.cache
def reference(case: Case) -> Outcome:
    return run_plain(case) if case.precision == "fp32" else run_job(1, run_case, case)[0]


def check(case: Case) -> None:
    want = reference(case.reference())
    got = run_job(case.world_size, run_case, case)[0]
    clip = case.config().optimizer.grad_clip
    assert clip is not None and min(want.norms) > clip, "clipping must be active"
    assert all((want.final[name] - tensor).abs().max() > 1e-4 for name, tensor in want.initial.items())
    found = errors(case, got, want)
    assert len(found) > 40
    assert not red(found)


@pytest.mark.parametrize(
    "case", sorted(FAST, key=lambda case: case.world_size), ids=lambda case: f"{case}-{case.zero_stage}"
)
def test_windows_cut_over_ranks_equal_one_process(case: Case) -> None:
    check(case)
