"""What every mixer owes, rivals and ours alike: causality, documents apart, decoding, strong and weak decay, counts."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from mixer_cases import BASE, RIVALS
from sisa_dist.config import AttentionConfig, ModelConfig
from sisa_dist.model import LM, build_model
from sisa_dist.model.meta import at_tokens, with_meta_tokens
from sisa_dist.model.mixers import MIXERS
from sisa_dist.model.mixers.hymba import keys_per_query
from sisa_dist.model.rope import rope_tables

CASES: dict[str, dict[str, Any]] = {"sisa": {"mixer": "sisa", "d_s": 8}, "attention": {"mixer": "attention"}, **RIVALS}

# Biases that set how fast a mixer forgets, by the end of their names: the values for almost never and for at once.
DECAY_BIASES = {"decay.bias": (-9.0, 3.0), "forget.bias": (9.0, -6.0), "rates.dt_bias": (-9.0, 3.0)}
STRENGTHS = ("weak", "initial", "strong")
LENGTHS = (1, 13, 8, 15)  # of documents, 37 tokens in all: no multiple of a leaf or chunk
LEAF = 8  # several levels of the bisection within them

every_mixer = pytest.mark.parametrize("name", CASES)
every_strength = pytest.mark.parametrize("strength", STRENGTHS)


def config_of(name: str, **changes: Any) -> ModelConfig:
    return ModelConfig(**(BASE | CASES[name] | changes))


def model_of(name: str, strength: str = "initial", *, dtype: torch.dtype = torch.float64, **changes: Any) -> LM:
    model = build_model(config_of(name, **changes), attention=AttentionConfig(leaf=LEAF)).to(dtype)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if parameter.ndim < 2:  # gains, biases and scalars of a new model are all alike, which hides mistakes
                parameter += 0.2 * torch.randn(parameter.shape, generator=generator, dtype=dtype)
            for end, (weak, strong) in DECAY_BIASES.items():
                if path.endswith(end) and strength != "initial":
                    parameter.fill_(weak if strength == "weak" else strong)
    return model


def tokens_of(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(0, BASE["vocab_size"], shape, generator=torch.Generator().manual_seed(seed))


def packed(*, rows: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    """tokens, labels and doc_ids [rows, Σ LENGTHS]; the second row's documents come in the opposite order."""
    lengths = [LENGTHS, LENGTHS[::-1]][:rows]
    ids = torch.stack([torch.repeat_interleave(torch.arange(len(row)), torch.tensor(row)) for row in lengths])
    return tokens_of(rows, sum(LENGTHS)), tokens_of(rows, sum(LENGTHS), seed=1), ids


def logits_and_embedding(model: LM, tokens: Tensor, doc_ids: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Logits, and the embedded tokens as a leaf of their graph; of meta tokens nothing."""
    seen: list[Tensor] = []
    count, first = model.config.meta_tokens, model.config.vocab_size
    prefixed = with_meta_tokens(tokens, doc_ids, count=count, first_id=first) if count else None

    def keep(module: Any, arguments: Any, output: Tensor) -> Tensor:
        output = output.detach()
        seen.append((output if prefixed is None else at_tokens(output, prefixed)).requires_grad_())
        if prefixed is None:
            return seen[0]
        return output.scatter(1, prefixed.places[..., None].expand_as(seen[0]), seen[0])

    handle = model.embed.register_forward_hook(keep)
    logits = model(tokens, doc_ids_BT=doc_ids)
    handle.remove()
    return logits, seen[0]


@every_mixer
@every_strength
def test_no_token_reaches_an_earlier_one(name: str, strength: str) -> None:
    model, tokens, t = model_of(name, strength), tokens_of(2, 37), 22
    logits, embedded = logits_and_embedding(model, tokens)
    (gradient,) = torch.autograd.grad(logits[:, : t + 1].square().sum(), embedded)
    assert gradient[:, : t + 1].abs().amax(-1).gt(0).all()
    assert not gradient[:, t + 1 :].any()
    other = tokens.clone()
    other[:, t + 1 :] = tokens_of(2, 37, seed=2)[:, t + 1 :]
    again = model(other)
    assert torch.equal(again[:, : t + 1], logits[:, : t + 1]) and not torch.equal(again[:, -1], logits[:, -1])


@every_mixer
@every_strength
def test_documents_packed_are_documents_apart_with_gradients(name: str, strength: str) -> None:
    # Without rotary embedding, which counts on through the documents, in fp32: relative positions only to 1e-6.
    model = model_of(name, strength, rotary_fraction=0.0)
    tokens, labels, doc_ids = packed()
    together, _ = model(tokens, labels, doc_ids_BT=doc_ids)
    wanted_of = {n: g for n, g in zip(dict(model.named_parameters()), gradients(model, together), strict=True)}
    apart = sum(
        model(tokens[row : row + 1, start:stop], labels[row : row + 1, start:stop])[0]
        for row in range(2)
        for start, stop in spans(doc_ids[row])
    )
    assert torch.allclose(together, apart, rtol=1e-12, atol=0)
    for path, gradient in zip(wanted_of, gradients(model, apart), strict=True):
        size = gradient.abs().max().clamp(min=1e-3)
        assert ((wanted_of[path] - gradient).abs().max() / size) < 1e-9, path


@every_mixer
def test_documents_do_not_touch_each_other_at_all(name: str) -> None:
    model = model_of(name)
    tokens, _, doc_ids = packed()
    logits, embedded = logits_and_embedding(model, tokens, doc_ids)
    for document in range(len(LENGTHS)):
        inside = doc_ids == document
        (gradient,) = torch.autograd.grad(logits[inside].square().sum(), embedded, retain_graph=True)
        assert not gradient[~inside].any() and gradient[inside].any(-1).all()
    other = torch.where(doc_ids == 1, tokens, tokens_of(*tokens.shape, seed=3))
    inside = doc_ids == 1
    assert torch.equal(model(other, doc_ids_BT=doc_ids)[inside], logits[inside])


@every_mixer
@every_strength
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
def test_decoding_in_any_chunks_is_the_full_run(name: str, strength: str, dtype: torch.dtype, tolerance: float) -> None:
    model, tokens = model_of(name, strength, dtype=dtype), tokens_of(2, 37)
    with torch.no_grad():
        full = model(tokens)
        for chunks in ([1] * 37, [11, 1, 17, 2, 6], [37]):
            cache = model.new_cache()
            parts = [model(part, cache=cache) for part in tokens.split(chunks, dim=1)]
            assert all(layer.length == 37 + model.config.meta_tokens for layer in cache)
            assert (torch.cat(parts, 1) - full).abs().max() < tolerance * full.abs().max()


@every_mixer
@pytest.mark.parametrize("length", [1, 2, 7, 9, 40])
def test_a_prefix_gives_what_the_whole_gives(name: str, length: int) -> None:
    model, tokens = model_of(name, "strong"), tokens_of(1, 40)
    with torch.no_grad():
        assert torch.allclose(model(tokens[:, :length]), model(tokens)[:, :length], atol=1e-11)


@every_mixer
def test_fp32_is_near_fp64(name: str) -> None:
    tokens, labels, doc_ids = packed()
    found = {}
    for dtype in (torch.float32, torch.float64):
        model = model_of(name, "strong", dtype=torch.float64).to(dtype)
        loss, _ = model(tokens, labels, doc_ids_BT=doc_ids)
        found[dtype] = dict(zip(dict(model.named_parameters()), gradients(model, loss), strict=True))
    for path, wanted in found[torch.float64].items():
        size = wanted.abs().max().clamp(min=5e-2)  # of a loss summed over 74 tokens
        assert (found[torch.float32][path].double() - wanted).abs().max() < 2e-4 * size, path


@every_mixer
def test_multiply_adds_are_what_torch_counts(name: str) -> None:
    config, T = config_of(name), 33
    model = build_model(config)
    x, rope = torch.randn(1, T, config.d_model), rope_tables(0, T, channels=8, theta=1e4, device=torch.device("cpu"))
    # torch counts none in CPU flash attention: scores and values of (T + 1) / 2 keys a query.
    uncounted = config.n_heads * 2 * config.width_per_head * (T + 1) / 2
    for layer, block in enumerate(model.blocks):
        with FlopCounterMode(display=False) as counter:
            block.mixer(x, rope)
        counted = MIXERS[config.layer_mixers[layer]].multiply_adds(config, layer, T)
        if config.layer_mixers[layer] in ("attention", "falcon_h1"):
            counted -= uncounted
        if config.layer_mixers[layer] == "hymba":
            keys = keys_per_query(T, config.window_of(layer), config.meta_tokens)
            counted -= config.n_heads * (config.width_per_head + config.ssm_width // config.n_heads) * keys
        assert counter.get_total_flops() / (2 * T) == pytest.approx(counted, rel=1e-9)


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


def spans(doc_ids_T: Tensor) -> list[tuple[int, int]]:
    """First and behind-the-last index of each document."""
    ends = doc_ids_T.unique_consecutive(return_counts=True)[1].cumsum(0).tolist()
    return list(itertools.pairwise([0, *ends]))
