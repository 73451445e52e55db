"""What a config.json says of RoPE is read as transformers takes it, however it is spelt, and sisa models carry it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hf_models import as_hf, random_model, tiny, tokens_of

from sisa_dist.config import ModelConfig, RopeScalingConfig, UserError
from sisa_dist.convert import falcon_h1, hf_sisa, llama, neox
from sisa_dist.convert.modeling_sisa import SisaConfig
from sisa_dist.model import generate
from sisa_dist.model.rope import rope_tables
from sisa_dist.model.rope_scaling import attention_factor, frequencies

transformers = pytest.importorskip("transformers")
utils = pytest.importorskip("transformers.modeling_rope_utils")

LLAMA: dict[str, Any] = dict(vocab_size=59, hidden_size=48, intermediate_size=40, num_hidden_layers=1)
LLAMA |= dict(num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=96, model_type="llama")
YARN = {"type": "yarn", "factor": 4.0}
BAND = {"low_freq_factor": 0.5, "high_freq_factor": 2.0}
PAIRS = {"short_factor": [1.0] * 6, "long_factor": [1.0, 1.5, 2.0, 4.0, 6.0, 8.0]}

SPELT: dict[str, dict[str, Any]] = {
    "old_type": {"rope_theta": 500.0, "rope_scaling": {"type": "linear", "factor": 2}},
    "scaling_before_parameters": {
        "rope_scaling": {"rope_type": "linear", "factor": 2.0},
        "rope_parameters": {"rope_type": "linear", "factor": 3.0},
    },
    "theta_inside": {"rope_theta": 7.0, "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 300.0}},
    "dynamic_takes_the_context": {"rope_scaling": {"type": "dynamic", "factor": 3.0}},
    "dynamic_reads_no_original": {
        "rope_parameters": {"rope_type": "dynamic", "factor": 3.0, "original_max_position_embeddings": 8}
    },
    "yarn_of_the_context": {"rope_scaling": YARN | {"finetuned": True}},
    "yarn_original_outside": {"original_max_position_embeddings": 24, "rope_scaling": YARN},
    "yarn_original_outside_wins": {
        "original_max_position_embeddings": 24,
        "rope_scaling": YARN | {"original_max_position_embeddings": 48},
    },
    "yarn_factor_by_lengths": {
        "rope_scaling": {"type": "yarn", "factor": None, "original_max_position_embeddings": 24}
    },
    "yarn_idle_values": {"rope_scaling": YARN | {"beta_fast": 0, "beta_slow": None, "mscale": 0, "mscale_all_dim": 1}},
    "yarn_truncate_null": {"rope_scaling": YARN | {"truncate": None, "original_max_position_embeddings": 20}},
    "yarn_half_of_mscale": {"rope_scaling": YARN | {"mscale": 0.5}},
    "yarn_mscale_beside_factor": {
        "rope_scaling": YARN | {"mscale": 0.5, "mscale_all_dim": 0.8, "attention_factor": 1.3}
    },
    "yarn_that_is_none": {"rope_scaling": {"type": "yarn", "factor": 1.0}},
    "yarn_temperature_alone": {"rope_scaling": {"type": "yarn", "factor": 1.0, "attention_factor": 1.2}},
    "llama3_of_the_context": {"rope_theta": 500.0, "rope_scaling": {"rope_type": "llama3", "factor": 8.0} | BAND},
    "llama3_that_is_none": {"rope_scaling": {"rope_type": "llama3", "factor": 1.0} | BAND},
    "longrope_factor_by_lengths": {
        "original_max_position_embeddings": 24,
        "rope_scaling": {"type": "longrope"} | PAIRS,
    },
    "longrope_both_factors": {
        "original_max_position_embeddings": 24,
        "rope_scaling": {"type": "longrope", "factor": 8.0, "attention_factor": 1.1} | PAIRS,
    },
}


@pytest.mark.parametrize("name", SPELT)
def test_every_spelling_means_what_it_means_to_transformers(name: str) -> None:
    said = LLAMA | SPELT[name]
    model = llama.read_config(said)
    theirs = transformers.AutoConfig.for_model(**copy.deepcopy(said))
    kind = theirs.rope_parameters["rope_type"]
    assert (model.rope_scaling is None) == name.endswith("that_is_none")
    for length in (20, 300):
        wanted, size = utils.ROPE_INIT_FUNCTIONS[kind](theirs, torch.device("cpu"), seq_len=length)
        got = frequencies(12, model.rope_theta, model.rope_scaling, length=length, device=torch.device("cpu"))
        torch.testing.assert_close(got.float(), wanted, rtol=1e-6, atol=0)
        assert attention_factor(model.rope_scaling) == pytest.approx(size, rel=1e-14)
    written = llama.write_config(model, max_positions=1234)
    assert llama.read_config(written) == model
    again = transformers.AutoConfig.for_model(**copy.deepcopy(written))
    if model.rope_scaling is not None:
        one, two = (
            utils.ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"), seq_len=300) for config in (theirs, again)
        )
        assert torch.equal(one[0], two[0]) and one[1] == two[1]


@pytest.mark.parametrize("family", [llama, neox])
def test_ntk_is_exported_as_the_base_it_comes_to(family: Any) -> None:
    values: dict[str, Any] = dict(vocab_size=59, d_model=64, n_layers=1, n_heads=4, d_ff=48, mixer="attention")
    if family is neox:
        values |= dict(norm="layernorm", mlp="gelu", mlp_bias=True, attention_bias="all", rotary_fraction=0.5)
    model = ModelConfig(**values, rope_scaling=RopeScalingConfig(rope_type="ntk", factor=4.0))
    read = family.read_config(family.write_config(model))
    assert read.rope_scaling is None and read.rotary_channels == model.rotary_channels
    tables = [
        rope_tables(
            0, 64, channels=c.rotary_channels, theta=c.rope_theta, scaling=c.rope_scaling, device=torch.device("cpu")
        )
        for c in (model, read)
    ]
    assert all(torch.equal(a, b) for a, b in zip(*tables, strict=True))


ORIGINAL = {"original_max_position_embeddings": 16}
KINDS: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "ntk": {"rope_type": "ntk", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0} | ORIGINAL,
    "yarn": {"rope_type": "yarn", "factor": 4.0, "beta_fast": 4.0, "beta_slow": 0.5} | ORIGINAL,
    "llama3": {"rope_type": "llama3", "factor": 8.0} | BAND | ORIGINAL,
    "longrope": {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [1.0, 2.0, 4.0, 8.0]}
    | {"factor": 4.0}
    | ORIGINAL,
}


@pytest.mark.parametrize("kind", KINDS)
def test_exported_sisa_models_turn_as_ours_do(kind: str) -> None:
    config = tiny(rope_theta=100.0, n_kv_heads=2, rope_scaling=RopeScalingConfig(**KINDS[kind]))
    written = hf_sisa.write_config(config)
    if kind != "ntk":
        assert hf_sisa.read_config(written) == config
    model, tokens = random_model(config), tokens_of(2, 60)
    twin = as_hf(model)
    with torch.no_grad():
        for length in (9, 60):  # within the original length and beyond
            wanted, got = model(tokens[:, :length]), twin(tokens[:, :length]).logits
            assert (got - wanted).abs().max() < 1e-4 * wanted.abs().max()
    plain = random_model(tiny(rope_theta=100.0, n_kv_heads=2))
    assert (plain(tokens) - model(tokens)).abs().max() > 1e-2
    if config.rope_scaling is not None and not config.rope_scaling.goes_by_length:
        made = torch.stack(list(generate(model, tokens[:, :12], max_new_tokens=20)), 1)
        prompt = dict(inputs=tokens[:, :12], attention_mask=torch.ones(2, 12), pad_token_id=0)  # a 0 is no padding
        found = twin.generate(**prompt, max_new_tokens=20, do_sample=False)
        assert torch.equal(found[:, 12:], made)
    again = SisaConfig(**twin.config.to_dict())
    assert again.rope_parameters == twin.config.rope_parameters and again.rope_theta == twin.config.rope_theta


def test_a_part_of_the_channels_is_refused_in_a_sisa_folder() -> None:
    written = hf_sisa.write_config(tiny())
    with pytest.raises(UserError, match=r"partial_rotary_factor 0\.5 in a sisa model"):
        hf_sisa.read_config(written | {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}})


def test_falcon_h1_carries_it() -> None:
    values: dict[str, Any] = dict(vocab_size=59, d_model=32, n_layers=1, n_heads=4, d_ff=48, mixer="falcon_h1")
    ssm = dict(head_dim=16, d_state=12, width=64)
    for kind in ("yarn", "dynamic"):
        model = ModelConfig(**values, ssm=ssm, rope_scaling=KINDS[kind])  # type: ignore[arg-type]
        read = falcon_h1.read_config(falcon_h1.write_config(model))
        assert read.rope_scaling == model.rope_scaling and read.rope_theta == model.rope_theta
