"""Every rival's tensor-parallel split, sharding and ZeRO equal one process, as test_grid.py says of sisa."""

from __future__ import annotations

import pytest

from distributed.grid import Case
from distributed.test_grid import check
from mixer_cases import RIVALS, mixer_of

ZERO2, ZERO3 = ((("kind", "deepspeed"), ("zero_stage", stage)) for stage in (2, 3))


def cases(name: str) -> list[Case]:
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


# What runs in the fast suite: tp 4 over two groups or two kv heads, of a mixer or a block that test_grid.py has not;
# one variant of every mixer under ZeRO-3; of the others sequence parallelism on two ranks.
BY_FOUR = ("sigmoid_sisa", "jamba", "mamba2_groups", "mamba3_mimo", "falcon_h1", "falcon_h1_scaled", "hymba", "fox_pro")
BY_FOUR += ("ssm_gated",)
BY_ZERO = ("sisa_ssmax", "attention_ssmax", "sigmoid_sisa", "mamba", "mamba2", "mamba3_sisa", "falcon_h1", "hymba")
BY_ZERO += ("fox",)
FAST = [cases(name)[0] for name in BY_FOUR] + [cases(name)[1] for name in BY_ZERO]
FAST += [cases(name)[3] for name in RIVALS if name not in BY_FOUR + BY_ZERO]
SLOW = [case for name in RIVALS for case in cases(name) if case not in FAST]
CASES = [*FAST, *(pytest.param(case, marks=pytest.mark.slow) for case in SLOW)]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_rival_equals_one_process(case: Case) -> None:
    check(case)


def test_every_mixer_is_seen_under_fsdp2_and_zero_3() -> None:
    assert {case.mixer for case in FAST} == {*RIVALS}
    in_two = {
        name for name, keys in RIVALS.items() if 2 in (keys.get("n_kv_heads"), keys.get("ssm", {}).get("n_groups"))
    }
    assert {*BY_FOUR} == {name for name in in_two if mixer_of(name) != "sisa"} | {"ssm_gated"}
    sharded, zero = ({mixer_of(case.mixer) for case in FAST if case.engine == engine} for engine in ((), ZERO3))
    assert zero == {mixer_of(name) for name in RIVALS} and sharded == zero - {"attention"}  # test_grid.py's
