"""Decoding until a stop string: what ends a text, what the options mean, and that batches hold equal lengths."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from evaluation_fakes import WordTokenizer
from torch import Tensor

from sisa_dist.config import UserError
from sisa_dist.evaluation import until
from sisa_dist.evaluation.until import Decoding, generate_texts

MODEL: Any = SimpleNamespace(embed=SimpleNamespace(weight=torch.zeros(1)))


@pytest.fixture
def tokenizer() -> WordTokenizer:
    made = WordTokenizer()
    made.encode("zero one two three four five six seven\n")
    return made


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch, tokenizer: WordTokenizer) -> list[dict[str, Any]]:
    """Each row continues with the ids after its prompt's last, round and round; what was asked is kept."""
    made: list[dict[str, Any]] = []

    def count_on(model: Any, prompt_BT: Tensor, *, max_new_tokens: int, **options: Any) -> Iterator[Tensor]:
        made.append({"shape": tuple(prompt_BT.shape), "steps": 0, **options})
        for step in range(1, max_new_tokens + 1):
            made[-1]["steps"] = step
            yield (prompt_BT[:, -1] + step) % tokenizer.vocab_size

    monkeypatch.setattr(until, "generate", count_on)
    return made


def texts(tokenizer: Any, prompts: list[str], decoding: Decoding, batch_size: int = 8) -> list[str]:
    ids = [tokenizer.encode(prompt) for prompt in prompts]
    found = dict(generate_texts(MODEL, tokenizer, ids, decoding, batch_size=batch_size))
    assert len(found) == len(prompts)
    return [found[i] for i in range(len(prompts))]


def test_a_text_ends_before_its_stop_string_and_the_batch_when_all_have(
    calls: list[dict[str, Any]], tokenizer: WordTokenizer
) -> None:
    made = texts(tokenizer, ["zero", " two"], Decoding(until=(" four",), max_tokens=7))
    assert made == [" one two three", " three"]
    assert calls == [{"shape": (2, 1), "steps": 4, "temperature": 0.0, "top_p": 1.0, "seed": 0}]
    assert texts(tokenizer, ["zero"], Decoding(until=("x", "three f"), max_tokens=7)) == [" one two "]
    # Both end in one step; the first of the list cuts first, and of the second nothing is then left.
    assert texts(tokenizer, ["zero"], Decoding(until=("o t", "one"), max_tokens=7)) == [" "]
    assert texts(tokenizer, ["zero"], Decoding(until=(" t", "one t"), max_tokens=7)) == [" one"]


def test_a_text_ends_with_its_document_or_after_all_its_tokens(
    calls: list[dict[str, Any]], tokenizer: WordTokenizer
) -> None:
    assert texts(tokenizer, [" five", "zero"], Decoding(until=(), max_tokens=4)) == [
        " six seven\n",
        " one two three four",
    ]
    assert calls[-1]["steps"] == 4
    assert texts(tokenizer, [" six"], Decoding(until=(), max_tokens=9)) == [" seven\n"]
    assert calls[-1]["steps"] == 3  # the eos ends it


def test_an_id_without_text_is_left_out(calls: list[dict[str, Any]], tokenizer: WordTokenizer) -> None:
    short = SimpleNamespace(eos_id=0, vocab_size=3, encode=tokenizer.encode, decode=tokenizer.decode)
    assert texts(short, ["zero"], Decoding(until=(), max_tokens=4)) == [" one"]


def test_only_equal_lengths_share_a_batch(calls: list[dict[str, Any]], tokenizer: WordTokenizer) -> None:
    prompts = ["zero", " one two", " three", " two two", " two", "zero zero one", " four"]
    made = texts(tokenizer, prompts, Decoding(until=(), max_tokens=1), batch_size=3)
    assert made == [" one", " three", " four", " three", " three", " two", " five"]
    assert [call["shape"] for call in calls] == [(1, 3), (2, 2), (3, 1), (1, 1)]


def test_sampled_batches_draw_different_seeds_that_follow_torchs(
    calls: list[dict[str, Any]], tokenizer: WordTokenizer
) -> None:
    decoding = Decoding(until=(), max_tokens=1, temperature=0.5, top_p=0.9)
    for _ in range(2):
        torch.manual_seed(5)
        texts(tokenizer, ["zero", " one"], decoding, batch_size=1)
    first, second, *again = calls
    assert first["temperature"] == 0.5 and first["top_p"] == 0.9
    assert first["seed"] != second["seed"] and again == [first, second]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, Decoding((), 9)),
        ({"until": "\n", "max_gen_toks": 3}, Decoding(("\n",), 3)),
        ({"until": ["a", "", "b"], "max_new_tokens": 4, "num_beams": 1}, Decoding(("a", "b"), 4)),
        ({"max_gen_toks": 3, "max_tokens": 8}, Decoding((), 3)),
        ({"do_sample": False, "temperature": 1, "top_p": 0.5}, Decoding((), 9, 0.0, 0.5)),
        ({"temperature": 0.3}, Decoding((), 9, 0.3)),
        ({"do_sample": True}, Decoding((), 9, 1.0)),
        ({"do_sample": True, "temperature": 0.2, "top_p": 0.95}, Decoding((), 9, 0.2, 0.95)),
        ({"do_sample": True, "temperature": 0.0, "top_k": None}, Decoding((), 9)),
    ],
)
def test_the_harness_options(options: dict[str, Any], expected: Decoding) -> None:
    asked = dict(options)
    assert Decoding.read(options, max_tokens=9) == expected
    assert options == asked


@pytest.mark.parametrize("option", [{"num_beams": 4}, {"top_k": 40}, {"typical_p": 0.5}])
def test_an_option_that_would_be_ignored_is_refused(option: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=next(iter(option))):
        Decoding.read({"until": ["\n"], **option}, max_tokens=9)
