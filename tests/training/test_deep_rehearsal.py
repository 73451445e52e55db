"""A deep model told from shallow ones: every number is that of the rehearsal of all its layers."""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path
from unittest import mock

import pytest

from distributed.pretending import alone
from sisa_dist.config import RunConfig, load_config
from sisa_dist.training import deep_rehearsal
from sisa_dist.training.deep_rehearsal import _Growth, few_layers
from sisa_dist.training.estimate import Estimate, estimate
from sisa_dist.training.work_meter import Call

QUICKSTART = Path(__file__).parents[2] / "configs" / "quickstart.yaml"
SMALL = ["model.n_layers=8", "model.d_model=32", "model.n_heads=4", "model.n_kv_heads=2", "model.d_ff=80"]
SMALL += ["model.vocab_size=128", "training.seq_len=64", "training.micro_batch_size=1"]

FSDP2, ZERO3 = ["engine.kind=fsdp2"], ["engine.kind=deepspeed", "engine.zero_stage=3"]
BUCKETS = "reduce_bucket_size: 20000, stage3_max_live_parameters: 60000, stage3_prefetch_bucket_size: 30000"
RECOMPUTED = ["engine.activation_checkpointing=true"]
# Six experts: tensors of as many as of the layers played would pass for each other, and all layers be played.
MOE = ["model.mlp=moe", "model.moe={experts: 6, top_k: 2}", "parallel.ep=2"]
SP = ["parallel.tp=2", "parallel.sequence_parallel=true", "engine.precision=bf16"]
CASES: dict[str, tuple[int, list[str]]] = {  # name → (world size, what differs)
    "fsdp2": (2, FSDP2),
    "zero3_buckets_checkpointing": (
        2,
        [*ZERO3, *RECOMPUTED, f"engine.deepspeed_config={{zero_optimization: {{{BUCKETS}}}}}"],
    ),
}
SLOW: dict[str, tuple[int, list[str]]] = {
    "one_offloaded": (1, [*RECOMPUTED, "engine.activation_offload=true", "engine.cpu_offload=true"]),
    "zero2_moe": (4, ["engine.kind=deepspeed", "engine.zero_stage=2", *MOE]),
    "one": (1, []),
    "fsdp2_sp_checkpointing": (4, [*FSDP2, *SP, *RECOMPUTED]),
    "fsdp2_prefetch": (2, [*FSDP2, "engine.prefetch=2", "model.n_layers=13"]),
    "fsdp2_prefetch_1": (2, [*FSDP2, "engine.prefetch=1"]),
    "fsdp2_moe_bias": (4, [*FSDP2, "model.mlp=moe", "model.moe={experts: 6, top_k: 2, balance: bias}"]),
    "fsdp2_kept": (2, [*FSDP2, "engine.reshard_after_forward=false"]),
    "fsdp2_offloaded": (2, [*FSDP2, "engine.cpu_offload=true", "engine.mlp_chunk=16"]),
    "fsdp2_moe": (4, [*FSDP2, *MOE]),
    "hsdp": (4, [*FSDP2, "parallel.dp_replicate=2"]),
    "tp2_overlap": (2, [*FSDP2, "parallel.tp=2", "engine.overlap=true"]),
    "cp2": (4, [*FSDP2, "parallel.cp=2"]),
    "cp2_ring": (2, [*FSDP2, "parallel.cp=2", "parallel.cp_kind=ring"]),
    "cp2_ulysses": (2, [*ZERO3, "parallel.cp=2", "parallel.cp_kind=ulysses"]),
    "zero0": (2, ["engine.kind=deepspeed", "engine.zero_stage=0"]),
    "zero1_tp2": (4, ["engine.kind=deepspeed", "engine.zero_stage=1", "parallel.tp=2"]),
    "zero3": (2, ZERO3),
    "zero3_mlp_chunk": (2, [*ZERO3, *RECOMPUTED, "engine.mlp_chunk=16"]),
    "zero3_offloaded": (2, [*ZERO3, "engine.cpu_offload=true", "engine.precision=bf16"]),
    "mamba2_tp2": (2, [*FSDP2, "model.mixer=mamba2", "model.d_s=null", "model.ssm={head_dim: 16}", "parallel.tp=2"]),
    "attention": (2, [*ZERO3, "model.mixer=attention", "model.d_s=null"]),
}


def _config(*overrides: str) -> RunConfig:
    return load_config(QUICKSTART, [*SMALL, *overrides])


def _both(world_size: int, overrides: list[str], rounds: int) -> tuple[Estimate, Estimate]:
    """Of `rounds` micro-batches a data rank: told from few layers, and of all of them played."""
    parallel = _config(*overrides).parallel
    batch_tokens = rounds * 64 * world_size // (parallel.tp * parallel.cp)
    config = _config(f"training.global_batch_tokens={batch_tokens}", *overrides)
    with mock.patch.object(deep_rehearsal, "rehearse_step", wraps=deep_rehearsal.rehearse_step) as played:
        told = estimate(config, world_size=world_size)
    assert tuple(call.args[0].model.n_layers for call in played.call_args_list) == few_layers(config)
    return told, estimate(config, world_size=world_size, every_layer=True)


@pytest.mark.parametrize("name", [*CASES, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_few_layers_tell_of_all(name: str) -> None:
    told, played = alone(_both, *(CASES | SLOW)[name], rounds=2 if name in CASES else 3)
    assert Counter(told.work) == Counter(played.work) and len(told.work) > 20
    assert told.traffic == played.traffic
    assert dataclasses.replace(told, work=()) == dataclasses.replace(played, work=())


def test_layers_that_differ_are_played_all() -> None:
    assert few_layers(_config()) == (3, 4)
    assert few_layers(_config("engine.prefetch=2")) is None  # two at each end and one between: five and six
    assert few_layers(_config("engine.prefetch=2", "model.n_layers=12")) == (5, 6)
    assert few_layers(_config("model.n_layers=7")) is None
    assert few_layers(_config("model.mixer=[" + ", ".join(["sisa"] * 8) + "]")) is None
    assert few_layers(_config("model.d_s=[" + ", ".join(["8"] * 8) + "]")) is None
    assert few_layers(_config("model.ffn=[" + ", ".join(["sequential"] * 8) + "]")) is None
    assert few_layers(_config("model.mlp=[" + ", ".join(["swiglu"] * 8) + "]")) is None
    assert few_layers(_config("model.mixer=hymba", "model.d_s=null")) is None
    assert few_layers(_config("model.d_s={learned: true, max: 8, penalty: 5.0}")) is None


def test_calls_of_all_layers_grow_and_others_become_more() -> None:
    grow = _Growth(3, 4, 10)
    of_a_layer = Call("forward", "aten::mm", "float32", 8.0, 12)
    of_all = [Call("optimizer", "aten::_fused_adamw_", "float32", 0.0, 100 + 20 * layers) for layers in (3, 4, 10)]
    grown = grow.calls(Counter({of_a_layer: 6, of_all[0]: 1}), Counter({of_a_layer: 8, of_all[1]: 1}))
    assert grown == {of_a_layer: 20, of_all[2]: 1}
    # Each layer's own, and one over what the layers gave, of one operator.
    over_all = [of_a_layer._replace(nbytes=4 * layers + 4) for layers in (3, 4, 10)]
    both = [Counter({of_a_layer: 2 * layers, over_all[n]: 3}) for n, layers in enumerate((3, 4, 10))]
    assert grow.calls(*both[:2]) == both[2]
    # One that is a layer's call at three layers and another's at four.
    layers_own = of_a_layer, of_a_layer._replace(nbytes=16)
    calls = [Counter({call: 2 * layers for call in layers_own}) for layers in (3, 4)]
    assert grow.calls(calls[0] + Counter({layers_own[0]: 3}), calls[1] + Counter({layers_own[1]: 3})) is None
    # Another group of weights whose bytes at three layers are the first one's at four.
    other = [of_all[0]._replace(nbytes=120 + 20 * layers) for layers in (3, 4, 10)]
    assert other[0] == of_all[1]
    groups = [Counter(pair) for pair in zip(of_all, other, strict=True)]
    assert grow.calls(*groups[:2]) == groups[2]
    # Equal ones are taken together, and only their sum is of the one group or the other then.
    often = [Counter({of_all[n]: 3, other[n]: 2}) for n in range(2)]
    grown = grow.calls(*often)
    assert grown is not None and grown.total() == 5
    assert sum(call.nbytes * times for call, times in grown.items()) == 3 * of_all[2].nbytes + 2 * other[2].nbytes
    assert grow.calls(Counter({of_all[0]: 1}), Counter({of_all[1]: 2})) is None
    assert grow.calls(Counter({of_all[0]: 1}), Counter({of_a_layer: 1})) is None
