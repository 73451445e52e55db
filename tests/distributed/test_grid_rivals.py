"""Every rival's tensor-parallel split, sharding and ZeRO equal one process, as test_grid.py says of sisa."""

from __future__ import annotations

import pytest

from distributed.comparing import errors, red
from distributed.grid import Case, run_case
from distributed.pool import run_job
from distributed.test_grid import reference
from mixer_cases import FIRST, RIVALS

ZERO2, ZERO3 = ((("kind", "deepspeed"), ("zero_stage", stage)) for stage in (2, 3))


def cases(name: str) -> list[Case]:
    """Those of a variant; the earlier say more."""
    return [
        Case("tp4_sp", name, 4, "uniform", "fp32", documents=True, tied=False, checkpointing=True),
        Case("tp2_dp2", name, 4, "uniform", "fp32", engine=ZERO3),
        Case("tp4", name, 4, "uniform", "fp32", documents=True, tied=False),
        Case("tp2_sp", name, 4, "uniform", "fp32", documents=True, checkpointing=True),
        Case("tp2", name, 4, "uniform", "fp32"),
        Case("tp2_dp2_sp", name, 4, "uniform", "fp32"),
        Case("dp2", name, 4, "uniform", "fp32", documents=True),
        Case("dp2", name, 4, "uniform", "fp32", engine=ZERO2),
        Case("tp2_dp2_sp", name, 4, "uniform", "bf16"),
        Case("tp2", name, 4, "uniform", "bf16", engine=ZERO2),
    ]


# Two of a mixer's first variant; of further ones, and of options of sisa, attention and the block, one.
FAST = [case for name in RIVALS for case in cases(name)[: 2 if name in FIRST.values() else 1]]
SLOW = [case for name in RIVALS for case in cases(name) if case not in FAST]
CASES = [*FAST, *(pytest.param(case, marks=pytest.mark.slow) for case in SLOW)]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_rival_equals_one_process(case: Case) -> None:
    want = reference(case.reference())
    got = run_job(case.world_size, run_case, case)[0]
    clip = case.config().optimizer.grad_clip
    assert clip is not None and min(want.norms) > clip, "clipping must be active"
    assert all((want.final[name] - tensor).abs().max() > 1e-4 for name, tensor in want.initial.items())
    assert not red(errors(case, got, want))
