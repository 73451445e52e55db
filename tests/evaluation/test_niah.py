"""Needle in a haystack: the prompts are the paper's, the answer is in them, and the score is what a reader finds."""

from __future__ import annotations

import pytest
from evaluation_fakes import FakeScorer, WordTokenizer, hashed, induction, on_ranks

from data_pipeline.tokenizer import Tokenizer
from sisa_dist.config import UserError
from sisa_dist.evaluation.niah import FILLER, NEEDLES, make_item, niah


def test_a_prompt_by_hand(words: WordTokenizer) -> None:
    """Checked against the paper's recipe: filler[:p] + "key value." + filler[:rest] + " key", 10 tokens to spare."""
    filler = words.encode(FILLER * 20)
    for number in range(20):
        item = make_item(words, number, context=100, seed=3)  # type: ignore[arg-type]
        tokens, labels = item.example.tokens, item.example.labels
        assert len(tokens) == len(labels) == 90 and labels[:-1] == [-100] * 89
        answer = words.decode([labels[-1]])
        (key,) = [key for key, value in NEEDLES if answer == f" {value}"]
        query = words.encode(f" {key}")
        needle = words.encode(f"{key}{answer}.")
        room = 90 - len(query) - len(needle)
        before = round(item.depth * room)
        assert 5 <= before <= room // 2
        assert tokens == filler[:before] + needle + filler[: room - before] + query


def test_items_depend_on_seed_and_number_alone(words: WordTokenizer) -> None:
    def made(seed: int, numbers: range) -> list[object]:
        return [make_item(words, i, context=80, seed=seed) for i in numbers]  # type: ignore[arg-type]

    assert made(1, range(8)) == made(1, range(16))[:8]
    assert made(1, range(8)) != made(2, range(8))
    assert made(2**64 - 1, range(8)) != made(2**64 - 2, range(8))  # one number as floats
    found = made(1, range(64))
    assert len({item.example.labels[-1] for item in found}) == 5  # type: ignore[attr-defined]


@pytest.mark.parametrize("context", [64, 512, 700])
def test_a_reader_finds_every_needle(pieces: Tokenizer, context: int) -> None:
    """A model that copies what followed the query's last occurrence scores 100 %: the answer stands in the prompt."""
    result = niah(FakeScorer(induction), pieces, items=12, context=context, batch_size=5, quiet=True)
    assert result["accuracy"] == 1.0
    assert (result["items"], result["context"], result["prompt_tokens"]) == (12, context, context - 10)
    assert result["distinct_answers"] == 5
    assert sum(result["items_by_depth"]) == 12 and result["items_by_depth"][3:] == [0, 0]
    assert result["accuracy_by_depth"][3:] == [None, None]


def test_a_model_that_reads_the_end_alone_finds_none(words: WordTokenizer) -> None:
    seen_late = lambda prefix: induction(prefix[-4:])  # noqa: E731
    result = niah(FakeScorer(seen_late), words, items=12, context=64, batch_size=5, quiet=True)  # type: ignore[arg-type]
    assert result["accuracy"] == 0.0


def test_uniform_placement_reaches_every_depth(words: WordTokenizer) -> None:
    def run(predict) -> dict:
        return niah(
            FakeScorer(predict),
            words,  # type: ignore[arg-type]
            items=60,
            context=120,
            batch_size=8,
            placement="uniform",
            quiet=True,
        )

    assert min(run(induction)["items_by_depth"]) >= 4
    # Sees the last 50 of 110 tokens: finds late needles, not early ones.
    by_depth = run(lambda prefix: induction(prefix[-50:]))["accuracy_by_depth"]
    assert by_depth[0] == by_depth[1] == 0.0 and by_depth[3] == by_depth[4] == 1.0


def test_a_tokenizer_that_opens_all_values_alike_is_reported() -> None:
    class Letters:
        """One id a character: every value begins with the id of the space."""

        eos_id, vocab_size = 0, 256

        def encode(self, text: str) -> list[int]:
            return [ord(c) for c in text]

    always_a_space = lambda prefix: (ord(" "), {})  # noqa: E731
    result = niah(FakeScorer(always_a_space), Letters(), items=5, context=300, batch_size=2, quiet=True)  # type: ignore[arg-type]
    assert (result["accuracy"], result["distinct_answers"]) == (1.0, 1)


@pytest.mark.parametrize("dp_size", [2, 3])
def test_the_same_on_any_number_of_ranks(words: WordTokenizer, dp_size: int) -> None:
    for needle in NEEDLES:  # so that ids do not depend on which rank encodes first
        words.encode(f"{FILLER}{needle[0]} {needle[1]}. {needle[0]} {needle[1]}")

    def run(scorer: FakeScorer) -> dict:
        return niah(scorer, words, items=17, context=60, batch_size=2, seed=5, quiet=True)  # type: ignore[arg-type]

    def sometimes(prefix: list[int]) -> tuple[int, dict[int, float]]:
        return induction(prefix) if hashed(prefix)[0] > 1 else (0, {})

    alone = run(FakeScorer(sometimes))
    assert 0 < alone["accuracy"] < 1
    results, scorers = on_ranks(dp_size, sometimes, run)
    assert results == [alone] * dp_size
    assert {len(scorer.shapes) for scorer in scorers} == {-(-17 // (2 * dp_size))}


def test_a_context_too_short_names_the_least_that_does(words: WordTokenizer) -> None:
    with pytest.raises(UserError, match="set at least") as caught:
        make_item(words, 0, context=20, seed=0)  # type: ignore[arg-type]
    least = int(str(caught.value).rsplit(" ", 1)[1])
    make_item(words, 0, context=least, seed=0)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=f"set at least {least}"):
        make_item(words, 0, context=least - 1, seed=0)  # type: ignore[arg-type]
