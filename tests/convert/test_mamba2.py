"""Mamba-2 models of transformers compute the same as ours made of them; back to the bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sisa_dist.config import ModelConfig, UserError
from sisa_dist.convert import llama, mamba2

transformers = pytest.importorskip("transformers")
from their_models import check_logits_and_gradients, check_there_and_back, drawn, ours, saved  # noqa: E402

BASE: dict[str, Any] = dict(vocab_size=59, hidden_size=32, num_heads=4, head_dim=16, state_size=12, chunk_size=16)
BASE |= dict(num_hidden_layers=2, n_groups=1, initializer_range=0.2)
CASES: dict[str, dict[str, Any]] = {
    "one group": {},
    "groups, tied": {"n_groups": 2, "tie_word_embeddings": True},
    "group a head, three taps": {"n_groups": 4, "conv_kernel": 3, "layer_norm_epsilon": 1e-3},
}


def theirs(options: dict[str, Any]) -> Any:
    config = transformers.Mamba2Config(**(BASE | options))
    return drawn(transformers.Mamba2ForCausalLM, config, moved=("A_log", "dt_bias"))


@pytest.mark.parametrize("name", CASES)
def test_logits_and_gradients_are_theirs(name: str, tmp_path: Path) -> None:
    check_logits_and_gradients(mamba2, theirs(CASES[name]), tmp_path, tokens=37)


@pytest.mark.parametrize("name", CASES)
def test_there_and_back_gives_the_same_bits(name: str, tmp_path: Path) -> None:
    # Chunks of another length are summed in another order.
    check_there_and_back(mamba2, theirs(CASES[name]), tmp_path, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"use_bias": True}, "use_bias True"),
        ({"use_conv_bias": False}, "use_conv_bias False"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"time_step_limit": [0.0, 0.1]}, r"time_step_limit \[0.0, 0.1\] clamps"),
        ({"num_heads": 5}, "num_heads 5 × head_dim 16 is not expand"),
        ({"n_groups": 3}, "ssm.n_groups 3 does not divide 4 heads"),
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"conv_kernel": 0}, "ssm.conv is 0"),
    ],
)
def test_what_ours_cannot_be_is_refused_by_name(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        mamba2.read_config({"model_type": "mamba2", "expand": 2} | BASE | changes)


def test_infinity_is_no_limit_however_it_is_spelt() -> None:
    for limit in ([0.0, float("inf")], [0.0, {"__float__": "Infinity"}]):
        mamba2.read_config({"model_type": "mamba2", "time_step_limit": limit} | BASE)


def test_a_config_of_another_model_is_refused(tmp_path: Path) -> None:
    _, tensors = saved(theirs({}), tmp_path)
    model = mamba2.read_config({"model_type": "mamba2"} | BASE | {"state_size": 13})
    with pytest.raises(UserError, match=r"has 158 rows in backbone\.layers\.0\.mixer\.in_proj\.weight and the"):
        ours(mamba2, model, tensors)


def test_what_a_family_cannot_be_is_refused() -> None:
    values = dict(vocab_size=59, d_model=32, n_layers=2, n_heads=4, ssm={"head_dim": 16})
    for changes in ({"mixer": "mamba2", "d_ff": 48}, {"mixer": ["mamba2", "attention"], "mlp": "none"}):
        with pytest.raises(UserError, match="mamba2 and none in every layer"):
            mamba2.write_config(ModelConfig(**(values | changes)))  # type: ignore[arg-type]
    with pytest.raises(UserError, match="has mamba2 layers and a Llama-style model has none"):
        llama.write_config(ModelConfig(**values, mixer="mamba2", mlp="none"))  # type: ignore[arg-type]
