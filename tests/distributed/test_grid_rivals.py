"""Every rival's tensor-parallel split, sharding and ZeRO equal one process, as test_grid.py says of sisa."""

from __future__ import annotations

import pytest

from distributed.comparing import errors, red
from distributed.grid import Case, run_case, run_plain
from distributed.pool import run_job
from mixer_cases import RIVALS
from sisa_dist.model.mixers import MIXERS

ZERO2, ZERO3 = ((("kind", "deepspeed"), ("zero_stage", stage)) for stage in (2, 3))

CASES = [
    case
    for name in RIVALS
    for case in (
        Case("tp2", name, 4, "uniform", "fp32"),
        Case("tp4", name, 4, "uniform", "fp32", documents=True, tied=False),
        Case("tp2_sp", name, 4, "uniform", "fp32", documents=True, checkpointing=True),
        Case("tp2_dp2_sp", name, 4, "uniform", "fp32"),
        Case("dp2", name, 4, "uniform", "fp32", documents=True),
        Case("tp2_dp2", name, 4, "uniform", "fp32", engine=ZERO3),
        Case("dp2", name, 4, "uniform", "fp32", engine=ZERO2),
    )
]


@pytest.mark.parametrize("case", sorted(CASES, key=lambda case: case.world_size), ids=str)
def test_a_rival_equals_one_process(case: Case) -> None:
    want = run_plain(case.reference())
    got = run_job(case.world_size, run_case, case)[0]
    clip = case.config().optimizer.grad_clip
    assert clip is not None and min(want.norms) > clip, "clipping must be active"
    assert all((want.final[name] - tensor).abs().max() > 1e-4 for name, tensor in want.initial.items())
    assert not red(errors(case, got, want))


def test_every_mixer_has_its_row() -> None:
    named = [RIVALS[name].get("mixer", name) for name in RIVALS]
    seen = {mixer for entry in named for mixer in ([entry] if isinstance(entry, str) else entry)}
    assert MIXERS.keys() <= seen | {"sisa", "attention"}
