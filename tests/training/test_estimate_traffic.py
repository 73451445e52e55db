"""Bytes that `sisa estimate` says a step sends, against what real processes send: equal, by collective and axis."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from distributed.counted import sent_in_a_step
from distributed.grid import LAYOUTS
from distributed.pool import run_job
from distributed.pretending import alone
from sisa_dist.config import RunConfig, parse_config
from sisa_dist.training.estimate import estimate
from sisa_dist.training.traffic import Transfer

TIED = {"tie_embeddings": True}
MOE = {"mlp": ["swiglu", "moe"], "moe": {"experts": 6, "d_ff": 7, "shared": 1, "balance": "bias"}}


def _config(
    parallel: dict[str, Any], *, micro_batches: int = 2, model: dict[str, Any] | None = None, **engine: Any
) -> RunConfig:
    """Layers of two kinds, rows that no number of ranks divides, kv heads held whole; with ep a layer of experts."""
    shape: dict[str, Any] = dict(vocab_size=61, vocab_multiple=8, d_model=32, n_layers=2, n_heads=4, n_kv_heads=1)
    shape |= dict(d_ff=48, mixer=["sisa", "attention"], d_s=[8, 0], tie_embeddings=False, qk_norm=True)
    if "ep" in parallel:
        shape |= MOE
    data_ranks = parallel.get("dp", 1)
    training = {"steps": 1, "seq_len": 16, "micro_batch_size": 1}
    training |= {"global_batch_tokens": 16 * micro_batches * data_ranks}
    blocks = {"model": shape | (model or {}), "parallel": parallel, "engine": engine, "schedule": {"warmup_steps": 0}}
    return parse_config(blocks | {"training": training}, source="tiny")


def _zero(stage: int, parallel: dict[str, Any], *, buffers: dict[str, Any] | None = None, **rest: Any) -> RunConfig:
    own = {"zero_optimization": buffers} if buffers else {}
    return _config(parallel, kind="deepspeed", zero_stage=stage, deepspeed_config=own, **rest)


# As a large model meets DeepSpeed's own sizes.
SMALL_BUFFERS = {
    "stage3_param_persistence_threshold": 500,
    "stage3_prefetch_bucket_size": 2000,
    "stage3_max_reuse_distance": 4000,
}
NOTHING_KEPT = {  # nor gathered ahead: each use is a gather
    "stage3_param_persistence_threshold": 0,
    "stage3_prefetch_bucket_size": 0,
    "stage3_max_reuse_distance": 0,
}
MAMBA = {"mixer": ["mamba2", "sisa"], "d_s": [0, 8], "qk_norm": False, "ssm": {"head_dim": 16, "n_groups": 2}}
CASES: dict[str, RunConfig] = {
    name: _config(LAYOUTS[name][1])
    for name in ("dp2", "tp2", "tp2_sp", "tp2_dp2", "hsdp_2x2", "cp2", "cp2_ring", "ep2")
}
CASES |= {
    "cp2_ulysses": _config(LAYOUTS["cp2_ulysses"][1], model={"n_kv_heads": 2}),
    "cp2_recurrent": _config(LAYOUTS["cp2"][1], model=MAMBA),
    "tp2_recurrent": _config(LAYOUTS["tp2"][1], model=MAMBA),
    "cp2_tp2_sp": _config(LAYOUTS["cp2_tp2_sp"][1]),
    "ep2_dp4": _config(LAYOUTS["ep2_dp4"][1]),
    "dp2_tied": _config(LAYOUTS["dp2"][1], model=TIED),
    "dp2_one": _config(LAYOUTS["dp2"][1], micro_batches=1),
    "dp2_four": _config(LAYOUTS["dp2"][1], micro_batches=4),
    "dp2_bf16": _config(LAYOUTS["dp2"][1], precision="bf16"),
    "dp2_kept": _config(LAYOUTS["dp2"][1], reshard_after_forward=False, micro_batches=3),
    "dp2_prefetch": _config(LAYOUTS["dp2"][1], prefetch=1),
    "dp2_checkpointed": _config(LAYOUTS["dp2"][1], activation_checkpointing=True, mlp_chunk=8),
    "tp2_checkpointed": _config(LAYOUTS["tp2"][1], activation_checkpointing=True),
    "tp2_sp_not_overlapped": _config(LAYOUTS["tp2_sp"][1], overlap=False),
    "tp2_sp_checkpointed_bf16": _config(LAYOUTS["tp2_sp"][1], activation_checkpointing=True, precision="bf16"),
    "learned_d_s": _config(
        LAYOUTS["tp2_dp2"][1],
        model={"mixer": "sisa", "d_s": {"learned": True, "max": 8, "budget": 4}},
    ),
}
for stage in range(4):
    CASES[f"zero{stage}_dp2"] = _zero(stage, LAYOUTS["dp2"][1], micro_batches=3)
    CASES[f"zero{stage}_tp2_dp2"] = _zero(stage, LAYOUTS["tp2_dp2"][1])
    CASES[f"zero{stage}_tp2"] = _zero(stage, LAYOUTS["tp2"][1])
CASES |= {
    "zero1_ep2_dp4": _zero(1, LAYOUTS["ep2_dp4"][1]),
    "zero2_ep2_dp4": _zero(2, LAYOUTS["ep2_dp4"][1]),
    "zero2_cp2": _zero(2, LAYOUTS["cp2"][1]),
    "zero2_tp2_sp_bf16": _zero(2, LAYOUTS["tp2_sp"][1], precision="bf16"),
    "zero3_gathered": _zero(3, LAYOUTS["dp2"][1], buffers={"stage3_param_persistence_threshold": 1000}),
    "zero3_gathered_twice": _zero(3, LAYOUTS["dp2"][1], buffers=SMALL_BUFFERS),
    "zero3_checkpointed": _zero(3, LAYOUTS["dp2"][1], buffers=SMALL_BUFFERS, activation_checkpointing=True),
    "zero3_offloaded": _zero(3, LAYOUTS["dp2"][1], cpu_offload=True),
    "zero2_offloaded": _zero(2, LAYOUTS["dp2"][1], cpu_offload=True),
    "zero3_tied": _zero(3, LAYOUTS["dp2"][1], buffers=SMALL_BUFFERS, model=TIED),
    "zero3_tied_checkpointed": _zero(
        3, LAYOUTS["dp2"][1], buffers=SMALL_BUFFERS, model=TIED, activation_checkpointing=True
    ),
    "zero3_mlp_chunk": _zero(3, LAYOUTS["dp2"][1], buffers=SMALL_BUFFERS, mlp_chunk=6),
    "zero3_mlp_chunk_checkpointed": _zero(
        3, LAYOUTS["dp2"][1], buffers=SMALL_BUFFERS, mlp_chunk=6, activation_checkpointing=True
    ),
    "zero3_moe": _zero(3, LAYOUTS["dp2"][1], buffers=SMALL_BUFFERS, model=MOE),
    "zero3_mlp_chunk_nothing_kept": _zero(
        3, LAYOUTS["dp2"][1], buffers=NOTHING_KEPT, mlp_chunk=6, activation_checkpointing=True, model=TIED
    ),
    "zero3_checkpointed_nothing_kept": _zero(3, LAYOUTS["dp2"][1], buffers=NOTHING_KEPT, activation_checkpointing=True),
    "zero3_buckets": _zero(3, LAYOUTS["dp2"][1], buffers={"reduce_bucket_size": 3000}),
}

FAST = (
    "dp2_four",
    "tp2_sp",
    "tp2_checkpointed",
    "cp2_ring",
    "ep2",
    "zero0_dp2",
    "zero2_dp2",
    "zero3_tied",
)


@pytest.mark.parametrize(
    "name", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in CASES]
)
def test_traffic_is_exact_to_the_byte(name: str) -> None:
    config = CASES[name]
    parallel = config.parallel
    world_size = parallel.tp * parallel.cp * (parallel.dp or 1)
    expected = set(alone(estimate, config, world_size=world_size).traffic)
    assert expected
    ranks = [set(found) for found in run_job(world_size, sent_in_a_step, config)]
    if parallel.ep > 1:  # how many rows go to whom is the router's choice; in sum it is as if all were chosen alike
        rows = _take_rows(expected)
        assert sum((_take_rows(found) for found in ranks), Counter()) == Counter(
            {kind: world_size * number for kind, number in rows.items()}
        )
    if name == "cp2_recurrent":  # edges of stretches: the last rank's list has one of its own, see context_state.py
        first, last = map(_take_rows, ranks)
        assert first == _take_rows(expected) != last
    for found in ranks:
        assert found == expected


def _take_rows(transfers: set[Transfer]) -> Counter[tuple[str, str, int, int, str]]:
    """All-to-alls are taken out; their calls and bytes."""
    found: Counter[tuple[str, str, int, int, str]] = Counter()
    for transfer in [t for t in transfers if t.collective == "all_to_all"]:
        transfers.remove(transfer)
        kind = transfer.collective, transfer.axis, transfer.size, transfer.stride
        found[*kind, "calls"] += transfer.calls
        found[*kind, "bytes"] += transfer.nbytes
    return found


def test_a_changed_split_is_seen() -> None:
    config = CASES["tp2"]
    expected = {(t.collective, t.axis): t for t in alone(estimate, config, world_size=2).traffic}
    (mistaken, _) = run_job(2, sent_in_a_step, config, "reduce without its all-reduce")
    found = {(t.collective, t.axis): t for t in mistaken}
    assert found.keys() == expected.keys()
    # The embedding's and two a layer, [1, 16, 32] fp32, in each of two micro-batches.
    missing = 2 * 5 * 16 * 32 * 4
    tp = "all_reduce", "tp"
    assert found[tp].nbytes == expected[tp].nbytes - missing and found[tp].calls == expected[tp].calls - 10
