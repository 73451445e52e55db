"""Packing documents is running them apart, through the whole model: mixers, score paths, options, and decoding."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, get_args

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from distributed.grid import STYLES
from mixer_cases import (
    CASES,
    LEAF,
    Strength,
    config_of,
    every_mixer,
    every_mixer_and_decay,
    forgets,
    logits_and_embedding,
    model_of,
)
from sisa_dist.config import AttentionConfig, UserError
from sisa_dist.model import LM, generate

EOS = 2
# Lengths of the documents of each row: 1, 2, odd, a leaf, a token less, a token more, several leaves, an eos alone and,
# last, padding. The second row has its long documents across every edge of a span.
ROWS_OF_DOCUMENTS = ([1, 2, 7, 8, 9, 1, 33, 5, 4], [16, 1, 40, 3, 2, 1, 1, 6])
T = sum(ROWS_OF_DOCUMENTS[0])

# Of sisa and attention; the rivals have theirs in their cases.
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "gqa": {"n_kv_heads": 2},
    "qk_norm": {"qk_norm": True, "n_kv_heads": 1, "tie_embeddings": False},
    "neox": STYLES["neox"],
}
PATHS = get_args(AttentionConfig.model_fields["path"].annotation)
NAMES = [(name, option) for name in CASES for option in (OPTIONS if name in ("sisa", "attention") else ("plain",))]
# attention.path chooses how sisa's score is computed, whatever its options.
GRID = [(name, path, option) for name, option in NAMES for path in (PATHS if name == "sisa" else ("auto",))]
# Slow where it is packed: each option is seen under `auto`, each path of the plain one.
CROSSED = [(name, path, option) for name, path, option in GRID if path != "auto" and option != "plain"]


def test_the_grid_is_what_it_says() -> None:
    assert set(PATHS) == {"auto", "single", "bisected", "dense"}
    assert len(GRID) == 4 * 5 + len(CASES) - 2
    assert sum(ROWS_OF_DOCUMENTS[1]) == T
    lengths = set().union(*ROWS_OF_DOCUMENTS)
    assert {1, 2, LEAF - 1, LEAF, LEAF + 1} < lengths and max(lengths) > 4 * LEAF


@pytest.fixture(autouse=True)
def several_levels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mixers that take no leaf from the config get as small a one."""
    monkeypatch.setattr("sisa_dist.ops.bisect.LEAF", LEAF)


def decays(name: str, path: str = "auto") -> tuple[Strength, ...]:
    """The one reference of `single` cannot hold a strong decay."""
    return ("weak", "initial", "strong") if forgets(name) and path != "single" else ("initial",)


def packed() -> tuple[Tensor, Tensor, Tensor, list[tuple[int, slice]]]:
    """tokens, labels, doc_ids [2, T] as the loader makes them, and (row, place) of every document."""
    gen = torch.Generator().manual_seed(0)
    tokens = torch.randint(3, 61, (2, T), generator=gen)
    labels = tokens.roll(-1, 1)
    doc_ids = torch.empty(2, T, dtype=torch.int64)
    places = []
    for row, lengths in enumerate(ROWS_OF_DOCUMENTS):
        edges = [0, *torch.tensor(lengths).cumsum(0).tolist()]
        for number, (start, stop) in enumerate(pairwise(edges)):
            doc_ids[row, start:stop] = 3 * number  # they need not be consecutive
            tokens[row, stop - 1], labels[row, stop - 1] = EOS, -100
            places.append((row, slice(start, stop)))
    tokens[0, -4:], labels[0, -5:] = EOS, -100  # padding
    return tokens, labels, doc_ids, places


def assert_close(name: str, got: Tensor, want: Tensor, tolerance: float, scale: float | None = None) -> None:
    scale = max(want.abs().max().item(), 0.1) if scale is None else scale
    error = (got - want).abs().max().item() / scale
    assert error <= tolerance, f"{name}: {error:.1e}"


def assert_gradients_close(model: LM, got: Sequence[Tensor], want: Sequence[Tensor], tolerance: float) -> None:
    """A bias's gradient is a sum, which cancels, of the very terms its module's weight sums: they share a scale."""
    names = [name for name, _ in model.named_parameters()]
    scales: dict[str, float] = {}
    for name, gradient in zip(names, want, strict=True):
        owner = name.rpartition(".")[0]
        assert gradient.abs().max() > 0, name
        scales[owner] = max(scales.get(owner, 0.0), gradient.abs().max().item())
    for name, a, b in zip(names, got, want, strict=True):
        assert_close(name, a, b, tolerance, scales[name.rpartition(".")[0]])


def _slow(*values: object) -> list[Any]:
    return [pytest.param(value, marks=pytest.mark.slow) for value in values]


# Under strong decay, and of W_θ under SSMax, gradients cancel: up to 1.4e-13 of their scale in fp64.
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), pytest.param(torch.float32, 1e-5, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize(
    ("name", "path", "option"),
    [pytest.param(*case, marks=pytest.mark.slow) if case in CROSSED else case for case in GRID],
)
def test_packed_is_apart(name: str, path: str, option: str, dtype: torch.dtype, tolerance: float) -> None:
    tokens, labels, doc_ids, places = packed()
    for strength in decays(name, path):
        if strength == "strong" and dtype == torch.float32:
            strength = "medium"  # a strong one leaves so little of its own gradient that even apart it is rounding
        model = model_of(name, strength, path=path, dtype=dtype, **OPTIONS[option])
        parameters = list(model.parameters())
        logits = model(tokens, doc_ids_BT=doc_ids)
        loss, count = model(tokens, labels, doc_ids_BT=doc_ids)
        gradients = torch.autograd.grad(loss, parameters)
        losses = []
        for row, place in places:
            own = slice(row, row + 1), place
            alone = model(tokens[own])
            assert_close(f"logits of {own}", logits[own], alone, tolerance)
            losses.append(cross_entropy(alone.flatten(0, 1), labels[own].flatten(), reduction="sum"))
        apart = torch.stack(losses).sum()
        assert int(count) == int((labels != -100).sum()) and loss > 100
        assert_close("loss", loss, apart, tolerance)
        assert_gradients_close(model, gradients, torch.autograd.grad(apart, parameters), tolerance)


@pytest.mark.parametrize("shift", [-1, 1])
@every_mixer
def test_a_boundary_shifted_by_one_is_seen(name: str, shift: int) -> None:
    tokens, _, doc_ids, places = packed()
    model = model_of(name)
    row, place = next((row, place) for row, place in places if place.stop - place.start > 2 * LEAF)
    doc_ids[row] = doc_ids[row].roll(shift)
    got = model(tokens, doc_ids_BT=doc_ids)[row, place]
    with pytest.raises(AssertionError):
        assert_close("logits", got, model(tokens[row : row + 1, place])[0], 1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, *_slow(torch.float32, torch.bfloat16)])
@pytest.mark.parametrize(("name", "path", "option"), [case for case in GRID if case[2] in ("plain", "gqa")])
def test_no_document_gives_another_a_gradient(name: str, path: str, option: str, dtype: torch.dtype) -> None:
    """d(logits of document i) / d(embedding of document j): exactly 0, and not 0 for j = i."""
    tokens, _, doc_ids, places = packed()
    model = model_of(name, decays(name, path)[-1], path=path, dtype=dtype, **OPTIONS[option])
    logits, embedded = logits_and_embedding(model, tokens, doc_ids)
    for row, place in places:
        (gradient,) = torch.autograd.grad(logits[row, place].square().sum(), embedded, retain_graph=True)
        inside = gradient[row, place]
        assert (inside.abs().sum(-1) > 0).all(), (row, place)
        assert gradient.count_nonzero() == inside.count_nonzero(), (row, place)


@pytest.mark.parametrize("dtype", [torch.float32, *_slow(torch.float64, torch.bfloat16)])
@pytest.mark.parametrize(("name", "path", "option"), [case for case in GRID if case[2] in ("plain", "gqa")])
def test_another_documents_tokens_move_no_bit(name: str, path: str, option: str, dtype: torch.dtype) -> None:
    """The dense oracle's running sums are rounded, and g is of the whole sequence: in its case up to that."""
    tokens, _, doc_ids, places = packed()
    model = model_of(name, decays(name, path)[-1], path=path, dtype=dtype, **OPTIONS[option])
    before = model(tokens, doc_ids_BT=doc_ids)
    for row, place in places:
        changed = tokens.roll(1, 0).roll(7, 1)
        changed[row, place] = tokens[row, place]
        after = model(changed, doc_ids_BT=doc_ids)[row, place]
        if path != "dense":
            assert torch.equal(after, before[row, place]), (row, place)
        elif dtype != torch.bfloat16:
            assert_close("logits", after, before[row, place], 1e-12 if dtype == torch.float64 else 1e-5)


@pytest.mark.parametrize(
    "sizes",
    [[T], *_slow([20, T - 20]), [9, 1, 1, 12, *[1] * (T - 23)]],
    ids=["once", "two", "tokens"],
)
@pytest.mark.parametrize(("name", "option"), NAMES)
def test_a_cache_keeps_packed_documents_apart(name: str, option: str, sizes: list[int]) -> None:
    tokens, _, doc_ids, places = packed()
    changes = OPTIONS[option]
    if len(sizes) > 1 and config_of(name).meta_tokens:  # behind the first chunk no document may begin
        changes = {"hymba": CASES[name]["hymba"] | {"meta_tokens": 0}}
    model = model_of(name, decays(name)[-1], **changes)
    cache, parts = model.new_cache(), []
    with torch.no_grad():
        for chunk, ids in zip(tokens.split(sizes, 1), doc_ids.split(sizes, 1), strict=True):
            parts.append(model(chunk, doc_ids_BT=ids, cache=cache))
        logits = torch.cat(parts, 1)
        for row, place in places:
            own = slice(row, row + 1), place
            assert_close(f"logits of {own}", logits[own], model(tokens[own]), 1e-12)


@every_mixer_and_decay
def test_a_prompt_behind_another_document_goes_on_as_if_alone(name: str, strength: Strength) -> None:
    """Two prompts of different lengths in one batch, the shorter filled up on the left by a document of its own."""
    model = model_of(name, strength)
    prompts = [torch.randint(3, 61, (1, n), generator=torch.Generator().manual_seed(n)) for n in (23, 9)]
    alone = [torch.stack(list(generate(model, p, max_new_tokens=12)), 1) for p in prompts]
    filled = torch.cat((prompts[0], torch.cat((torch.full((1, 14), EOS), prompts[1]), 1)))
    doc_ids = torch.cat((torch.ones(1, 23), torch.arange(23)[None] >= 14)).long()
    cache, made, ids = model.new_cache(), [], doc_ids
    with torch.no_grad():
        for _ in range(12):
            filled = model(filled, doc_ids_BT=ids, cache=cache, last_only=True)[:, -1:].argmax(-1)
            made.append(filled)
            ids = torch.ones(2, 1, dtype=torch.int64)
    assert torch.equal(torch.cat(made, 1), torch.cat(alone))


@every_mixer
def test_a_cache_refuses_chunks_with_and_without_documents(name: str) -> None:
    tokens, _, doc_ids, _ = packed()
    model = model_of(name)
    for first, second in ((doc_ids, None), (None, doc_ids)):
        cache = model.new_cache()
        model(tokens[:, :9], doc_ids_BT=None if first is None else first[:, :9], cache=cache)
        with pytest.raises(UserError, match="doc_ids go with every chunk or with none"):
            model(tokens[:, 9:], doc_ids_BT=None if second is None else second[:, 9:], cache=cache)
