"""The plan table: one line for every parameter, and a refusal that names the values that would work."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mixer_cases import BASE, RIVALS
from sisa_dist.config import ModelConfig, UserError, parse_config
from sisa_dist.model import build_model
from sisa_dist.parallel.plan import PLAN, Split, check_tp, split_of


def model_config(**changes: Any) -> ModelConfig:
    values = dict(vocab_size=250, d_model=64, n_layers=2, n_heads=8, d_ff=96, mixer=["sisa", "attention"], d_s=[8, 0])
    return ModelConfig(**(values | changes))  # type: ignore[arg-type]


def test_every_parameter_has_one_line_and_every_line_a_parameter() -> None:
    with torch.device("meta"):
        models = [build_model(model_config(qk_norm=True, tie_embeddings=tied)) for tied in (True, False)]
        models.append(build_model(model_config(norm="layernorm", attention_bias="all", mlp_bias=True)))
        models += [build_model(ModelConfig(**(BASE | rival))) for rival in RIVALS.values()]
        models.append(build_model(model_config(mlp="moe", moe={"experts": 4, "shared": 1})))
    used = set()
    for model in models:
        for name, _ in model.named_parameters():
            line = split_of(name)
            used |= {pattern for pattern, split in PLAN.items() if split is line}
    assert used == set(PLAN)


def test_a_parameter_without_a_line_or_with_two_is_a_mistake_in_the_plan() -> None:
    with pytest.raises(AssertionError, match=r"blocks\.0\.mixer\.gate\.weight: 0 lines"):
        split_of("blocks.0.mixer.gate.weight")
    with pytest.raises(AssertionError, match="2 lines"):
        split_of("norm.weight", {"norm.weight": Split("replicated"), "norm.*": Split("shared")})


@pytest.mark.parametrize(
    ("changes", "tp", "message"),
    [
        (
            {},
            3,
            r"tp 3 does not divide n_heads 8: set parallel\.tp to one of \[1, 2, 4, 8\], or model\.n_heads to a mul",
        ),
        (
            {"n_heads": 6, "head_dim": 8, "n_kv_heads": 3, "vocab_multiple": 384},
            2,
            r"n_kv_heads 3: set parallel\.tp to one of \[1, 3, 6\], or",
        ),
        ({"d_ff": 97}, 2, r"d_ff 97: set parallel\.tp to 1, or model\.d_ff to 96 or 98"),
        (
            {"mlp": "moe", "moe": {"experts": 6}},
            4,
            r"experts 6: set parallel\.tp to one of \[1, 2\], or model\.moe\.experts to a multiple of 4",
        ),
        (
            {"mlp": ["moe", "swiglu"], "moe": {"experts": 4, "shared": 1, "d_ff": 10}},
            4,
            r"shared_d_ff 10: set parallel\.tp to one of \[1, 2\], or model\.moe\.d_ff to a multiple of 4",
        ),
        (
            {"vocab_size": 251, "vocab_multiple": 1},
            2,
            r"padded vocabulary 251: set parallel\.tp to 1, or model\.vocab_multiple to a multiple of 2, such as 128",
        ),
    ],
)
def test_tp_that_does_not_divide_is_refused_with_what_would(changes: dict[str, Any], tp: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_tp(model_config(**changes), tp)


@pytest.mark.parametrize("n_kv_heads", [1, 2, 4, 8])
def test_fewer_kv_heads_than_tp_are_fine(n_kv_heads: int) -> None:
    for tp in (1, 2, 4, 8):
        check_tp(model_config(n_kv_heads=n_kv_heads), tp)


def test_a_d_ff_that_no_layer_has_does_not_refuse_tp() -> None:
    check_tp(model_config(mlp="moe", d_ff=97, moe={"experts": 4}), 2)


@pytest.mark.parametrize(
    ("parallel", "message"),
    [
        ({"sequence_parallel": True}, "sequence_parallel has no effect with tp 1"),
        ({"dp": 4, "dp_replicate": 3}, "dp_replicate 3 does not divide dp 4"),
        ({"dp": 6, "ep": 4}, r"ep 4 does not divide dp 6: set ep to one of \[1, 2, 3, 6\]"),
        ({"tp": 2, "ep": 2}, "ep 2 does not go with tp 2: set one of them to 1"),
        ({"dp": 4, "ep": 2, "dp_replicate": 2}, "ep 2 does not go with dp_replicate 2: set one of them to 1"),
        ({"dp": 4, "ep": 2}, "ep 2 deals out experts and the model has none: set parallel.ep to 1"),
        ({"tp": 4, "sequence_parallel": True}, r"seq_len 150 by tp 4.*set seq_len to 148 or 152"),
    ],
)
def test_parallel_settings_that_cannot_work_are_refused(parallel: dict[str, Any], message: str) -> None:
    tree = {
        "model": model_config().model_dump(),
        "parallel": parallel,
        "schedule": {"warmup_steps": 0},
        "training": {"steps": 1, "seq_len": 150, "global_batch_tokens": 600},
    }
    with pytest.raises(UserError, match=message):
        parse_config(tree, source="test")


@pytest.mark.parametrize(
    ("ep", "engine", "message"),
    [
        (4, {}, r"ep 4 does not divide model\.moe\.experts 6: set ep to one of \[1, 2, 3, 6\]"),
        (
            2,
            {"kind": "deepspeed", "zero_stage": 3},
            r"ep 2 under deepspeed needs ZeRO-1 or 2: ZeRO-3 would .*; set engine",
        ),
        (
            2,
            {"kind": "deepspeed", "zero_stage": 0},
            r"ep 2 under deepspeed needs ZeRO-1 or 2: ZeRO-0 clips .*; set engine",
        ),
    ],
)
def test_experts_that_cannot_be_dealt_out_are_refused(ep: int, engine: dict[str, Any], message: str) -> None:
    tree = {
        "model": model_config(mlp="moe", moe={"experts": 6}).model_dump(),
        "parallel": {"dp": 4, "ep": ep},
        "engine": engine,
        "schedule": {"warmup_steps": 0},
        "training": {"steps": 1, "seq_len": 150, "global_batch_tokens": 600},
    }
    with pytest.raises(UserError, match=message):
        parse_config(tree, source="test")
