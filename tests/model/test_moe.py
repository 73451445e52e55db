"""The mixture of experts against its definition, token by token; its losses, its ties and its cost."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mixer_cases import BASE, MIXTURES
from sisa_dist.config import ModelConfig, UserError, parse_config
from sisa_dist.model import build_model, num_parameters
from sisa_dist.model.init import init_parameters
from sisa_dist.model.moe import MoE


def mixture(**moe: Any) -> tuple[ModelConfig, MoE]:
    config = ModelConfig(**(BASE | {"mixer": "attention", "mlp": "moe", "moe": {"experts": 6} | moe}))
    module = MoE(config)
    init_parameters(module, seed=3, std=0.3)
    module.double()
    if hasattr(module.router, "bias"):
        module.router.bias.copy_(torch.linspace(-0.3, 0.3, config.experts))
    return config, module


def by_definition(config: ModelConfig, module: MoE, x_BTD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(output, losses [B, 2], counts [E]) of one token after another."""
    moe, experts = config.moe, module.experts
    assert moe is not None
    out, losses, counts = torch.zeros_like(x_BTD), [], torch.zeros(config.experts, dtype=torch.int64)
    for b in range(x_BTD.shape[0]):
        share, chosen, z = torch.zeros(config.experts).double(), [0] * config.experts, torch.zeros(()).double()
        for t in range(x_BTD.shape[1]):
            x = x_BTD[b, t]
            logits = module.router.weight @ x
            score = logits.softmax(0) if moe.scores == "softmax" else logits.sigmoid()
            wanted = score + (module.router.bias if moe.balance == "bias" else 0.0)
            best = sorted(range(config.experts), key=lambda e: (-wanted[e].item(), e))[: moe.top_k]
            scale = sum(score[e] for e in best) if moe.normalise_top_k else 1.0
            for e in best:
                inner = F.silu(x @ experts.gate[e]) * (x @ experts.up[e])
                out[b, t] += score[e] / scale * (inner @ experts.down[e])
                chosen[e] += 1
                counts[e] += 1
            if module.shared is not None:
                out[b, t] += module.shared(x)
            share = share + score / score.sum() / x_BTD.shape[1]
            z = z + logits.exp().sum().log() ** 2 / x_BTD.shape[1]
        fraction = torch.tensor(chosen).double() / (x_BTD.shape[1] * moe.top_k)
        losses.append(torch.stack((config.experts * (fraction * share).sum(), z)))
    return out, torch.stack(losses), counts


VARIANTS: list[dict[str, Any]] = [
    {},
    {"top_k": 3, "shared": 1, "normalise_top_k": False},
    {"top_k": 1, "normalise_top_k": False, "scores": "sigmoid", "balance": "bias"},
    {"top_k": 6, "balance": "bias", "d_ff": None, "shared": 2},
]


@pytest.mark.parametrize("moe", VARIANTS)
def test_it_is_what_the_definition_says_with_every_gradient(moe: dict[str, Any]) -> None:
    config, module = mixture(**moe)
    x_BTD = torch.randn(3, 5, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    results = []
    for function in (module, lambda x: by_definition(config, module, x)):
        x = x_BTD.clone().requires_grad_()
        found = function(x)
        y, (losses, counts) = found if function is module else (found[0], found[1:])
        grads = torch.autograd.grad(
            y.sin().sum() + (losses * torch.tensor([1.0, 2.0])).sum(), [x, *module.parameters()]
        )
        results.append([y, losses, counts, *grads])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-10)
    assert int(results[0][2].sum()) == 15 * (config.moe.top_k if config.moe else 0)


def test_even_routing_costs_one_and_equals_are_broken_alike() -> None:
    _, module = mixture(top_k=2)
    with torch.no_grad():
        module.router.weight.zero_()
        x_BTD = torch.randn(2, 7, 32, dtype=torch.float64)
        choice = module.router(x_BTD)
        assert (choice.expert_BTK == torch.tensor([0, 1])).all() and (choice.weight_BTK == 0.5).all()
        _, (losses_B2, counts_E) = module(x_BTD)
    torch.testing.assert_close(losses_B2[:, 0], torch.ones(2).double())
    assert counts_E.tolist() == [14, 14, 0, 0, 0, 0]


def test_the_loss_is_the_language_models_and_the_gradient_is_of_both() -> None:
    config = ModelConfig(**(BASE | MIXTURES["moe"]))
    model = build_model(config, seed=2)
    tokens = torch.randint(0, 61, (3, 12), generator=torch.Generator().manual_seed(0))
    labels = tokens.roll(-1, 1).clone()
    labels[0, :7] = -100
    loss, count = model(tokens, labels)
    log_prob, _ = model(tokens, labels, per_token=True)
    torch.testing.assert_close(loss, -log_prob.sum())
    assert model.routed is not None and int(count) == int(model.routed.labels) == 29
    captured: list[Tensor] = []
    for block in model.blocks:
        block.mlp.router.register_forward_hook(lambda module, arguments, choice: captured.append(choice))
    model.reset_statistics()
    loss, _ = model(tokens, labels)
    names, parameters = zip(*model.named_parameters(), strict=True)
    got = torch.autograd.grad(loss, parameters)
    # The same again with the language model's loss alone, and the two terms put together by hand.
    captured.clear()
    loss, _ = model(tokens, labels)
    extra = torch.zeros(())
    num_B = (labels != -100).sum(1)
    for choice in captured:
        counts = F.one_hot(choice.expert_BTK, 8).sum((1, 2)).float()  # type: ignore[attr-defined]
        balance = 8 * (counts / (12 * 2) * choice.share_BTE.mean(1)).sum(1)  # type: ignore[attr-defined]
        extra = extra + (num_B * (0.1 * balance + 0.01 * choice.z_BT.mean(1))).sum()  # type: ignore[attr-defined]
    object.__setattr__(config.moe, "balance_weight", 1e-30)
    object.__setattr__(config.moe, "z_loss", 0.0)
    plain, _ = model(tokens, labels)
    object.__setattr__(config.moe, "balance_weight", 0.1)
    want = torch.autograd.grad(plain + extra, parameters)
    for name, a, b in zip(names, got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("name", MIXTURES)
def test_parameters_are_those_of_a_formula(name: str) -> None:
    config = ModelConfig(**(BASE | MIXTURES[name]))
    layer = config.layer_mlps.index("moe")
    module = build_model(config).blocks[layer].mlp
    assert isinstance(module, MoE) and config.moe is not None
    moe, width = config.moe, config.d_model
    inner = moe.experts * config.expert_d_ff + config.shared_d_ff
    assert num_parameters(module) == width * (3 * inner + moe.experts)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"mlp": "moe"}, "mlp moe and the section moe belong together"),
        ({"moe": {"experts": 4}}, "mlp moe and the section moe belong together"),
        ({"mlp": "moe", "moe": {"experts": 2, "top_k": 3}}, "top_k 3 exceeds experts 2: set it to at most 2"),
        ({"mlp": "moe", "moe": {"experts": 2, "top_k": 1}}, "set normalise_top_k: false"),
        ({"mlp": "moe", "mlp_bias": True, "moe": {"experts": 2}}, "mlp_bias is set and experts have no biases"),
        ({"mlp": "moe", "moe": {"experts": 2, "d_ff": 8}}, "remove moe.d_ff"),
        ({"mlp": "moe", "moe": {"experts": 2, "bias_rate": 0.1}}, "bias_rate has no effect with balance loss"),
        (
            {"mlp": "moe", "moe": {"experts": 2, "balance": "none", "balance_weight": 0.1}},
            "balance_weight has no effect with balance none",
        ),
    ],
)
def test_settings_without_sense_are_refused(model: dict[str, Any], message: str) -> None:
    tree = {"model": BASE | {"mixer": "attention"} | model, "training": {"steps": 1, "global_batch_tokens": 2048}}
    with pytest.raises(UserError, match=message):
        parse_config(tree | {"schedule": {"warmup_steps": 0}}, source="test")
