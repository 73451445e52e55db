"""A dense model upcycled to a mixture of experts: the same outputs, experts that part, a run that goes on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from distributed.grid import VOCAB
from sisa_dist.checkpoint import load_model
from sisa_dist.config import ModelConfig, UserError
from sisa_dist.convert.conversion import convert, plan
from sisa_dist.convert.upcycle_experts import expert_recipes, upcycle_experts
from sisa_dist.model import build_model


def dense(**changes: Any) -> ModelConfig:
    values = dict(vocab_size=VOCAB, d_model=32, n_layers=2, n_heads=4, d_ff=48, mixer=["attention", "sisa"])
    return ModelConfig(**(values | {"d_s": [0, 8], "init_std": 0.2} | changes))  # type: ignore[arg-type]


@pytest.mark.parametrize("top_k", [2, 3])
def test_outputs_are_the_dense_models_and_experts_part(top_k: int) -> None:
    model = dense()
    old = build_model(model, seed=1)
    new = build_model(upcycle_experts(model, experts=4, top_k=top_k), seed=5)
    table = expert_recipes(model, experts=4, top_k=top_k, seed=5)
    made = {name: recipe.make(*(old.state_dict()[n] for n in recipe.sources)) for name, recipe in table.items()}
    new.load_state_dict(made, strict=True)
    tokens = torch.randint(0, VOCAB, (2, 30), generator=torch.Generator().manual_seed(0))
    got, want = new(tokens), old(tokens)
    assert want.std() > 0.5
    torch.testing.assert_close(got, want, rtol=0, atol=2e-5)
    F.cross_entropy(got.flatten(0, 1), tokens.flatten()).backward()
    grad_EDF = new.blocks[0].mlp.experts.gate.grad  # type: ignore[union-attr]
    assert all((grad_EDF[a] - grad_EDF[b]).abs().max() > 1e-4 for a in range(4) for b in range(a))  # type: ignore


def test_through_the_tool_verified_and_loaded(make_checkpoint: Callable[..., Any], tmp_path: Path) -> None:
    source = make_checkpoint("step_00000007", mixer="attention", d_s=None, mlp="swiglu")
    target = tmp_path / "mixture"
    lines = list(convert(plan(source.folder, to="native", experts=(4, 2)), target))
    assert any("old and the new architecture" in line for line in lines)
    model, _ = load_model(target)
    assert model.config.experts == 4 and model.config.layer_mlps == ["moe"] * model.config.n_layers


@pytest.mark.parametrize(
    ("changes", "top_k", "message"),
    [
        ({"mlp": "gelu"}, 2, "model.mlp is not SwiGLU"),
        ({"mlp_bias": True}, 2, "model.mlp is not SwiGLU without biases"),
        ({"mlp": "none"}, 2, "model.mlp is not SwiGLU"),
        ({}, 1, "give at least 2"),
        ({}, 5, "top_k 5 exceeds experts 4"),
    ],
)
def test_what_cannot_become_one_is_refused(changes: dict[str, Any], top_k: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        upcycle_experts(dense(**changes), experts=4, top_k=top_k)


def test_a_layer_without_mlp_stays_without() -> None:
    assert upcycle_experts(dense(mlp=["none", "swiglu"]), experts=4, top_k=2).layer_mlps == ["none", "moe"]
