"""Every rival's tensor-parallel split, sharding and ZeRO equal one process, as test_grid.py says of sisa."""

from __future__ import annotations

import pytest

from distributed.grid import Case
from distributed.test_grid import check
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


# One of each, in turn FSDP2 with tp 4 and ZeRO-3 with tp 2; of a mixer's first variant always the former.
FAST = [cases(name)[number % 2 and name not in FIRST.values()] for number, name in enumerate(RIVALS)]
SLOW = [case for name in RIVALS for case in cases(name) if case not in FAST]
CASES = [*FAST, *(pytest.param(case, marks=pytest.mark.slow) for case in SLOW)]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_rival_equals_one_process(case: Case) -> None:
    check(case)
