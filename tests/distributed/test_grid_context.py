"""Windows cut over context-parallel ranks equal one process, in every form and beside every other way to split.

As test_grid.py: scores, losses, every gradient, norms and weights after three clipped steps.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from distributed.comparing import FP32
from distributed.grid import LAYOUTS, Case, batch, constants_with_noise
from distributed.pool import run_job
from distributed.test_grid import check
from sisa_dist.engine import build_engine
from sisa_dist.parallel.mesh import init_mesh

ZERO1, ZERO2, ZERO3 = ((("kind", "deepspeed"), ("zero_stage", stage)) for stage in (1, 2, 3))

FAST = [
    Case("cp2", "sisa", 2, "heterogeneous", "fp32", documents=True),
    Case("cp2_ring", "sisa", 4, "uniform", "fp32", checkpointing=True),
    Case("cp2_ulysses", "sisa", 2, "heterogeneous", "fp32", documents=True),
    Case("cp2", "attention", 1, "heterogeneous", "fp32", tied=False),
    Case("cp2", "sisa_ssmax", 2, "uniform", "fp32", documents=True),
    Case("cp2", "sisa", 4, "uniform", "bf16", documents=True),
    Case("cp2", "sisa", 4, "uniform", "fp32", engine=ZERO2),
    Case("cp4", "sisa", 1, "uniform", "fp32", documents=True, qk_norm=True),
    Case("cp2_dp2", "sisa", 4, "uniform", "fp32"),
    Case("cp2_tp2", "sisa", 2, "uniform", "fp32", documents=True),
    Case("cp2_tp2_sp_ring", "sisa", 1, "heterogeneous", "fp32", checkpointing=True),
    Case("cp2_tp2", "sisa", 4, "uniform", "fp32", documents=True, engine=ZERO3),
    Case("cp2", "mamba2", 4, "uniform", "fp32", documents=True),
    Case("cp2", "mamba3", 4, "uniform", "fp32", documents=True),
    Case("cp2_tp2", "jamba", 4, "uniform", "fp32", documents=True),
]
# Mixers that carry a state, beside scores or alone, and what cuts hymba's windows.
STATES = ("mamba", "jamba", "mamba2", "mamba2_groups", "mamba3", "mamba3_mimo", "mamba3_rational", "mamba3_sisa")
STATES += ("falcon_h1", "falcon_h1_scaled")
LAID = [name for name in LAYOUTS if "cp" in name]


def slow() -> list[Case]:
    """Every layout under every engine, for both mixers; what a block or a score may have besides; and states."""
    found = []
    for layout, engine in itertools.product(LAID, ((), ZERO1, ZERO2, ZERO3)):
        kv = 4 if "ulysses" in layout else 2
        if not (engine and "hsdp" in layout):
            found += [
                Case(layout, "sisa", kv, "heterogeneous", "fp32", documents=not engine, tied=False, engine=engine),
                Case(layout, "attention", 4, "uniform", "fp32", documents=bool(engine), engine=engine),
            ]
    found += [Case(layout, "sisa", 4, "uniform", "bf16", documents=True) for layout in LAID]
    found += [Case("cp2_tp2", name, 4, "uniform", "fp32") for name in ("attention_ssmax", "no_decay", "ssm_gated")]
    found += [Case("cp2", "sisa", 4, "uniform", "fp32", engine=(("compile", True),))]
    return found + [case for name in STATES for case in of_states(name)] + of_hymba()


def of_states(name: str) -> list[Case]:
    return [
        Case("cp2", name, 4, "uniform", "fp32"),
        Case("cp4", name, 4, "uniform", "fp32", documents=True, tied=False, checkpointing=True),
        Case("cp2_tp2_sp", name, 4, "uniform", "fp32", documents=True),
        Case("cp2_tp2", name, 4, "uniform", "fp32", documents=True, engine=ZERO3),
        Case("cp2_dp2", name, 4, "uniform", "fp32", documents=True, engine=ZERO2),
        Case("hsdp_cp2_2x1", name, 4, "uniform", "fp32"),
        Case("cp2", name, 4, "uniform", "bf16", documents=True),
    ]


def of_hymba() -> list[Case]:
    return [
        Case("cp2_ulysses", "hymba", 4, "uniform", "fp32", documents=True),
        Case("cp2_ulysses", "hymba", 4, "uniform", "fp32", engine=ZERO3),
        Case("cp2_ulysses", "hymba", 4, "uniform", "bf16", documents=True, checkpointing=True),
    ]


CASES = [*FAST, *(pytest.param(case, marks=pytest.mark.slow) for case in slow())]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case}-{case.zero_stage}")
def test_windows_cut_over_ranks_equal_one_process(case: Case) -> None:
    check(case, least=40)


LENGTHS = (1, 13, 40)


def scores(case: Case) -> list[tuple[Tensor, Tensor]]:
    """Of windows of lengths that nothing divides."""
    with constants_with_noise():
        config = case.config()
        engine = build_engine(config, init_mesh(config.parallel, device="cpu"))
        whole = batch(case, 0)
        return [engine.score(whole.tokens[:, :n], whole.labels[:, -n:], whole.doc_ids[:, :n]) for n in LENGTHS]  # type: ignore


@pytest.mark.parametrize(
    ("layout", "mixer"),
    [("cp2_tp2_sp_ring", "sisa"), ("cp4", "mamba2"), pytest.param("cp2_ulysses", "hymba", marks=pytest.mark.slow)],
)
def test_windows_of_any_length_are_scored(layout: str, mixer: str) -> None:
    case = Case(layout, mixer, 4, "uniform", "fp32", documents=True)
    want = run_job(1, scores, case.reference())[0]
    for found in run_job(case.world_size, scores, case):
        for (log_prob, is_argmax), (want_log_prob, want_is_argmax) in zip(found, want, strict=True):
            torch.testing.assert_close(log_prob, want_log_prob, rtol=FP32, atol=FP32)
            assert torch.equal(is_argmax, want_is_argmax)
