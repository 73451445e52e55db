"""Jamba models of transformers, with experts and without, compute the same as ours made of them; back to the bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from sisa_dist.config import ModelConfig, UserError
from sisa_dist.convert import jamba

transformers = pytest.importorskip("transformers")
from their_models import check_logits_and_gradients, check_there_and_back, drawn  # noqa: E402

BASE: dict[str, Any] = dict(vocab_size=59, hidden_size=32, intermediate_size=40, num_attention_heads=4)
BASE |= dict(num_hidden_layers=4, attn_layer_period=3, attn_layer_offset=1, num_experts=1, num_experts_per_tok=1)
BASE |= dict(num_key_value_heads=2, mamba_d_state=6, initializer_range=0.2)
CASES: dict[str, dict[str, Any]] = {
    "pattern": {},
    "tied, wide": {"tie_word_embeddings": True, "mamba_expand": 3, "mamba_dt_rank": 5, "num_key_value_heads": 4},
    "experts": {"num_experts": 4, "num_experts_per_tok": 2, "expert_layer_period": 2, "expert_layer_offset": 1},
    "experts everywhere": {"num_experts": 3, "expert_layer_period": 1, "expert_layer_offset": 0},
    "attention first, three taps": {"attn_layer_period": 4, "attn_layer_offset": 0, "mamba_d_conv": 3},
}


def theirs(options: dict[str, Any]) -> Any:
    config = transformers.JambaConfig(**(BASE | options))
    return drawn(transformers.JambaForCausalLM, config, moved=("A_log",))


def as_saved(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """By the names of their files: there experts are a matrix each."""
    found = {}
    for name, tensor in tensors.items():
        block, fused, kind = name.partition("feed_forward.experts.")
        if not fused:
            found[name] = tensor
            continue
        for expert, weight in enumerate(tensor):
            parts = (
                dict(zip(("gate", "up"), weight.chunk(2), strict=True)) if kind == "gate_up_proj" else {"down": weight}
            )
            found |= {f"{block}{fused}{expert}.{part}_proj.weight": matrix for part, matrix in parts.items()}
    return found


@pytest.mark.parametrize("name", CASES)
def test_logits_and_gradients_are_theirs(name: str, tmp_path: Path) -> None:
    check_logits_and_gradients(jamba, theirs(CASES[name]), tmp_path, tokens=75, as_saved=as_saved)


@pytest.mark.parametrize("name", CASES)
def test_there_and_back_gives_the_same_bits(name: str, tmp_path: Path) -> None:
    def said(model: ModelConfig) -> ModelConfig:
        return model.model_copy(update={"mamba": model.mamba_options.model_copy(update={"dt_rank": model.dt_rank})})

    check_there_and_back(jamba, theirs(CASES[name]), tmp_path, atol=0.0, said=said)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"mamba_proj_bias": True}, "mamba_proj_bias True"),
        ({"mamba_conv_bias": False}, "mamba_conv_bias False"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"mamba_dt_rank": "many"}, "mamba_dt_rank is 'many'"),
        ({"mamba_d_conv": 0}, "ssm.conv is 0"),
    ],
)
def test_what_ours_cannot_be_is_refused_by_name(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        jamba.read_config({"model_type": "jamba"} | BASE | changes)


def test_what_a_jamba_cannot_be_is_refused() -> None:
    values: dict[str, Any] = dict(vocab_size=59, d_model=32, n_layers=4, n_heads=4, d_ff=40, rotary_fraction=0.0)
    values |= dict(mixer=["mamba", "attention"] * 2, mamba={"norms": True})
    assert jamba.write_config(ModelConfig(**values))["attn_layer_period"] == 2
    for changes, says in (
        ({"mamba": None}, "mamba.norms"),
        ({"mixer": "mamba"}, "and attention"),
        ({"rotary_fraction": 1.0}, "rotary_fraction"),
        ({"mixer": ["mamba", "attention", "attention", "mamba"]}, r"layers \[1, 2\] is no Jamba pattern"),
        ({"ssm": {"width": 40}}, "40 channels"),
        ({"mlp": "gelu"}, "swiglu or moe in every layer"),
        ({"ffn": "parallel"}, "model.ffn is 'parallel'"),
        ({"ssmax": 16}, "model.ssmax has no place"),
        ({"multipliers": {"head": 2.0}}, "model.multipliers have no place"),
        ({"mlp": "moe", "moe": {"experts": 1, "top_k": 1}}, "model.moe.experts is 1"),
        ({"mlp": "moe", "moe": {"experts": 4}}, "moe.normalise_top_k is True"),
        ({"mlp": "moe", "moe": {"experts": 4, "normalise_top_k": False, "shared": 1}}, "moe.shared is 1"),
        ({"mlp": "moe", "moe": {"experts": 4, "normalise_top_k": False, "balance": "bias"}}, "no bias on the choice"),
    ):
        with pytest.raises(UserError, match=says):
            jamba.write_config(ModelConfig(**(values | changes)))
