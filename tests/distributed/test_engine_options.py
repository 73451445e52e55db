"""Engine options change speed and memory, never a number; and accumulation sends nothing more than one step must."""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any

import pytest
import torch
import torch.distributed as dist

from distributed import probing
from distributed.comparing import errors, red
from distributed.grid import Case, batch, micro_batches, run_case, run_plain
from distributed.pool import RankFailed, run_job
from sisa_dist.engine import build_engine
from sisa_dist.engine.fsdp import FSDP2Engine
from sisa_dist.parallel.mesh import init_mesh

OPTIONS: list[tuple[str, dict[str, Any]]] = [
    ("tp1", {"cpu_offload": True}),
    ("tp2_dp2", {"cpu_offload": True, "reshard_after_forward": False}),
    ("tp4_sp", {"overlap": False}),
    ("hsdp_2x2", {"prefetch": 1, "reshard_after_forward": False}),
    ("hsdp_2x2", {"check_every": 2}),
    ("tp2_dp2_sp", {"mlp_chunk": 8}),  # 20 tokens a rank: the last chunk is short
    ("dp2", {"mlp_chunk": 16, "activation_checkpointing": True, "activation_offload": True}),
    ("dp2", {"kind": "deepspeed", "mlp_chunk": 16, "activation_checkpointing": True, "activation_offload": True}),
]
SLOW = [
    ("dp2", {"prefetch": 2}),
    ("tp2_dp2_sp", {"check_every": 1}),
    ("tp2", {"kind": "deepspeed", "mlp_chunk": 16}),
    ("dp2", {"compile": True}),
    ("tp1", {"compile": True}),
    ("tp2_sp", {"compile": True}),
    ("tp2", {"compile": True, "prefetch": 1}),
]
BASE = Case("tp1", "sisa", 2, "heterogeneous", "fp32", documents=True)


@pytest.mark.parametrize(
    ("layout", "options"), [*OPTIONS, *(pytest.param(*option, marks=pytest.mark.slow) for option in SLOW)], ids=str
)
def test_an_option_changes_no_number(layout: str, options: dict[str, Any]) -> None:
    case = dataclasses.replace(BASE, layout=layout, engine=tuple(options.items()))
    got = run_job(case.world_size, run_case, case)[0]
    assert not red(errors(case, got, run_plain(case.reference())))
    if options.get("compile"):
        assert all(graphs > 0 for graphs in run_job(case.world_size, _compiled_graphs))


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["tp1", "tp2_sp"])
def test_gates_of_a_learned_d_s_break_no_graph(layout: str) -> None:
    """Five steps, in which they are random, harden and stand: the numbers of eager, by as many graphs as without."""
    case = Case(layout, "learned_d_s", 4, "uniform", "fp32", engine=(("compile", True),))
    got = run_job(case.world_size, run_case, case)[0]
    assert not red(errors(case, got, run_plain(case.reference())))
    fixed = dataclasses.replace(case, mixer="sisa", n_kv_heads=2)
    found, want = (run_job(case.world_size, _graphs_of_five_steps, each) for each in (case, fixed))
    assert found == want and all(graphs for graphs, _ in found)


def _graphs_of_five_steps(case: Case) -> tuple[int, Counter[str]]:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    config = case.config()
    mesh = init_mesh(config.parallel, device="cpu")
    engine = build_engine(config, mesh)
    for step in range(5):
        engine.train_step(micro_batches(case, step, mesh.dp_rank, mesh.dp_size), 1e-3)
    counters = torch._dynamo.utils.counters
    return counters["stats"]["unique_graphs"], Counter(counters["graph_break"])


def _compiled_graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def test_accumulation_reduces_gradients_once_a_step() -> None:
    """Two micro-batches cost the reduce-scatters of one: without this an accumulated step waits for every one."""
    case = Case("hsdp_2x2", "sisa", 4, "uniform", "fp32")
    for once, twice in run_job(4, _reductions, case):
        assert once["reduce_scatter"] > 0 and once["allreduce"] > 0
        assert once == twice


def _reductions(case: Case) -> tuple[Counter[str], Counter[str]]:
    config = case.config()
    mesh = init_mesh(config.parallel, device="cpu")
    engine = build_engine(config, mesh)
    found = []
    for number in (1, 2):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            engine.train_step(micro_batches(case, 0, mesh.dp_rank, mesh.dp_size) * number, 1e-3)
        names = [event.key for event in profile.key_averages() for _ in range(event.count)]
        kinds = ("reduce_scatter", "allreduce")
        found.append(Counter(kind for name in names for kind in kinds if name.startswith("c10d::") and kind in name))
    return found[0], found[1]


@pytest.mark.parametrize(
    ("layout", "fault", "message"),
    [
        ("tp2", "replica", r"step 1: ranks along tp hold different weights of blocks\.0\.norm1\.weight"),
        ("hsdp_2x2", "replica", r"along dp_replicate hold different weights of blocks\.0\.norm1\.weight"),
        ("tp2_sp", "gradient", r"step 1: ranks along tp hold different gradients of norm\.weight"),
        ("tp1", "infinite", r"step 1: a gradient of blocks\.0\.norm1\.weight is not finite"),
    ],
)
def test_sanity_checks_name_what_is_wrong(layout: str, fault: str, message: str) -> None:
    case = dataclasses.replace(BASE, layout=layout, engine=(("check_every", 1),))
    mistake = "final norm gradient not summed under sp" if fault == "gradient" else None
    with pytest.raises(RankFailed, match=message):
        run_job(case.world_size, _faulty, case, fault, mistake)


def _faulty(case: Case, fault: str, mistake: str | None) -> None:
    from distributed.mutations import mutated

    config = case.config()
    mesh = init_mesh(config.parallel, device="cpu")
    with mutated(mistake):
        engine = build_engine(config, mesh)
    assert isinstance(engine, FSDP2Engine)
    gain = engine.model.blocks[0].norm1._parameters["weight"]
    assert gain is not None
    local = gain.to_local() if hasattr(gain, "to_local") else gain
    with torch.no_grad():
        if fault == "replica" and dist.get_rank() == 0:
            local += 1e-3
    if fault == "infinite":
        gain.register_hook(lambda grad: grad * float("inf"))
    engine.train_step(micro_batches(case, 0, mesh.dp_rank, mesh.dp_size), 1e-3)


def test_no_layer_keeps_a_weight_of_an_earlier_step() -> None:
    """Under checkpointing a recomputation ends inside a region, by an exception: its slots must not serve a score."""
    case = dataclasses.replace(Case("tp2", "sisa", 1, "uniform", "fp32"), checkpointing=True)
    assert run_job(2, _stale_slots, case) == [0, 0]


def _stale_slots(case: Case) -> int:
    config = case.config()
    mesh = init_mesh(config.parallel, device="cpu")
    engine = build_engine(config, mesh)
    engine.train_step(micro_batches(case, 0, mesh.dp_rank, mesh.dp_size), 1e-3)
    served = []
    for module in engine.model.modules():  # type: ignore[attr-defined]
        module.register_forward_hook(lambda module, arguments, output: served.append("slot" in module.__dict__))
    whole = batch(case, 0)
    engine.score(whole.tokens, whole.labels)
    assert len(served) > 20
    return sum(served)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_state_after_a_score_is_the_state_before(precision: str) -> None:
    """With reshard_after_forward off a score leaves weights gathered; a checkpoint behind it must not see them."""
    case = Case("dp2", "sisa", 2, "uniform", precision, engine=(("reshard_after_forward", False),))
    assert run_job(2, _state_round_a_score, case) == [True, True]
    if precision == "bf16":
        assert run_job(1, _state_round_a_score, dataclasses.replace(case, layout="tp1")) == [True]


def _state_round_a_score(case: Case) -> bool:
    config = case.config()
    mesh = init_mesh(config.parallel, device="cpu")
    engine = build_engine(config, mesh)
    engine.train_step(micro_batches(case, 0, mesh.dp_rank, mesh.dp_size), 1e-3)
    before = probing.whole(engine.state_tensors())
    whole = batch(case, 0)
    engine.score(whole.tokens, whole.labels)
    after = probing.whole(engine.state_tensors())
    return before.keys() == after.keys() and all(torch.equal(after[name], before[name]) for name in before)


def test_lengths_that_tp_does_not_divide_are_scored_under_sequence_parallelism() -> None:
    case = Case("tp4_sp", "sisa", 4, "uniform", "fp32", documents=True)
    for length in (1, 37):
        (alone,) = run_job(1, _scores, case.reference(), length)
        for log_prob, is_argmax in run_job(4, _scores, case, length):
            assert log_prob.shape == (4, length)
            torch.testing.assert_close(log_prob, alone[0], rtol=0, atol=1e-5)
            assert torch.equal(is_argmax, alone[1])


def _scores(case: Case, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    config = case.config()
    engine = build_engine(config, init_mesh(config.parallel, device="cpu"))
    whole = batch(case, 0)
    assert whole.doc_ids is not None
    return engine.score(whole.tokens[:, :length], whole.labels[:, :length], whole.doc_ids[:, :length])


def test_layer_statistics_are_those_of_all_heads() -> None:
    case = Case("tp2_dp2", "sisa", 1, "heterogeneous", "fp32")
    (alone,) = run_job(1, _statistics, case.reference())
    for found in run_job(4, _statistics, case):
        for key in ("lambda", "half_life"):
            assert found[key] == pytest.approx(alone[key], rel=1e-5)


def _statistics(case: Case) -> dict[str, list[float | None]]:
    from distributed.grid import constants_with_noise

    config = case.config()
    mesh = init_mesh(config.parallel, device="cpu")
    with constants_with_noise():
        engine = build_engine(config, mesh)
    for step in range(2):
        engine.train_step(micro_batches(case, step, mesh.dp_rank, mesh.dp_size), 1e-3)
    whole = batch(case, 0)
    engine.score(whole.tokens[:1], whole.labels[:1], None)  # changes nothing: scoring may have padding and dummy rows
    return engine.layer_statistics()
