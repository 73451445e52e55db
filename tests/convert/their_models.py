"""Tiny models of transformers and ours made of them: the same logits and gradients, the same bits on the way back."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import transformers
from hf_models import Held
from safetensors.torch import load_file, save_file
from torch import Tensor

from sisa_dist.config import ModelConfig
from sisa_dist.convert.formats import architecture_for
from sisa_dist.convert.recipe import Converted, check_specs
from sisa_dist.model import LM, build_model

Tensors = dict[str, Tensor]


def drawn(kind: Any, config: Any, *, moved: tuple[str, ...]) -> Any:
    """A model of `kind` with every parameter drawn, for gains, D and biases are constants in a new one. Those whose
    names end in `moved` are moved from where they begin."""
    torch.manual_seed(0)
    model = kind(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn_like(parameter) * 0.2
            if name.endswith(moved):
                parameter += noise
            else:
                parameter.copy_(1 + noise if "norm" in name or name.endswith("D") else noise)
    return model.eval()


def saved(model: Any, folder: Path) -> tuple[dict[str, Any], Tensors]:
    model.save_pretrained(folder)
    return json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")


def ours(family: ModuleType, model: ModelConfig, tensors: Tensors) -> LM:
    built = build_model(model)
    converted = Converted(Held(tensors), family.imports(model), dropped=family.dropped(model))
    check_specs(converted.specs, {n: p.shape for n, p in built.named_parameters()}, what="imported")
    built.load_state_dict({name: converted.read(name) for name in converted.recipes}, strict=True)
    return built


def check_logits_and_gradients(
    family: ModuleType,
    theirs: Any,
    folder: Path,
    *,
    tokens: int,
    as_saved: Callable[[Tensors], Tensors] = dict,
    rounding: tuple[str, ...] = (),
) -> None:
    """To 1e-4 in fp32. `as_saved`: gradients by the names of their files. Of parameters whose names end in `rounding`
    the gradient is rounding alone."""
    config, tensors = saved(theirs, folder)
    model = family.read_config(config)
    lm = ours(family, model, tensors)
    ids = torch.randint(1, 59, (2, tokens))  # 0 is the padding of some, whose embedding has no gradient
    want, got = theirs(ids).logits, lm(ids)
    assert want.std() > 0.3
    assert (got - want).abs().max() < 1e-4
    direction = torch.randn_like(want)
    (want * direction).mean().backward()
    (got * direction).mean().backward()
    gradients = as_saved({name: parameter.grad for name, parameter in theirs.named_parameters()})
    assert gradients.keys() == tensors.keys()
    converted = Converted(Held(gradients), family.imports(model))
    for name, parameter in lm.named_parameters():
        wanted = converted.read(name)
        if name.endswith(rounding):
            continue
        assert wanted.abs().max() > 0, name
        assert (parameter.grad - wanted).abs().max() < 1e-4 * wanted.abs().max(), name


def check_there_and_back(
    family: ModuleType,
    theirs: Any,
    folder: Path,
    *,
    atol: float,
    said: Callable[[ModelConfig], ModelConfig] = lambda model: model,
) -> None:
    """The same bits in every tensor, which transformers loads without a word; its logits to `atol`. `said`: our model
    as the exported config says it."""
    config, tensors = saved(theirs, folder / "theirs")
    model = family.read_config(config)
    lm = ours(family, model, tensors)
    module, config = architecture_for(model, model_type=None)
    assert module is family and family.read_config(config) == said(model)
    exported = Converted(Held(dict(lm.named_parameters())), family.exports(model))
    written = {name: exported.read(name).detach() for name in exported.recipes}
    assert written.keys() == tensors.keys()
    assert all(torch.equal(written[name], tensor) for name, tensor in tensors.items())
    (folder / "ours").mkdir()
    (folder / "ours" / "config.json").write_text(json.dumps(config))
    save_file(written, folder / "ours" / "model.safetensors", metadata={"format": "pt"})
    again, loading = transformers.AutoModelForCausalLM.from_pretrained(folder / "ours", output_loading_info=True)
    assert not any(loading[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    ids = torch.randint(0, 59, (2, 33))
    torch.testing.assert_close(again.eval()(ids).logits, theirs(ids).logits, rtol=0, atol=atol)
