"""Mixtures of experts equal one process: experts dealt out over tp, over data ranks (ep), and as ordinary tensors."""

from __future__ import annotations

import pytest

from distributed.comparing import errors, red
from distributed.grid import Case, run_case
from distributed.pool import run_job
from distributed.test_grid import reference
from mixer_cases import MIXTURES

ZERO1, ZERO2, ZERO3 = ((("kind", "deepspeed"), ("zero_stage", stage)) for stage in (1, 2, 3))

FAST = [
    case
    for name in MIXTURES
    for case in (
        Case("tp4", name, 4, "uniform", "fp32", documents=True, tied=False),
        Case("tp2_sp", name, 4, "uniform", "fp32", documents=True, checkpointing=True),
        Case("tp2_dp2_sp", name, 4, "uniform", "fp32"),
        Case("tp2_dp2", name, 4, "uniform", "fp32", engine=ZERO3, checkpointing=True),
    )
]
# Experts over data ranks: one row of each engine here, the rest is slow.
FAST += [
    Case("ep2_dp4", "moe_shared_bias", 4, "uniform", "fp32", documents=True, checkpointing=True),
    Case("ep2_dp4", "moe", 4, "uniform", "fp32", engine=ZERO2, tied=False),
]
SLOW = [
    case
    for name in MIXTURES
    for case in (
        Case("tp2", name, 4, "uniform", "fp32"),
        Case("dp2", name, 4, "uniform", "fp32", documents=True),
        Case("hsdp_2x2", name, 4, "uniform", "fp32"),
        Case("dp2", name, 4, "uniform", "fp32", engine=ZERO1, tied=False),
        Case("dp2", name, 4, "uniform", "fp32", engine=ZERO2, checkpointing=True),
        Case("dp2", name, 4, "uniform", "fp32", engine=ZERO3),
        Case("ep2", name, 4, "uniform", "fp32"),
        Case("ep2_dp4", name, 4, "uniform", "fp32", documents=True),
        Case("ep4", name, 4, "uniform", "fp32", tied=False),
        Case("ep2", name, 4, "uniform", "fp32", engine=ZERO1),
        Case("ep2_dp4", name, 4, "uniform", "fp32", engine=ZERO1, checkpointing=True),
        Case("ep4", name, 4, "uniform", "fp32", engine=ZERO2),
        Case("ep2_dp4", name, 4, "uniform", "fp32", engine=(*ZERO2, ("cpu_offload", True))),
    )
]
# Engine options change no number where experts live on a mesh of their own either.
SLOW += [
    Case("ep2_dp4", "moe", 4, "uniform", "fp32", engine=(("prefetch", 1), ("cpu_offload", True), ("check_every", 1))),
    Case("ep2", "moe_shared_bias", 4, "uniform", "fp32", engine=(("compile", True),)),
    Case("ep2_dp4", "moe_sisa", 4, "uniform", "fp32", engine=(("reshard_after_forward", False),), checkpointing=True),
    Case("ep2", "moe", 4, "uniform", "fp32", engine=(*ZERO1, ("check_every", 1))),
]
# In bf16 a rounded sum may send a token elsewhere, and `moe` drifts off by a fifth more than is tolerated within five
# steps on plain data ranks too; these two, of 3 experts in 4 and of rare close calls, stay within a seventh.
SLOW += [
    Case("ep2_dp4", "moe_sisa", 4, "uniform", "bf16", checkpointing=True),
    Case("ep2_dp4", "moe_shared_bias", 4, "uniform", "bf16"),
    Case("ep2", "moe_shared_bias", 4, "uniform", "bf16", engine=ZERO2),
]
CASES = [*FAST, *(pytest.param(case, marks=pytest.mark.slow) for case in SLOW)]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case}" + "".join(f"-{k}_{v}" for k, v in case.engine))
def test_a_mixture_equals_one_process(case: Case) -> None:
    want = reference(case.reference())
    got = run_job(case.world_size, run_case, case)[0]
    clip = case.config().optimizer.grad_clip
    assert clip is not None and min(want.norms) > clip, "clipping must be active"
    assert all((want.final[name] - tensor).abs().max() > 1e-4 for name, tensor in want.initial.items())
    assert not red(errors(case, got, want))
