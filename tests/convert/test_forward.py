"""Logits read module by module are the model's own, to the bit, and no weight stays behind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from sisa_dist.convert.formats import open_checkpoint
from sisa_dist.convert.forward import fixed_tokens, logits
from sisa_dist.convert.tensors import num_bytes


@pytest.mark.parametrize("settings", [{}, {"tie_embeddings": False}, {"mixer": "attention", "d_s": None}])
def test_equal_to_the_whole_model(make_checkpoint: Callable[..., Any], settings: dict[str, Any]) -> None:
    made = make_checkpoint(**settings)
    opened = open_checkpoint(made.folder)
    tokens_BT = fixed_tokens(opened.model)
    assert tokens_BT.max() == opened.model.vocab_size - 1 and len(tokens_BT.unique()) > 100
    with torch.no_grad():
        assert torch.equal(logits(opened.source, opened.model, tokens_BT), made.model(tokens_BT))


def test_every_weight_is_read_and_matters(make_checkpoint: Callable[..., Any]) -> None:
    made = make_checkpoint(n_layers=2, mixer=["sisa", "attention"], d_s=[4, 0])
    config = made.model.config
    tokens_BT = fixed_tokens(config)

    class Changed:
        specs = made.tensors
        name = ""

        def read(self, name: str) -> torch.Tensor:
            tensor = made.tensors[name].clone()
            if name == self.name:
                tensor.view(-1)[0] += 0.5
            return tensor

    source = Changed()
    wanted = logits(source, config, tokens_BT)
    for name, _ in made.model.named_parameters():
        source.name = f"model.{name}"
        assert not torch.equal(logits(source, config, tokens_BT), wanted), name


def test_one_module_is_in_memory_at_a_time(make_checkpoint: Callable[..., Any], real_memory: Any) -> None:
    opened = open_checkpoint(make_checkpoint(d_model=256, d_ff=1024, n_layers=6, mixer="sisa", d_s=8).folder)
    weights = [num_bytes(spec) for spec in opened.without_moments().source.specs.values()]
    tokens_BT = fixed_tokens(opened.model)[:1, :8]
    with real_memory() as meter:
        logits(opened.source, opened.model, tokens_BT)
    # The tensor, the stored part it was copied from; activations are a few kB.
    assert sum(meter.peaks[""].values()) < 2 * max(weights) + 300_000 < sum(weights) / 8
