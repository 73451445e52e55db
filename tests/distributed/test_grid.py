"""Every layout equals one process: scores, losses, every gradient, norms and the weights after three clipped steps.

In fp32 the reference is a plain PyTorch loop; in bf16 the engine on one process, which alone rounds as FSDP2 does.
"""

from __future__ import annotations

import functools
import itertools
from dataclasses import replace

import pytest

from distributed.comparing import FP32, errors, red
from distributed.grid import AXES, PROMISED, STEPS, Case, Outcome, covering_subset, full_product, run_case, run_plain
from distributed.mutations import MUTATIONS
from distributed.pool import RankFailed, run_job
from floors import FLOORS

COVERING, FULL = covering_subset(), full_product()


@functools.cache
def reference(case: Case, steps: int = STEPS) -> Outcome:
    return run_plain(case, steps=steps) if case.precision == "fp32" else run_job(1, run_case, case, steps=steps)[0]


def check(case: Case, *, least: int = 60) -> None:
    """`least`: terms that are compared; a model with fewer tensors has fewer."""
    want = reference(case.reference())
    got = run_job(case.world_size, run_case, case)[0]
    clip = case.config().optimizer.grad_clip
    assert clip is not None and min(want.norms) > clip, "clipping must be active"
    moved = 5 * FP32  # at least: of jamba's dt_norm it is 9 in three steps
    assert all((want.final[name] - tensor).abs().max() > moved for name, tensor in want.initial.items())
    found = errors(case, got, want)
    assert len(found) > least
    assert not red(found)


@pytest.mark.parametrize("case", sorted(COVERING, key=lambda case: case.world_size), ids=str)
def test_layout_equals_one_process(case: Case) -> None:
    check(case)


STYLED = [
    Case("tp2", "attention", 4, "uniform", "fp32", style="neox"),
    Case("tp2_sp", "attention", 4, "heterogeneous", "fp32", tied=False, style="neox"),
    Case("tp2_dp2", "sisa", 1, "uniform", "fp32", checkpointing=True, style="neox"),
    Case("tp2_dp2_sp", "sisa", 2, "heterogeneous", "bf16", style="neox"),
    Case("tp2_dp2", "attention", 2, "uniform", "fp32", style="llama"),
    Case("tp2_sp", "attention", 1, "heterogeneous", "fp32", qk_norm=True, documents=True, style="llama"),
    Case("dp2", "sisa", 2, "uniform", "fp32", tied=False, style="llama"),
    Case("tp2", "attention", 1, "uniform", "bf16", checkpointing=True, style="llama"),
    Case("tp2", "sisa", 2, "uniform", "bf16", style="yarn"),
    Case("dp2", "attention", 2, "heterogeneous", "bf16", checkpointing=True, style="yarn"),
    Case("tp2_sp", "sisa", 1, "heterogeneous", "fp32", documents=True, style="dynamic"),
]


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, marks=[pytest.mark.slow] * (case.precision == "bf16"))  # which hides more than it shows
        for case in sorted(STYLED, key=lambda case: case.world_size)
    ],
    ids=str,
)
def test_another_familys_block_or_rope_equals_one_process(case: Case) -> None:
    check(case)


COMPILED = (("compile", True),)
ONE_NORM = [
    Case("tp2_sp", "attention", 2, "heterogeneous", "fp32", documents=True, style="parallel"),
    Case("tp2_dp2", "sisa", 4, "uniform", "bf16", checkpointing=True, style="parallel"),
    Case("tp4_sp", "sisa", 1, "heterogeneous", "fp32", documents=True, tied=False, style="ssm_gated"),
    Case("tp2_dp2_sp", "sisa", 2, "heterogeneous", "bf16", checkpointing=True, qk_norm=True, style="ssm_gated"),
    Case("hsdp_2x2", "sisa", 4, "heterogeneous", "bf16", style="ssm_gated"),
    Case("tp2", "sisa", 4, "uniform", "fp32", style="ssm_gated", engine=COMPILED),
    Case("dp2", "sisa", 4, "uniform", "fp32", checkpointing=True, style="ssm_gated", engine=COMPILED),
]


@pytest.mark.slow
@pytest.mark.parametrize("case", sorted(ONE_NORM, key=lambda case: case.world_size), ids=str)
def test_a_block_with_one_norm_equals_one_process(case: Case) -> None:
    """Slow: the fast case of ssm_gated is test_grid_rivals.py's. Under ZeRO: test_grid_deepspeed.py."""
    check(case)


@pytest.mark.slow
@pytest.mark.parametrize("case", sorted(FULL, key=lambda case: case.world_size), ids=str)
def test_full_product_equals_one_process(case: Case) -> None:
    check(case)


def test_the_grid_is_as_large_as_it_says() -> None:
    print(f"{len(COVERING)} covering cases, {len(FULL)} in the full product, {len(MUTATIONS)} mutations")
    assert len(COVERING) >= FLOORS["test_layout_equals_one_process"] and len(FULL) >= 216
    assert len(MISTAKES) >= 29 and len(MUTATIONS) == len(MISTAKES) + 1
    promised = [tuple(getattr(case, axis) for axis in PROMISED) for case in FULL]
    assert len(set(promised)) == len(FULL)
    for a, b in itertools.combinations(AXES, 2):
        for values in itertools.product(AXES[a], AXES[b]):
            assert any((getattr(case, a), getattr(case, b)) == values for case in COVERING), (a, b, values)
    assert {case.layout for case in COVERING if (case.mixer, case.precision) == ("sisa", "fp32")} == {*AXES["layout"]}


# Where each mistake is looked for, and a term that must be red; the rest of the terms may be.
KV_WHOLE = Case("tp2", "sisa", 1, "uniform", "fp32", qk_norm=True)
SLICED = Case("tp2", "sisa", 4, "heterogeneous", "fp32")
SP = Case("tp2_sp", "sisa", 4, "heterogeneous", "fp32")
NEOX, NEOX_SP, BIASED = STYLED[0], STYLED[1], STYLED[5]
JAMBA, MAMBA2, MAMBA3 = (Case("tp2", name, 4, "uniform", "fp32") for name in ("jamba", "mamba2", "mamba3"))
GROUPS = Case("tp4", "mamba2_groups", 4, "uniform", "fp32")
MIXED = Case("tp2", "moe", 4, "uniform", "fp32")
GATES = Case("tp2", "learned_d_s", 4, "uniform", "fp32")
DEALT = Case("ep2", "moe", 4, "uniform", "fp32")
DEALT_ZERO = Case("ep2_dp4", "moe", 4, "uniform", "fp32", engine=(("kind", "deepspeed"), ("zero_stage", 1)))
MISTAKES: dict[str, tuple[Case, str]] = {
    "tp_dim dropped from a column": (SLICED, "norm 0"),
    "tp_dim dropped from a row": (SLICED, "norm 0"),
    "tp_dim given to a replicated norm": (SLICED, "norm 0"),
    "copy without its all-reduce": (SLICED, "gradient norm.weight"),
    "copy with two all-reduces": (SLICED, "gradient norm.weight"),
    "overlapped copy without its all-reduce": (SLICED, "gradient blocks.0.norm1.weight"),
    "overlapped copy with two all-reduces": (SLICED, "gradient blocks.0.norm1.weight"),
    "reduce without its all-reduce": (SLICED, "score"),
    "reduce with two all-reduces": (SLICED, "score"),
    "gather without its reduce-scatter": (SP, "gradient norm.weight"),
    "gather with two sums": (SP, "gradient norm.weight"),
    "overlapped gather without its reduce-scatter": (SP, "gradient blocks.0.norm1.weight"),
    "overlapped gather with two sums": (SP, "gradient blocks.0.norm1.weight"),
    "weight gradients delayed and forgotten": (SLICED, "gradient blocks.0.mixer.wq.weight"),
    "scatter without its sum": (SP, "score"),
    "scatter with two sums": (SP, "score"),
    "norm gradients not summed under sp": (SP, "gradient blocks.0.norm1.weight"),
    "final norm gradient not summed under sp": (SP, "gradient norm.weight"),
    "partial marked full: kv held whole": (KV_WHOLE, "gradient blocks.0.mixer.wk.weight"),
    "partial marked full: B held whole": (KV_WHOLE, "gradient blocks.0.mixer.wb.weight"),
    "partial marked full: decay bias held whole": (KV_WHOLE, "gradient blocks.0.mixer.decay.bias"),
    "partial marked full: a shared gain": (KV_WHOLE, "gradient blocks.0.mixer.q_norm.weight"),
    "λ from the wrong rank": (SLICED, "score"),
    "loss not averaged": (Case("dp2", "sisa", 4, "uniform", "fp32"), "norm 0"),
    "embedding without its mask": (SLICED, "score"),
    "partial marked full: a group of B held whole": (MAMBA2, "gradient blocks.0.mixer.wB.weight"),
    "partial marked full: a convolution held whole": (MAMBA2, "gradient blocks.0.mixer.conv_C.bias"),
    "partial marked full: angles of all heads": (MAMBA3, "gradient blocks.0.mixer.wangle.weight"),
    "partial marked full: a gain of all heads": (MAMBA3, "gradient blocks.0.mixer.B_norm.weight"),
    "a norm over this rank's channels alone": (MAMBA2, "score"),
    "a sum inside a region left out": (JAMBA, "score"),
    "partial marked full: a gain of Mamba's time steps": (JAMBA, "gradient blocks.0.mixer.dt_norm.weight"),
    "a group's rows from the first group": (GROUPS, "score"),
    "a row layer's bias added on every rank": (NEOX, "score"),
    "a row layer's bias not summed under sp": (NEOX_SP, "gradient blocks.0.mixer.wo.bias"),
    "a norm's bias not summed under sp": (NEOX_SP, "gradient blocks.0.norm1.bias"),
    "U from the wrong rank": (Case("tp2", "ssm_gated", 4, "uniform", "fp32"), "score"),
    "partial marked full: a kv bias held whole": (BIASED, "gradient blocks.0.mixer.wk.bias"),
    "partial marked full: a router": (MIXED, "gradient blocks.0.mlp.router.weight"),
    "experts of another rank": (MIXED, "score"),
    "router's losses counted by every rank": (MIXED, "gradient blocks.0.mlp.router.weight"),
    "tp_dim dropped from experts": (MIXED, "norm 0"),
    "partial marked full: gates": (GATES, "gradient gates.log_alpha"),
    "gates' cost counted by every rank": (replace(GATES, style="priced"), "gradient gates.log_alpha"),
    "gates' noise of each rank its own": (
        Case("dp2", "learned_d_s", 4, "uniform", "fp32"),
        "gradient gates.log_alpha",
    ),
    "exchanged rows' gradients kept": (DEALT, "gradient blocks.0.norm2.weight"),
    "experts averaged over their holders alone": (DEALT, "gradient blocks.1.mlp.experts.down"),
    "experts reduced over the ranks of ep": (DEALT_ZERO, "gradient blocks.1.mlp.experts.down"),
}


@pytest.mark.parametrize("name", MISTAKES)  # "tensor_model_parallel forgotten" is DeepSpeed's: test_grid_deepspeed.py
def test_a_mistake_turns_the_grid_red(name: str) -> None:
    case, term = MISTAKES[name]
    got = run_job(case.world_size, run_case, case, name, steps=1)[0]
    found = red(errors(case, got, reference(case.reference(), steps=1)))
    assert term in found, found


def test_a_rank_that_fails_is_reported_and_the_pool_lives_on() -> None:
    with pytest.raises(RankFailed, match="KeyError"):
        run_job(2, run_case, SLICED, "no such mistake")
    assert run_job(2, _world) == [2, 2]


def _world() -> int:
    import torch.distributed as dist

    return dist.get_world_size()
