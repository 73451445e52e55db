"""The block with one norm: ffn parallel, and ssm_gated, which starts as it and adds C_t to the gate, head by head."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mixer_cases import BASE
from sisa_dist.config import AttentionConfig, ModelConfig, OptimizerConfig, UserError, load_config
from sisa_dist.engine.optim import build_optimizer
from sisa_dist.model import LM, build_model, generate
from sisa_dist.model.rope import rope_tables

QUICKSTART = Path(__file__).parents[2] / "configs" / "quickstart.yaml"
U = "mlp.ssm_gate.weight"
# What gives C, in every way that its heads and channels may be counted.
GIVERS: dict[str, dict[str, Any]] = {
    "sisa": {"d_s": [4, 16], "mlp_bias": True},
    "gqa": {"n_kv_heads": 1, "qk_norm": True},
    "bilinear": {"sisa": {"decay": False, "rotation": False}, "n_kv_heads": 2},
    "ssmax": {"ssmax": 40},
    "sigmoid": {"mixer": "sigmoid_sisa"},
    "hybrid": {"mixer": ["sisa", "attention"], "d_s": [8, 0], "ffn": ["ssm_gated", "parallel"]},
}
every_giver = pytest.mark.parametrize("giver", GIVERS)


def config_of(giver: str = "sisa", **changes: Any) -> ModelConfig:
    return ModelConfig(**(BASE | {"mixer": "sisa", "d_s": 8, "ffn": "ssm_gated"} | GIVERS[giver] | changes))


def model_of(giver: str = "sisa", **changes: Any) -> LM:
    """In fp64, with a U that is not 0."""
    model = build_model(config_of(giver, **changes), seed=3).double()
    for name, parameter in model.named_parameters():
        if name.endswith(U):
            torch.nn.init.normal_(parameter, std=0.5, generator=torch.Generator().manual_seed(len(name)))
    return model


def tokens_of(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 61, shape, generator=torch.Generator().manual_seed(seed))


def run(model: LM) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """(logits, loss, every gradient)"""
    tokens, labels = tokens_of(2, 37), tokens_of(2, 37, seed=1)
    loss, _ = model(tokens, labels)
    found = torch.autograd.grad(loss, list(model.parameters()))
    return model(tokens).detach(), loss.detach(), dict(zip(dict(model.named_parameters()), found, strict=True))


@every_giver
def test_a_new_model_is_the_parallel_block(giver: str) -> None:
    """To the bit, logits, loss and all gradients that both have; and U's own is not 0, or it would never leave it."""
    gated = run(build_model(config_of(giver), seed=3))
    plain = run(build_model(config_of(giver, ffn="parallel"), seed=3))
    assert torch.equal(gated[0], plain[0]) and torch.equal(gated[1], plain[1])
    own = gated[2].keys() - plain[2].keys()
    assert own == {f"blocks.{layer}.{U}" for layer in range(2) if config_of(giver).layer_ffns[layer] == "ssm_gated"}
    for name, gradient in plain[2].items():
        assert torch.equal(gated[2][name], gradient), name
    for name in own:
        assert gated[2][name].abs().amax(dim=(1, 2)).gt(1e-4).all()  # of every head


def folded(model: LM, *, order: list[int] | None = None) -> LM:
    """The parallel block with U W_C in its gate's weights; `order` gives each head another's slice of U."""
    plain = LM(model.config.model_copy(update={"ffn": "parallel"}), AttentionConfig()).double()
    state = dict(model.state_dict())
    for layer, block in enumerate(model.blocks):
        u_HFS = state.pop(f"blocks.{layer}.{U}", None)
        if u_HFS is not None:
            u_HFS = u_HFS[order] if order else u_HFS
            wc_HSD = block.mixer.wc.weight.detach().unflatten(0, (4, -1))
            gate = f"blocks.{layer}.mlp.gate.weight"
            state[gate] = state[gate] + torch.stack([u @ wc for u, wc in zip(u_HFS, wc_HSD, strict=True)]).flatten(0, 1)
    plain.load_state_dict(state)
    return plain


@every_giver
def test_it_is_the_parallel_block_with_u_in_its_gate(giver: str) -> None:
    """An oracle without a head, a slice or a C_t in its forward: W_gate x + U_h W_C,h x = (W_gate + U W_C) x."""
    model = model_of(giver)
    (logits, loss, gradients), want = run(model), run(folded(model))
    assert (logits - want[0]).abs().max() < 1e-5 * want[0].abs().max()  # logits are fp32 at most
    assert abs(loss / want[1] - 1) < 1e-6
    for name, gradient in want[2].items():
        if not name.endswith("mixer.wc.weight"):
            assert (gradients[name] - gradient).abs().max() < 1e-6 * gradient.abs().max(), name
    for layer, block in enumerate(model.blocks):
        u = gradients.get(f"blocks.{layer}.{U}")
        if u is not None:  # by the chain rule from the folded gate's
            gate_HFD = want[2][f"blocks.{layer}.mlp.gate.weight"].unflatten(0, (4, -1))
            wc_HSD = block.mixer.wc.weight.detach().unflatten(0, (4, -1))
            assert (u - gate_HFD @ wc_HSD.mT).abs().max() < 1e-6 * u.abs().max()
            wc = want[2][f"blocks.{layer}.mixer.wc.weight"].unflatten(0, (4, -1))
            wc = (wc + block.mlp.ssm_gate.weight.mT @ gate_HFD).flatten(0, 1)
            got = gradients[f"blocks.{layer}.mixer.wc.weight"]
            assert (got - wc).abs().max() < 1e-6 * wc.abs().max()


def test_another_heads_slice_of_u_is_seen() -> None:
    model = model_of()
    (logits, *_), (swapped, *_) = run(model), run(folded(model, order=[1, 0, 2, 3]))
    assert (logits - swapped).abs().max() > 1e-2 * logits.abs().max()


@pytest.mark.parametrize("mlp", ["swiglu", "gelu"])
def test_the_parallel_block_is_its_equation(mlp: str) -> None:
    block = build_model(config_of(ffn="parallel", mlp=mlp), seed=3).blocks[0]
    assert not hasattr(block, "norm2")
    h, rope = torch.randn(2, 9, 32), rope_tables(0, 9, channels=8, theta=1e4, device=torch.device("cpu"))
    x = h / (h.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    p = dict(block.mlp.named_parameters())
    up = x @ p["up.weight"].T + p["up.bias"]
    inner = F.gelu(up) if mlp == "gelu" else F.silu(x @ p["gate.weight"].T + p["gate.bias"]) * up
    want = h + block.mixer(x, rope) + inner @ p["down.weight"].T + p["down.bias"]
    torch.testing.assert_close(block(h, rope), want, rtol=1e-5, atol=1e-5)


def test_generation_goes_on_with_the_new_tokens_own_c() -> None:
    model, prompt = model_of("gqa"), tokens_of(2, 7)
    made = torch.stack(list(generate(model, prompt, max_new_tokens=9)), 1)
    for n in range(9):
        assert torch.equal(model(torch.cat((prompt, made[:, :n]), 1))[:, -1].argmax(-1), made[:, n])


def test_recomputation_changes_no_gradient() -> None:
    model = model_of()
    plain = run(model)[2]
    for block in model.blocks:
        block.activation_checkpointing = True
    for name, gradient in run(model)[2].items():
        assert torch.equal(gradient, plain[name]), name


@pytest.mark.parametrize("ffn", ["sequential", "parallel", "ssm_gated"])
def test_parameters_are_what_is_counted(ffn: str) -> None:
    config = config_of(ffn=ffn)
    model = build_model(config)
    for block, d_s in zip(model.blocks, config.layer_d_s, strict=True):
        outside = sum(p.numel() for p in block.parameters()) - sum(p.numel() for p in block.mixer.parameters())
        norms, u = (2, 0) if ffn == "sequential" else (1, 48 * d_s if ffn == "ssm_gated" else 0)
        assert outside == norms * 32 + 3 * 32 * 48 + (2 * 48 + 32) + u


def test_u_is_decayed_as_matrices_are() -> None:
    model = build_model(config_of())
    groups = build_optimizer(model, OptimizerConfig(lr=1e-3, weight_decay=0.1)).param_groups
    found = [
        group["weight_decay"]
        for group in groups
        for p in group["params"]
        for b in model.blocks
        if p is b.mlp.ssm_gate.weight
    ]
    assert found == [0.1, 0.1]


NOT_SISA = ("model.mixer=attention", "model.d_s=null")


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (("model.ffn=gated",), "model.ffn: "),
        (("model.ffn=[parallel, parallel]",), "ffn lists 2 layers, n_layers is 4: make them equal"),
        (("model.ffn=parallel", "model.parallel_residual=true"), "one for both: remove one of them"),
        (("model.ffn=parallel", "model.mlp=none"), "layer 0 is parallel but its mlp is none: set ffn to sequential"),
        (("model.ffn=ssm_gated", "model.mlp=gelu"), "its mlp gelu has no gate: set mlp to swiglu"),
        (
            ("model.ffn=ssm_gated", *NOT_SISA),
            "its mixer attention has no C: set ffn to parallel there, or mixer to sisa or sigmoid_sisa",
        ),
        (("model.ffn=ssm_gated", "model.mixer=fox", "model.d_s=null"), "its mixer fox has no C"),
        (
            ("model.ffn=ssm_gated", "model.d_ff=511"),
            "n_heads 4 and ffn ssm_gated gives each head its slice: set d_ff to 508 or 512",
        ),
    ],
)
def test_what_cannot_be_is_one_line_with_the_remedy(overrides: tuple[str, ...], says: str) -> None:
    with pytest.raises(UserError) as caught:
        load_config(QUICKSTART, list(overrides))
    assert says in str(caught.value) and "\n" not in str(caught.value)
