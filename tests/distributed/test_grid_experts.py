"""Mixtures of experts equal one process: experts dealt out over tp, over data ranks (ep), and as ordinary tensors."""

from __future__ import annotations

from typing import Any

import pytest

from distributed.grid import TOKENS, WINDOWS, Case, constants_with_noise, micro_batches
from distributed.pool import run_job
from distributed.test_grid import check
from mixer_cases import MIXTURES
from sisa_dist.engine import build_engine
from sisa_dist.engine.experts import ExpertLoad
from sisa_dist.parallel.mesh import init_mesh

ZERO1, ZERO2, ZERO3 = ((("kind", "deepspeed"), ("zero_stage", stage)) for stage in (1, 2, 3))


def over_tp(name: str) -> tuple[Case, ...]:
    return (
        Case("tp4", name, 4, "uniform", "fp32", documents=True, tied=False),
        Case("tp2_sp", name, 4, "uniform", "fp32", documents=True, checkpointing=True),
        Case("tp2_dp2_sp", name, 4, "uniform", "fp32"),
        Case("tp2_dp2", name, 4, "uniform", "fp32", engine=ZERO3, checkpointing=True),
    )


# Two mixtures in each of those; experts over data ranks under one engine of each kind. The rest is slow.
NUMBERS = {"moe": (0, 2), "moe_shared_bias": (0, 1, 3), "moe_sisa": (1, 2, 3)}
FAST = [over_tp(name)[number] for name, numbers in NUMBERS.items() for number in numbers]
FAST += [
    Case("ep2_dp4", "moe_shared_bias", 4, "uniform", "fp32", documents=True, checkpointing=True),
    Case("ep2_dp4", "moe", 4, "uniform", "fp32", engine=ZERO2, tied=False),
]
SLOW = [case for name in MIXTURES for case in over_tp(name) if case not in FAST]
SLOW += [
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
# In bf16 a rounded sum may send a token elsewhere: after five steps (the grid now takes three) the loss of `moe` was
# off by 1.3 tolerances on plain data ranks already, and by 1.6 here. Of these two it stayed below 0.2.
SLOW += [
    Case("ep2_dp4", "moe_sisa", 4, "uniform", "bf16", checkpointing=True),
    Case("ep2_dp4", "moe_shared_bias", 4, "uniform", "bf16"),
    Case("ep2", "moe_shared_bias", 4, "uniform", "bf16", engine=ZERO2),
]
CASES = [*FAST, *(pytest.param(case, marks=pytest.mark.slow) for case in SLOW)]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case}" + "".join(f"-{k}_{v}" for k, v in case.engine))
def test_a_mixture_equals_one_process(case: Case) -> None:
    check(case)


def _load(case: Case) -> ExpertLoad | None:
    with constants_with_noise():
        config = case.config()
        mesh = init_mesh(config.parallel, device="cpu")
        engine = build_engine(config, mesh)
        engine.train_step(micro_batches(case, 0, mesh.dp_rank, mesh.dp_size), 1e-3)
        return engine.expert_load()


@pytest.mark.parametrize(("layout", "engine"), [("tp2", ()), ("ep2", ()), ("ep2_dp4", ZERO2)])
def test_loads_and_losses_of_routers_are_those_of_one_process(layout: str, engine: tuple[tuple[str, Any], ...]) -> None:
    case = Case(layout, "moe", 4, "uniform", "fp32", engine=engine)
    (want,) = run_job(1, _load, case.reference())
    assert want.layers == [0, 1] and sum(want.counts[0]) == 2 * WINDOWS * TOKENS
    for got in run_job(case.world_size, _load, case):
        assert (got.layers, got.counts) == (want.layers, want.counts)
        assert got.balance_loss == pytest.approx(want.balance_loss, rel=1e-5)
        assert got.z_loss == pytest.approx(want.z_loss, rel=1e-5)
