"""training_flops_per_token against PyTorch's counter, over forward and backward, for every mixer and mixture.

The counter runs where it can see: scores as plain products (SDPA's math path, SISA's dense one), and the formulas of
our own operators where there is no such path. What it counts there and the convention does not is written out in
`beside`, by hand for the widths of these cases; the rest agrees to the last operation, where 2 % would serve an MFU.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mixer_cases import BASE, CASES, MIXTURES
from sisa_dist.config import AttentionConfig, ModelConfig
from sisa_dist.model import build_model, flops
from sisa_dist.model.flops import training_flops_per_token
from sisa_dist.model.mixers import MIXERS

T, WINDOWS = 70, 2  # five chunks of a state space, the last not full; ten windows of hymba's
BLOCKS: dict[str, dict[str, Any]] = {
    "parallel": {"mixer": "sisa", "d_s": [4, 16], "ffn": "parallel", "n_kv_heads": 1, "log_alpha_min": -0.5},
    "untied_gelu": {
        "mixer": ["sisa", "attention"],
        "d_s": [6, 0],
        "mlp": "gelu",
        "norm": "layernorm",
        "attention_bias": "all",
        "mlp_bias": True,
        "qk_norm": True,
        "parallel_residual": True,
        "tie_embeddings": False,
    },
}
ALL = CASES | MIXTURES | BLOCKS


def config_of(name: str) -> ModelConfig:
    return ModelConfig(**(BASE | ALL[name]))


@cache
def counted(name: str) -> float:
    """FLOPs of a step a token, as the counter has them, less what `beside` says."""
    config = config_of(name)
    path: Any = "bisected" if "sigmoid_sisa" in config.layer_mixers else "dense"
    # fp64, in which a mixture of experts goes by plain products.
    model = build_model(config, attention=AttentionConfig(path=path), seed=1).double()
    tokens = torch.randint(0, 61, (WINDOWS, T), generator=torch.Generator().manual_seed(0))
    # The head's gradient is added up in place, which torch has no formula for.
    in_place = {torch.ops.aten.addmm_: lambda _, a, b, **__: 2 * a[0] * a[1] * b[1]}
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False, custom_mapping=in_place) as counter:
        loss, _ = model(tokens, tokens)
        loss.backward()
    found = counter.get_total_flops() - WINDOWS * sum(beside(config, layer) for layer in range(config.n_layers))
    if model.routed is not None:
        # Each expert's rows are filled up to a multiple of 8: three matrices, forward and two products backward.
        rows = sum(-count % 8 for count in model.routed.counts_LE.flatten().tolist())
        found -= 2 * 3 * 3 * rows * 32 * config.expert_d_ff
    return found / (WINDOWS * T)


def beside(config: ModelConfig, layer: int) -> float:
    """FLOPs of a mixer over a window that the counter sees and the convention leaves out. 4 heads, of 8 channels."""
    mixer, d_s, t = config.layer_mixers[layer], config.layer_d_s[layer], T + config.meta_tokens
    visible = t * (t + 1) // 2
    if mixer in ("attention", "falcon_h1"):  # keys after the query: scores and values, once forward, twice backward
        return 2 * 3 * 4 * (t * t - visible) * (8 + 8)
    if mixer == "sisa":
        return 2 * 3 * 4 * (t * t - visible) * (8 + d_s + 8)
    if mixer == "fox":  # the backward of our operator forms its scores again
        return 2 * 4 * visible * 8
    if mixer == "sigmoid_sisa":
        return 2 * 4 * visible * (8 + d_s)
    # Δx Bᵀ, 64 channels by 6 states, is no matrix product, and is two in the backward; a third is there for A.
    scan = 2 * 2 * t * 64 * 6
    if mixer == "mamba":
        return scan
    if mixer == "hymba":  # q and k are filled up to the 16 channels of v
        keys = t * t
        if layer == 0:  # blocks of 7 queries, of 4 meta tokens and two blocks of keys each
            keys = -(-t // 7) * 7 * (4 + 2 * 7)
            visible = sum(j >= i - 6 or j < 4 for i in range(t) for j in range(i + 1))
        return scan + 2 * 3 * 4 * (keys * (16 + 16) - visible * (8 + 16))
    assert mixer in ("mamba2", "mamba3"), f"say what the counter sees of {mixer} and the convention does not"
    return 0


def agrees(name: str) -> bool:
    return training_flops_per_token(config_of(name), T) == pytest.approx(counted(name), rel=1e-9)


@pytest.mark.parametrize("name", ALL)
def test_the_formula_is_what_torch_counts_forward_and_backward(name: str) -> None:
    assert agrees(name), training_flops_per_token(config_of(name), T) / counted(name)


@pytest.mark.parametrize("mixer", MIXERS)
def test_a_mixers_formula_that_is_off_by_a_twentieth_shows(mixer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = MIXERS[mixer].multiply_adds
    monkeypatch.setattr(MIXERS[mixer], "multiply_adds", staticmethod(lambda *of: 1.05 * right(*of)))
    cases = [name for name in ALL if mixer in config_of(name).layer_mixers]
    assert cases and not any(agrees(name) for name in cases)


@pytest.mark.parametrize("name", [*MIXTURES, "ssm_gated", "untied_gelu"])
def test_a_feed_forward_formula_that_is_off_by_a_twentieth_shows(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = flops.feed_forward_multiply_adds
    monkeypatch.setattr(flops, "feed_forward_multiply_adds", lambda *of: 1.05 * right(*of))
    assert not agrees(name)
