"""Falcon-H1 models of transformers compute the same as ours made of them, multipliers and all; back to the bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from sisa_dist.config import ModelConfig, UserError
from sisa_dist.convert import falcon_h1, llama

transformers = pytest.importorskip("transformers")
from their_models import check_logits_and_gradients, check_there_and_back, drawn  # noqa: E402

BASE: dict[str, Any] = dict(vocab_size=59, hidden_size=32, intermediate_size=40, num_attention_heads=4)
BASE |= dict(num_hidden_layers=2, num_key_value_heads=2, mamba_d_ssm=48, mamba_n_heads=4, mamba_d_state=12)
BASE |= dict(mamba_chunk_size=16, initializer_range=0.2)
SCALED = dict(lm_head_multiplier=0.6, embedding_multiplier=1.7, mlp_multipliers=[0.8, 1.4], key_multiplier=0.7)
SCALED |= dict(attention_in_multiplier=1.3, attention_out_multiplier=0.9, ssm_in_multiplier=1.2)
SCALED |= dict(ssm_out_multiplier=0.5, ssm_multipliers=[1.1, 0.8, 1.5, 0.9, 0.6])
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "multipliers": SCALED,
    "multipliers, tied, norm before the gate": SCALED
    | {"tie_word_embeddings": True, "mamba_rms_norm": True, "mamba_n_groups": 2},
    "norm behind the gate, biases": SCALED
    | {"mamba_rms_norm": True, "mamba_norm_before_gate": False, "attention_bias": True, "mlp_bias": True},
}


def theirs(options: dict[str, Any]) -> Any:
    config = transformers.FalconH1Config(**(BASE | options))
    return drawn(transformers.FalconH1ForCausalLM, config, moved=("A_log", "dt_bias"))


@pytest.mark.parametrize("name", CASES)
def test_logits_and_gradients_are_theirs(name: str, tmp_path: Path) -> None:
    # In channels that turn slowly a key's bias adds one number to all scores of a query.
    check_logits_and_gradients(falcon_h1, theirs(CASES[name]), tmp_path, tokens=37, rounding=("wk.bias",))


@pytest.mark.parametrize("key", SCALED)
def test_each_multiplier_matters(key: str, tmp_path: Path) -> None:
    """So that the test above sees each of them."""
    tokens = torch.randint(1, 59, (1, 20))
    plain, scaled = theirs({}), theirs({key: SCALED[key]})
    assert (plain(tokens).logits - scaled(tokens).logits).abs().max() > 1e-2


@pytest.mark.parametrize("name", CASES)
def test_there_and_back_gives_the_same_bits(name: str, tmp_path: Path) -> None:
    # Chunks of another length are summed in another order.
    check_there_and_back(falcon_h1, theirs(CASES[name]), tmp_path, atol=1e-4)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"mamba_proj_bias": True}, "mamba_proj_bias True"),
        ({"projectors_bias": True}, "projectors_bias True"),
        ({"mamba_conv_bias": False}, "mamba_conv_bias False"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"time_step_limit": [0.0, 0.1]}, r"time_step_limit \[0.0, 0.1\] clamps"),
        ({"mamba_n_heads": 5}, "mamba_n_heads 5 × mamba_d_head auto is not the 48 channels"),
        ({"mamba_d_head": 16}, "mamba_n_heads 4 × mamba_d_head 16 is not the 48 channels"),
        ({"ssm_multipliers": [1.0, 1.0]}, "ssm_multipliers is .* must be 5 numbers"),
        ({"key_multiplier": "small"}, "key_multiplier is 'small'"),
        ({"hidden_size": None}, "hidden_size is missing"),
    ],
)
def test_what_ours_cannot_be_is_refused_by_name(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        falcon_h1.read_config({"model_type": "falcon_h1"} | BASE | changes)


def test_what_a_family_cannot_be_is_refused() -> None:
    values: dict[str, Any] = dict(vocab_size=59, d_model=32, n_layers=2, n_heads=4, d_ff=40, mixer="falcon_h1")
    assert falcon_h1.write_config(ModelConfig(**values))["mamba_n_heads"] == 1
    for changes, says in (
        ({"mixer": ["falcon_h1", "attention"]}, "falcon_h1 and swiglu in every layer"),
        ({"rotary_fraction": 0.5}, "rotary_fraction"),
        ({"qk_norm": True}, "qk_norm"),
    ):
        with pytest.raises(UserError, match=says):
            falcon_h1.write_config(ModelConfig(**(values | changes)))
    with pytest.raises(UserError, match=r"model\.multipliers"):
        llama.write_config(ModelConfig(**(values | {"mixer": "attention", "multipliers": {"head": 0.5}})))
