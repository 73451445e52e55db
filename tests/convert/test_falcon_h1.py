"""Falcon-H1 models of transformers compute the same as ours made of them, multipliers and all; back to the bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_models import Held
from safetensors.torch import load_file, save_file
from torch import Tensor

from sisa_dist.config import ModelConfig, UserError
from sisa_dist.convert import falcon_h1, llama
from sisa_dist.convert.formats import architecture_for
from sisa_dist.convert.recipe import Converted, check_specs
from sisa_dist.model import LM, build_model

transformers = pytest.importorskip("transformers")

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
    """A model of transformers with every parameter drawn: gains, D and biases are constants in its own."""
    torch.manual_seed(0)
    model = transformers.FalconH1ForCausalLM(transformers.FalconH1Config(**(BASE | options))).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn_like(parameter) * 0.2
            if name.endswith(("A_log", "dt_bias")):
                parameter += noise
            else:
                parameter.copy_(1 + noise if "norm" in name or name.endswith("D") else noise)
    return model


def saved(model: Any, folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    model.save_pretrained(folder)
    return json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")


def ours(model: ModelConfig, tensors: dict[str, Tensor]) -> LM:
    built = build_model(model)
    converted = Converted(Held(tensors), falcon_h1.imports(model), dropped=falcon_h1.dropped(model))
    check_specs(converted.specs, {n: p.shape for n, p in built.named_parameters()}, what="imported")
    built.load_state_dict({name: converted.read(name) for name in converted.recipes}, strict=True)
    return built


@pytest.mark.parametrize("name", CASES)
def test_logits_and_gradients_are_theirs(name: str, tmp_path: Path) -> None:
    hf = theirs(CASES[name])
    config, tensors = saved(hf, tmp_path)
    model = falcon_h1.read_config(config)
    lm = ours(model, tensors)
    tokens = torch.randint(1, 59, (2, 37))  # 0 is their padding, whose embedding has no gradient
    want, got = hf(tokens).logits, lm(tokens)
    assert want.std() > 0.3
    assert (got - want).abs().max() < 1e-4
    direction = torch.randn_like(want)
    (want * direction).mean().backward()
    (got * direction).mean().backward()
    gradients = {name: parameter.grad for name, parameter in hf.named_parameters()}
    assert gradients.keys() == tensors.keys()
    converted = Converted(Held(gradients), falcon_h1.imports(model))
    for parameter_name, parameter in lm.named_parameters():
        wanted = converted.read(parameter_name)
        if parameter_name.endswith("wk.bias"):
            continue  # in channels that turn slowly it adds one number to all scores of a query: rounding
        assert wanted.abs().max() > 0, parameter_name
        assert (parameter.grad - wanted).abs().max() < 1e-4 * wanted.abs().max(), parameter_name


@pytest.mark.parametrize("key", SCALED)
def test_each_multiplier_matters(key: str, tmp_path: Path) -> None:
    """So that the test above sees each of them."""
    tokens = torch.randint(1, 59, (1, 20))
    plain, scaled = theirs({}), theirs({key: SCALED[key]})
    assert (plain(tokens).logits - scaled(tokens).logits).abs().max() > 1e-2


@pytest.mark.parametrize("name", CASES)
def test_there_and_back_gives_the_same_bits(name: str, tmp_path: Path) -> None:
    hf = theirs(CASES[name])
    config, tensors = saved(hf, tmp_path / "theirs")
    model = falcon_h1.read_config(config)
    lm = ours(model, tensors)
    module, config = architecture_for(model, model_type=None)
    assert module is falcon_h1 and falcon_h1.read_config(config) == model
    exported = Converted(Held(dict(lm.named_parameters())), falcon_h1.exports(model))
    written = {name: exported.read(name).detach() for name in exported.recipes}
    assert written.keys() == tensors.keys()
    assert all(torch.equal(written[name], tensor) for name, tensor in tensors.items())
    folder = tmp_path / "ours"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    save_file(written, folder / "model.safetensors", metadata={"format": "pt"})
    again, loading = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(loading[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    tokens = torch.randint(0, 59, (2, 33))
    # Chunks of another length are summed in another order.
    torch.testing.assert_close(again.eval()(tokens).logits, hf(tokens).logits, rtol=0, atol=1e-4)


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
