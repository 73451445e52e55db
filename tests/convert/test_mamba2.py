"""Mamba-2 models of transformers compute the same as ours made of them; back to the bit."""

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
from sisa_dist.convert import llama, mamba2
from sisa_dist.convert.formats import architecture_for
from sisa_dist.convert.recipe import Converted, check_specs
from sisa_dist.model import LM, build_model

transformers = pytest.importorskip("transformers")

BASE: dict[str, Any] = dict(vocab_size=59, hidden_size=32, num_heads=4, head_dim=16, state_size=12, chunk_size=16)
BASE |= dict(num_hidden_layers=2, n_groups=1, initializer_range=0.2)
CASES: dict[str, dict[str, Any]] = {
    "one group": {},
    "groups, tied": {"n_groups": 2, "tie_word_embeddings": True},
    "group a head, three taps": {"n_groups": 4, "conv_kernel": 3, "layer_norm_epsilon": 1e-3},
}


def theirs(options: dict[str, Any]) -> Any:
    """A model of transformers with every parameter drawn. The convolution's bias and D are constants in its own."""
    torch.manual_seed(0)
    model = transformers.Mamba2ForCausalLM(transformers.Mamba2Config(**(BASE | options))).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("A_log", "dt_bias")):
                continue
            noise = torch.randn_like(parameter) * 0.2
            parameter.copy_(1 + noise if "norm" in name or name.endswith("D") else noise)
    return model


def saved(model: Any, folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    model.save_pretrained(folder)
    return json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")


def ours(model: ModelConfig, tensors: dict[str, Tensor]) -> LM:
    built = build_model(model)
    converted = Converted(Held(tensors), mamba2.imports(model), dropped=mamba2.dropped(model))
    check_specs(converted.specs, {n: p.shape for n, p in built.named_parameters()}, what="imported")
    built.load_state_dict({name: converted.read(name) for name in converted.recipes}, strict=True)
    return built


@pytest.mark.parametrize("name", CASES)
def test_logits_and_gradients_are_theirs(name: str, tmp_path: Path) -> None:
    hf = theirs(CASES[name])
    config, tensors = saved(hf, tmp_path)
    model = mamba2.read_config(config)
    lm = ours(model, tensors)
    tokens = torch.randint(0, 59, (2, 37))
    want, got = hf(tokens).logits, lm(tokens)
    assert want.std() > 0.3
    assert (got - want).abs().max() < 1e-4
    direction = torch.randn_like(want)
    (want * direction).mean().backward()
    (got * direction).mean().backward()
    gradients = {name: parameter.grad for name, parameter in hf.named_parameters()}
    assert gradients.keys() == tensors.keys()
    converted = Converted(Held(gradients), mamba2.imports(model))
    for parameter_name, parameter in lm.named_parameters():
        wanted = converted.read(parameter_name)
        assert wanted.abs().max() > 0, parameter_name
        assert (parameter.grad - wanted).abs().max() < 1e-4 * wanted.abs().max(), parameter_name


@pytest.mark.parametrize("name", CASES)
def test_there_and_back_gives_the_same_bits(name: str, tmp_path: Path) -> None:
    hf = theirs(CASES[name])
    config, tensors = saved(hf, tmp_path / "theirs")
    model = mamba2.read_config(config)
    lm = ours(model, tensors)
    module, config = architecture_for(model, model_type=None)
    assert module is mamba2 and mamba2.read_config(config) == model
    exported = Converted(Held(dict(lm.named_parameters())), mamba2.exports(model))
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
    torch.testing.assert_close(again.eval()(tokens).logits, hf(tokens).logits, rtol=0, atol=1e-5)


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
        ours(model, tensors)


def test_what_a_family_cannot_be_is_refused() -> None:
    values = dict(vocab_size=59, d_model=32, n_layers=2, n_heads=4, ssm={"head_dim": 16})
    for changes in ({"mixer": "mamba2", "d_ff": 48}, {"mixer": ["mamba2", "attention"], "mlp": "none"}):
        with pytest.raises(UserError, match="mamba2 and none in every layer"):
            mamba2.write_config(ModelConfig(**(values | changes)))  # type: ignore[arg-type]
    with pytest.raises(UserError, match="has mamba2 layers and a Llama-style model has none"):
        llama.write_config(ModelConfig(**values, mixer="mamba2", mlp="none"))  # type: ignore[arg-type]
