"""What every mixer owes, rivals and ours alike: causality, decoding, strong and weak decay, compile, counts.

That packed documents stay apart is tests/model/test_document_isolation.py's.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mixer_cases import (
    BASE,
    CASES,
    FIRST,
    Strength,
    config_of,
    every_mixer,
    every_mixer_and_decay,
    first_of_every_mixer,
    logits_and_embedding,
    mixers_of,
    model_of,
)
from sisa_dist.config import UserError
from sisa_dist.model import LM, build_model
from sisa_dist.model.mixers import MIXERS
from sisa_dist.model.rope import rope_tables


def test_every_mixer_has_its_case() -> None:
    assert {mixer for name in CASES for mixer in mixers_of(name)} == MIXERS.keys()


def tokens_of(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(0, BASE["vocab_size"], shape, generator=torch.Generator().manual_seed(seed))


@every_mixer_and_decay
def test_no_token_reaches_an_earlier_one(name: str, strength: Strength) -> None:
    model, tokens, t = model_of(name, strength), tokens_of(2, 37), 22
    logits, embedded = logits_and_embedding(model, tokens)
    (gradient,) = torch.autograd.grad(logits[:, : t + 1].square().sum(), embedded)
    assert gradient[:, : t + 1].abs().amax(-1).gt(0).all()
    assert not gradient[:, t + 1 :].any()
    other = tokens.clone()
    other[:, t + 1 :] = tokens_of(2, 37, seed=2)[:, t + 1 :]
    again = model(other)
    assert torch.equal(again[:, : t + 1], logits[:, : t + 1]) and not torch.equal(again[:, -1], logits[:, -1])


@every_mixer_and_decay
def test_decoding_in_any_chunks_is_the_full_run(name: str, strength: Strength) -> None:
    decodes(name, strength, torch.float64, 1e-9)


@first_of_every_mixer
@pytest.mark.parametrize("strength", ["weak", "strong"])
def test_decoding_in_fp32_is_the_full_run(name: str, strength: Strength) -> None:
    decodes(name, strength, torch.float32, 1e-5)


def decodes(name: str, strength: Strength, dtype: torch.dtype, tolerance: float) -> None:
    model, tokens = model_of(name, strength, dtype=dtype), tokens_of(2, 37)
    with torch.no_grad():
        full = model(tokens)
        for chunks in ([1] * 37, [11, 1, 17, 2, 6], [37]):
            cache = model.new_cache()
            parts = [model(part, cache=cache) for part in tokens.split(chunks, dim=1)]
            assert all(layer.length == 37 + model.config.meta_tokens for layer in cache)
            assert (torch.cat(parts, 1) - full).abs().max() < tolerance * full.abs().max()


RECURRENT = ("mamba", "mamba2", "mamba3")


def held_bytes(cache: Any) -> int:
    """Of the storages behind every tensor that the objects hold, however deep."""
    seen: dict[int, int] = {}

    def walk(held: Any) -> None:
        if isinstance(held, Tensor):
            assert not held.requires_grad, "a cache that holds on to a graph grows with every token"
            seen[held.untyped_storage().data_ptr()] = held.untyped_storage().nbytes()
        elif isinstance(held, (list, tuple, dict)):
            for each in held.values() if isinstance(held, dict) else held:
                walk(each)
        elif hasattr(held, "__dict__"):
            walk(vars(held))

    walk(cache)
    return sum(seen.values())


@every_mixer
def test_a_cache_holds_no_graph_and_recurrent_ones_no_text(name: str) -> None:
    model, sizes = model_of(name), []
    for length in (16, 160):
        cache = model.new_cache()
        model(tokens_of(1, length), cache=cache)
        sizes.append(held_bytes(cache))
        model(tokens_of(1, 1), cache=cache)
        assert held_bytes(cache) > 0
    assert sizes[0] == sizes[1] if set(mixers_of(name)) <= set(RECURRENT) else sizes[0] < sizes[1]


@every_mixer
def test_a_cache_refuses_another_batch(name: str) -> None:
    for first, second in ((2, 1), (1, 2)):
        model = model_of(name)
        cache = model.new_cache()
        model(tokens_of(first, 9), cache=cache)
        with pytest.raises(UserError, match="start a new cache"):
            model(tokens_of(second, 1), cache=cache)


@every_mixer
@pytest.mark.parametrize("length", [1, 2, 7, 9, 40])
def test_a_prefix_gives_what_the_whole_gives(name: str, length: int) -> None:
    model, tokens = model_of(name, "strong"), tokens_of(1, 40)
    with torch.no_grad():
        assert torch.allclose(model(tokens[:, :length]), model(tokens)[:, :length], atol=1e-11)


@every_mixer
def test_fp32_is_near_fp64(name: str) -> None:
    tokens, labels = tokens_of(2, 37), tokens_of(2, 37, seed=1)
    found = {}
    for dtype in (torch.float32, torch.float64):
        model = model_of(name, "strong", dtype=dtype)
        loss, _ = model(tokens, labels)
        found[dtype] = dict(zip(dict(model.named_parameters()), gradients(model, loss), strict=True))
    for path, wanted in found[torch.float64].items():
        size = wanted.abs().max().clamp(min=5e-2)  # of a loss summed over 74 tokens
        assert (found[torch.float32][path].double() - wanted).abs().max() < 2e-4 * size, path


# 10 to 20 s each: one scan is compiled in the fast suite.
SLOW_TO_COMPILE = {"mamba", "mamba3", "hymba", "falcon_h1"}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow) if name in SLOW_TO_COMPILE or name not in FIRST.values() else name
        for name in CASES
    ],
)
def test_a_block_compiles_without_a_graph_break(name: str) -> None:
    """With every gradient. One graph, whose layouts the compiler foresees; a wrong one shows in the backward."""
    torch.compiler.reset()
    block = model_of(name).blocks[0]
    x = torch.randn(2, 24, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)
    rope = rope_tables(0, 24, channels=8, theta=1e4, device=torch.device("cpu"))
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    found = []
    for f in (block, compiled):
        y = f(x, rope)
        found.append((y, *torch.autograd.grad(y.square().sum(), [x, *block.parameters()])))
    for wanted, got in zip(*found, strict=True):
        assert torch.allclose(got, wanted, rtol=1e-12, atol=1e-12)


# Of one layer's mixer, over d_model 32, 4 heads of 8 channels.
PARAMETERS = {
    # z, x, output; dt, B, C; time steps; taps and bias of each channel; A_log, dt_bias, D
    "mamba": 3 * 32 * 64 + 64 * (2 + 12) + 2 * 64 + 64 * 5 + 64 * 6 + 2 * 64,
    "jamba": 3 * 32 * 64 + 64 * (3 + 12) + 3 * 64 + 64 * 5 + 64 * 6 + 2 * 64 + 3 + 12,
    # z, x, output; B and C; dt; taps and bias of each channel; dt_bias, A_log, D; gain
    "mamba2": 3 * 32 * 64 + 2 * 32 * 12 + 32 * 4 + (64 + 24) * 5 + 3 * 4 + 64,
    # z, x, output; B and C; dt, A, trap; angles; two gains; two biases a head; dt_bias, D
    "mamba3": 3 * 32 * 64 + 2 * 32 * 12 + 3 * 32 * 4 + 32 * 3 + 2 * 12 + 2 * 4 * 12 + 2 * 4,
    "mamba3_mimo": 3 * 32 * 64 + 2 * 32 * 72 + 3 * 32 * 4 + 32 * 3 + 2 * 12 + 2 * 4 * 36 + 2 * 4 + 3 * 4 * 3 * 16,
    "mamba3_rational": 3 * 32 * 64 + 2 * 32 * 12 + 3 * 32 * 4 + 32 * 3 + 2 * 12 + 2 * 4 * 12 + 2 * 4,
    "mamba3_sisa": 3 * 32 * 64 + 2 * 32 * 12 + 3 * 32 * 4 + 32 * 3 + 2 * 12 + 2 * 4 * 12 + 2 * 4,
    # attention of two kv heads; Mamba-2 without its norm
    "falcon_h1": 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64 + 2 * 32 * 12 + 32 * 4 + (64 + 24) * 5 + 3 * 4,
    "falcon_h1_scaled": 4 * 32 * 32 + 3 * 32 * 64 + 2 * 32 * 24 + 32 * 4 + (64 + 48) * 5 + 3 * 4 + 64,
    # q, k, v of two kv heads, 16 values a head; Mamba with norms; norms of both outputs
    "hymba": 32 * 32 + 32 * 16 + 32 * 32 + 3 * 32 * 64 + 64 * (2 + 12) + 2 * 64 + 64 * 5 + 64 * 6 + 4 * 64 + 2 + 12,
    "mamba2_groups": 3 * 32 * 64 + 2 * 32 * 24 + 32 * 4 + (64 + 48) * 4 + 3 * 4 + 64,
    "sisa": 4 * 32 * 32 + 2 * 32 * 4 * 8 + (32 * 4 + 4) + 32 * 4 * 4 + 4,
    "attention": 4 * 32 * 32,
    "sisa_ssmax": 2 * 32 * 32 + 2 * 32 * 16 + 32 * 32 + 32 * 16 + (32 * 2 + 2) + 32 * 2 * 4 + 4 + 4,
    "attention_ssmax": 4 * 32 * 32 + 4,
    "no_decay": 4 * 32 * 32 + 2 * 32 * 4 * 8 + 32 * 4 * 4 + 4,
    "no_rotation": 2 * 32 * 32 + 2 * 32 * 16 + 32 * 32 + 32 * 16 + (32 * 2 + 2) + 4,
    "bilinear": 4 * 32 * 32 + 2 * 32 * 4 * 8 + 4,
    "sigmoid_sisa": 2 * 32 * 32 + 2 * 32 * 16 + 32 * 32 + 32 * 16 + (32 * 2 + 2) + 32 * 2 * 4 + 4,
    "ssm_gated": 2 * 32 * 32 + 2 * 32 * 16 + 32 * 32 + 32 * 16 + (32 * 2 + 2) + 32 * 2 * 4 + 4,
    "learned_d_s": 2 * 32 * 32 + 2 * 32 * 16 + 32 * 32 + 32 * 16 + (32 * 2 + 2) + 32 * 2 * 4 + 4,
    "fox": 4 * 32 * 32 + (32 * 4 + 4),
    # q, output and gate; k and v of two kv heads; forget gate; shifts; norms of q and k; norm of the output
    "fox_pro": 3 * 32 * 32 + 2 * 32 * 16 + (32 * 4 + 4) + 2 * 32 * 2 + 2 * 8 + 32,
}


@every_mixer
def test_parameter_counts(name: str) -> None:
    with torch.device("meta"):
        mixer = build_model(config_of(name)).blocks[0].mixer
    assert sum(p.numel() for p in mixer.parameters()) == PARAMETERS[name]


def gradients(model: LM, loss: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss, list(model.parameters()))
