"""Jamba models of transformers, with experts and without, compute the same as ours made of them; back to the bit."""

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
from sisa_dist.convert import jamba
from sisa_dist.convert.formats import architecture_for
from sisa_dist.convert.recipe import Converted, check_specs
from sisa_dist.model import LM, build_model

transformers = pytest.importorskip("transformers")

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
    """A model of transformers with every parameter drawn: gains, D and biases are constants in its own."""
    torch.manual_seed(0)
    model = transformers.JambaForCausalLM(transformers.JambaConfig(**(BASE | options))).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn_like(parameter) * 0.2
            if name.endswith("A_log"):
                parameter += noise
            else:
                parameter.copy_(1 + noise if "norm" in name or name.endswith("D") else noise)
    return model


def saved(model: Any, folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    model.save_pretrained(folder)
    return json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")


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


def ours(model: ModelConfig, tensors: dict[str, Tensor]) -> LM:
    built = build_model(model)
    converted = Converted(Held(tensors), jamba.imports(model), dropped=jamba.dropped(model))
    check_specs(converted.specs, {n: p.shape for n, p in built.named_parameters()}, what="imported")
    built.load_state_dict({name: converted.read(name) for name in converted.recipes}, strict=True)
    return built


@pytest.mark.parametrize("name", CASES)
def test_logits_and_gradients_are_theirs(name: str, tmp_path: Path) -> None:
    hf = theirs(CASES[name])
    config, tensors = saved(hf, tmp_path)
    model = jamba.read_config(config)
    lm = ours(model, tensors)
    tokens = torch.randint(1, 59, (2, 75))  # 0 is their padding, whose embedding has no gradient
    want, got = hf(tokens).logits, lm(tokens)
    assert want.std() > 0.3
    assert (got - want).abs().max() < 1e-4
    direction = torch.randn_like(want)
    (want * direction).mean().backward()
    (got * direction).mean().backward()
    gradients = as_saved({name: parameter.grad for name, parameter in hf.named_parameters()})
    assert gradients.keys() == tensors.keys()
    converted = Converted(Held(gradients), jamba.imports(model))
    for parameter_name, parameter in lm.named_parameters():
        wanted = converted.read(parameter_name)
        assert wanted.abs().max() > 0, parameter_name
        assert (parameter.grad - wanted).abs().max() < 1e-4 * wanted.abs().max(), parameter_name


@pytest.mark.parametrize("name", CASES)
def test_there_and_back_gives_the_same_bits(name: str, tmp_path: Path) -> None:
    hf = theirs(CASES[name])
    config, tensors = saved(hf, tmp_path / "theirs")
    model = jamba.read_config(config)
    lm = ours(model, tensors)
    module, config = architecture_for(model, model_type=None)
    assert module is jamba and jamba.read_config(config).model_dump() == model.model_dump() | {
        "mamba": {"norms": True, "dt_rank": model.dt_rank}
    }
    exported = Converted(Held(dict(lm.named_parameters())), jamba.exports(model))
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
    assert torch.equal(again.eval()(tokens).logits, hf(tokens).logits)


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
