"""model.rope_scaling: what a kind lacks, what has no effect and what cannot be is one line with the remedy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sisa_dist.config import UserError, dump_config, load_config, parse_config
from sisa_dist.config.rope import ROPE_TYPES

QUICKSTART = Path(__file__).parents[2] / "configs" / "quickstart.yaml"  # heads of 64 channels
YARN: dict[str, Any] = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}
LLAMA3 = YARN | {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LONGROPE = {"rope_type": "longrope", "original_max_position_embeddings": 512, "factor": 4.0}
LONGROPE |= {"short_factor": [1.0] * 32, "long_factor": [4.0] * 32}


def test_a_whole_block_of_each_kind_is_read_and_written_back(tmp_path: Path) -> None:
    linear = {"rope_type": "linear", "factor": 2}
    dynamic = YARN | {"rope_type": "dynamic"}
    for said in (linear, linear | {"rope_type": "ntk"}, dynamic, YARN, LLAMA3, LONGROPE):
        config = _with(said)
        assert config.model.rope_scaling is not None and config.model.rope_scaling.rope_type in ROPE_TYPES
        (tmp_path / "config.yaml").write_text(dump_config(config), encoding="utf-8")
        assert load_config(tmp_path / "config.yaml") == config


@pytest.mark.parametrize(
    ("said", "says"),
    [
        ({"rope_type": "linear"}, "factor is missing and rope_type linear needs it"),
        ({"rope_type": "su", "factor": 2.0}, "model.rope_scaling.rope_type: "),
        ({"rope_type": "linear", "factor": 0.5}, "model.rope_scaling.factor: "),
        ({"rope_type": "linear", "factor": 1.0}, "factor 1 changes nothing with rope_type linear"),
        ({"rope_type": "linear", "factor": 2.0, "beta_fast": 8.0}, "beta_fast has no effect with rope_type linear"),
        ({"rope_type": "linear", "factor": 2.0, "factr": 8.0}, "factr: unknown key; did you mean factor?"),
        (YARN | {"original_max_position_embeddings": None}, "original_max_position_embeddings is missing"),
        (YARN | {"mscale": 0.7}, "mscale and mscale_all_dim have an effect only together"),
        (YARN | {"mscale": 0.7, "mscale_all_dim": 1.0, "attention_factor": 1.2}, "mscale has no effect beside"),
        (YARN | {"beta_slow": 32.0}, "beta_slow 32 is not below beta_fast 32"),
        (YARN | {"factor": 1.0}, "factor 1 changes nothing with rope_type yarn"),
        (YARN | {"short_factor": [1.0] * 32}, "short_factor has no effect with rope_type yarn"),
        (LLAMA3 | {"high_freq_factor": 1.0}, "low_freq_factor 1 is not below high_freq_factor 1"),
        (LONGROPE | {"long_factor": [4.0] * 31}, "rope_scaling.long_factor has 31 numbers and 32 pairs"),
        (LONGROPE | {"attention_factor": 1.2}, "set exactly one of the two"),
        (LONGROPE | {"factor": None}, "set exactly one of the two"),
    ],
)
def test_a_mistake_is_one_line_with_the_remedy(said: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError) as caught:
        _with(said)
    assert says in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "said", "says"),
    [
        (["model.mixer=fox", "model.d_s=null"], YARN, "rope_scaling is set but no layer's mixer reads it"),
        (["model.rotary_fraction=0.0"], YARN, "rotary_fraction 0 turns nothing: remove rope_scaling"),
        (["model.rope_theta=1.0"], YARN, "rope_theta 1 makes no wavelengths"),
        (["model.rotary_fraction=0.03125"], {"rope_type": "ntk", "factor": 2.0}, "there is but one"),
        (["model.rotary_fraction=0.5"], LONGROPE, "has 32 numbers and 16 pairs"),
    ],
)
def test_what_the_rest_of_the_model_has_no_place_for(overrides: list[str], said: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError) as caught:
        _with(said, overrides)
    assert says in str(caught.value) and "\n" not in str(caught.value)


def _with(said: dict[str, Any], overrides: list[str] | None = None) -> Any:
    config = load_config(QUICKSTART, overrides or []).model_dump(mode="json")
    config["model"]["rope_scaling"] = said
    return parse_config(config, source="test")
