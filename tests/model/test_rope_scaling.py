"""Scaled RoPE: every kind has transformers' frequencies and temperature, in documents, in decoding, under any cast."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from mixer_cases import config_of, logits_and_embedding, model_of
from sisa_dist.config import AttentionConfig, RopeScalingConfig
from sisa_dist.engine.compute_dtype import compute_in
from sisa_dist.model import build_model, generate
from sisa_dist.model.rope import rope_tables
from sisa_dist.model.rope_scaling import attention_factor, frequencies

utils = pytest.importorskip("transformers.modeling_rope_utils")
CPU = torch.device("cpu")
ORIGINAL = 64


def longrope(pairs: int, **changes: Any) -> dict[str, Any]:
    short, long = ([1 + slope * i / pairs for i in range(pairs)] for slope in (0.3, 20.0))
    return {"rope_type": "longrope", "short_factor": short, "long_factor": long, "factor": 8.0} | changes


def settings(pairs: int, original: int) -> Iterator[dict[str, Any]]:
    """Many of every kind. ntk is not transformers': it is compared with the base it stands for."""
    own = {"original_max_position_embeddings": original}
    for factor in (1.25, 4, 16.0, 40.0):
        yield {"rope_type": "linear", "factor": factor}
        yield {"rope_type": "dynamic", "factor": factor} | own
        yield {"rope_type": "yarn", "factor": factor} | own
        yield {"rope_type": "yarn", "factor": factor, "attention_factor": 0.7, "beta_fast": 8.0, "beta_slow": 2} | own
        yield {"rope_type": "yarn", "factor": factor, "mscale": 0.7, "mscale_all_dim": 1.3, "truncate": False} | own
        for low, high in ((1.0, 4.0), (0.5, 2), (2.0, 32.0)):
            band = {"low_freq_factor": low, "high_freq_factor": high}
            yield {"rope_type": "llama3", "factor": factor} | band | own
        yield longrope(pairs, factor=factor) | own
    yield {"rope_type": "dynamic", "factor": 1.0} | own
    yield longrope(pairs, factor=None, attention_factor=1.1) | own


def their_table(said: dict[str, Any], theta: float, width: int, fraction: float, length: int) -> tuple[Tensor, float]:
    """What transformers' function of the kind gives; `length` is that of the sequence."""
    parameters = {key: value for key, value in said.items() if value is not None} | {"rope_theta": theta}
    config = SimpleNamespace(
        **{"head_dim": width, "hidden_size": 4 * width, "num_attention_heads": 4},
        rope_parameters=parameters | {"partial_rotary_factor": fraction},
        max_position_embeddings=said.get("original_max_position_embeddings", 7),
        standardize_rope_params=lambda: None,
    )
    return utils.ROPE_INIT_FUNCTIONS[said["rope_type"]](config, CPU, seq_len=length)


SHAPES = [
    (theta, width, fraction, original)
    for theta, width, fraction in ((1e4, 64, 1.0), (5e5, 128, 1.0), (1e4, 64, 0.25), (1e6, 80, 0.5), (300.0, 6, 1.0))
    for original in (64, 2048, 8192)
]


@pytest.mark.parametrize(("theta", "width", "fraction", "original"), SHAPES)
def test_frequencies_and_temperature_are_those_of_transformers(
    theta: float, width: int, fraction: float, original: int
) -> None:
    channels, seen = int(width * fraction), set()
    # Their formulas in fp64 too: a mistake of formula cannot hide in their rounding to fp32.
    exact = mock.Mock(wraps=torch, float=torch.float64, float32=torch.float64, Tensor=Tensor, int64=torch.int64)
    for said, length in itertools.product(settings(channels // 2, original), (1, original, original + 1, 5 * original)):
        scaling = RopeScalingConfig(**said)
        got = frequencies(channels, theta, scaling, length=length, device=CPU)
        assert got.shape == (channels // 2,) and got.dtype == torch.float64
        wanted, factor = their_table(said, theta, width, fraction, length)
        # Of a ramp they form differences in fp32 and a factor of 40 magnifies the error: to 2.1e-6 somewhere here.
        rounding = 3e-6 if said["rope_type"] in ("yarn", "llama3") else 1e-6
        torch.testing.assert_close(got, wanted.double(), rtol=rounding, atol=0.0, msg=partial("{}: {}".format, said))
        assert attention_factor(scaling) == pytest.approx(factor, rel=1e-15)
        if said["rope_type"] != "longrope":  # one cast of theirs is a method
            with mock.patch.object(utils, "torch", exact):
                wanted, _ = their_table(said, theta, width, fraction, length)
            torch.testing.assert_close(got, wanted, rtol=1e-12, atol=0.0)
        seen.add(said["rope_type"])
    assert seen == {"linear", "dynamic", "yarn", "llama3", "longrope"}


@pytest.mark.parametrize("factor", [1.5, 8.0])
def test_ntk_is_another_base_and_dynamic_at_one_length(factor: float) -> None:
    ntk = RopeScalingConfig(rope_type="ntk", factor=factor)
    got = frequencies(64, 1e4, ntk, length=1, device=CPU)
    other = frequencies(64, 1e4 * factor ** (64 / 62), None, length=1, device=CPU)
    dynamic = RopeScalingConfig(rope_type="dynamic", factor=1.0, original_max_position_embeddings=100)
    for wanted in (other, frequencies(64, 1e4, dynamic, length=int(100 * factor), device=CPU)):
        torch.testing.assert_close(got, wanted, rtol=1e-13, atol=0)
    plain = frequencies(64, 1e4, None, length=1, device=CPU)
    torch.testing.assert_close(plain[[0, -1]] / got[[0, -1]], torch.tensor([1, factor]).double())


# Of heads of 8 channels, 4 pairs.
KINDS: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "ntk": {"rope_type": "ntk", "factor": 5.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 16},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    "llama3": {
        **{"rope_type": "llama3", "factor": 4.0, "original_max_position_embeddings": 64},
        **{"low_freq_factor": 1.0, "high_freq_factor": 4.0},
    },
    "longrope": longrope(4, original_max_position_embeddings=16),
}


def scaled(kind: str, mixer: str = "sisa", **changes: Any) -> Any:
    return model_of(mixer, rope_scaling=RopeScalingConfig(**KINDS[kind]), **changes)


def tokens_of(*shape: int) -> Tensor:
    return torch.randint(0, 61, shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("kind", KINDS)
def test_tables_are_the_angles_times_the_temperature(kind: str) -> None:
    scaling = RopeScalingConfig(**KINDS[kind])
    cos, sin = rope_tables(5, 40, channels=8, theta=1e4, device=CPU, scaling=scaling)
    assert cos.dtype == sin.dtype == torch.float32 and cos.shape == sin.shape == (40, 4)
    angle = torch.arange(5, 45)[:, None] * frequencies(8, 1e4, scaling, length=45, device=CPU)
    size = {"yarn": 1.1386294361119891, "longrope": 1.3228756555322954}.get(kind, 1.0)
    torch.testing.assert_close(cos, (angle.cos() * size).float(), rtol=0, atol=1e-7)
    torch.testing.assert_close(sin, (angle.sin() * size).float(), rtol=0, atol=1e-7)


@pytest.mark.parametrize("mixer", ["sisa", "attention", "falcon_h1", "hymba", "sigmoid_sisa"])
def test_every_mixer_with_rope_sees_it(mixer: str) -> None:
    tokens = tokens_of(1, 40)
    found = [model_of(mixer)(tokens), *(scaled(kind, mixer)(tokens) for kind in KINDS)]
    for a, b in itertools.combinations(found, 2):
        assert (a - b).abs().max() > 1e-6


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mixer", ["sisa", "attention"])
def test_packed_documents_are_what_they_are_alone_with_gradients(kind: str, mixer: str) -> None:
    """Documents of 9, 30 and 1 tokens: of the kinds that go by length, the second alone is beyond the original 16."""
    model, tokens = scaled(kind, mixer), tokens_of(1, 40)
    ids = torch.tensor([0] * 9 + [1] * 30 + [2])[None]
    logits, embedded = logits_and_embedding(model, tokens, ids)
    direction = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1), dtype=logits.dtype)
    (gradient,) = torch.autograd.grad((logits * direction).sum(), embedded)
    start = 0
    for length in (9, 30, 1):
        part = slice(start, start + length)
        alone, embedded = logits_and_embedding(model, tokens[:, part])
        torch.testing.assert_close(logits[:, part], alone, rtol=1e-11, atol=1e-12)
        (wanted,) = torch.autograd.grad((alone * direction[:, part]).sum(), embedded)
        torch.testing.assert_close(gradient[:, part], wanted, rtol=1e-10, atol=1e-11)
        start += length


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_decoding_in_any_chunks_is_the_full_run(kind: str, packed: bool) -> None:
    """Kinds that go by length are told how long it will be; the original length is passed on the way."""
    model, tokens = scaled(kind), tokens_of(2, 30)
    ids = torch.tensor([[0] * 4 + [1] * 26, [0] * 12 + [1] * 18]) if packed else None
    first = 13 if packed else 1  # how long a document is that ends must be known
    with torch.no_grad():
        full = model(tokens, doc_ids_BT=ids)
        for chunks in ([first] + [1] * (30 - first), [first, 30 - first - 5, 5]):
            cache, parts, start = model.new_cache(), [], 0
            for part in tokens.split(chunks, 1):
                some = None if ids is None else ids[:, start : start + part.shape[1]]
                parts.append(model(part, cache=cache, doc_ids_BT=some, total_length=30))
                start += part.shape[1]
            assert (torch.cat(parts, 1) - full).abs().max() < 1e-9 * full.abs().max()


def test_generation_turns_all_tokens_for_its_final_length() -> None:
    model, prompt = scaled("dynamic"), tokens_of(2, 12)
    made = torch.stack(list(generate(model, prompt, max_new_tokens=20)), 1)
    with torch.no_grad():
        logits = model(torch.cat((prompt, made), 1))
        other = model(torch.cat((prompt, made), 1)[:, :14])
    assert torch.equal(logits[:, 11:-1].argmax(-1), made)
    assert (other - logits[:, :14]).abs().max() > 1e-3  # within the original length nothing is stretched


@pytest.mark.parametrize("kind", ["yarn", "longrope"])
def test_tables_are_fp32_in_a_model_cast_to_bf16(kind: str) -> None:
    """The engines' cast of parameters and buffers: there is no buffer to reach."""
    model = build_model(config_of("sisa", rope_scaling=RopeScalingConfig(**KINDS[kind])), attention=AttentionConfig())
    compute_in(model, torch.bfloat16)
    seen: list[Any] = []
    model.blocks[1].register_forward_pre_hook(lambda module, inputs: seen.append(inputs))
    model(tokens_of(1, 40), tokens_of(1, 40))
    h, (cos, sin), *_ = seen[0]
    assert h.dtype == torch.bfloat16 and cos.dtype == sin.dtype == torch.float32
    wanted = rope_tables(0, 40, channels=8, theta=1e4, device=CPU, scaling=model.config.rope_scaling)
    assert torch.equal(cos, wanted.cos_TP) and torch.equal(sin, wanted.sin_TP)
