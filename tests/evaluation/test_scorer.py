"""Dealing examples to ranks: equal calls, nothing lost, padding without influence; and where a continuation begins."""

from __future__ import annotations

import threading

import pytest
from evaluation_fakes import FakeScorer, WordTokenizer, hashed, on_ranks

from data_pipeline.tokenizer import Tokenizer
from sisa_dist.evaluation import scorer as scorer_module
from sisa_dist.evaluation.scorer import IGNORE, Example, Scorer, encode_continuation, progress, score_examples


def examples(count: int) -> list[Example]:
    """Lengths 1 to 7 in no order, a different last label each."""
    made = []
    for i in range(count):
        tokens = [(i * 5 + t) % 11 for t in range(1 + i * 3 % 7)]
        made.append(Example(tokens, [IGNORE] * (len(tokens) - 1) + [i % 5]))
    return made


def answers(scorer: Scorer, count: int, batch_size: int) -> dict[int, tuple[list[float], list[bool]]]:
    found = score_examples(scorer, examples(count), batch_size=batch_size, what="test", quiet=True)
    return {i: (log_prob_T.tolist(), is_argmax_T.tolist()) for i, log_prob_T, is_argmax_T in found}


@pytest.mark.parametrize("count", [1, 2, 5, 12, 13])
@pytest.mark.parametrize("dp_size", [1, 2, 3])
def test_every_rank_calls_equally_often_and_nothing_is_lost(count: int, dp_size: int) -> None:
    alone = answers(FakeScorer(hashed), count, 1)
    assert sorted(alone) == list(range(count))
    results, scorers = on_ranks(dp_size, hashed, lambda scorer: answers(scorer, count, 2))
    calls = {len(scorer.shapes) for scorer in scorers}
    assert calls == {-(-count // (2 * dp_size))}
    assert sum(len(result) for result in results) == count  # each example on one rank alone
    assert {i: answer for result in results for i, answer in result.items()} == alone
    assert sum(scorer.labelled for scorer in scorers) == count


def test_a_rank_that_calls_less_often_is_seen() -> None:
    """The fake team would not be a test of equal calls if it let unequal ones pass."""

    def unequal(scorer: FakeScorer) -> None:
        answers(scorer, 2 if scorer.dp_rank else 4, 1)

    with pytest.raises(threading.BrokenBarrierError):
        on_ranks(2, hashed, unequal, patience=0.5)


def test_batches_hold_similar_lengths_longest_first() -> None:
    scorer = FakeScorer(hashed)
    answers(scorer, 12, 3)
    lengths = [shape[1] for shape in scorer.shapes]
    assert lengths == sorted(lengths, reverse=True) and lengths[0] == 7
    assert [shape[0] for shape in scorer.shapes] == [3, 3, 3, 3]


def test_the_continuation_begins_where_the_encodings_part(words: WordTokenizer) -> None:
    ids, start = encode_continuation(words, "one two", " three four")
    assert words.decode(ids) == "one two three four" and words.decode(ids[start:]) == " three four"
    # The boundary falls inside the piece "overhead", which belongs to the continuation.
    ids, start = encode_continuation(words, "all over", "head")
    assert words.decode(ids[start:]) == " overhead"
    # Something is always left to predict.
    ids, start = encode_continuation(words, "all", "")
    assert (len(ids), start) == (1, 0)


@pytest.mark.parametrize("word", ["wind", "hill,", "road", "Zürich", "x"])
def test_the_continuation_of_sentencepiece_text(pieces: Tokenizer, word: str) -> None:
    context = 'The wind went round the hill. "What'
    ids, start = encode_continuation(pieces, context, f" {word}")
    assert ids == pieces.encode(f"{context} {word}")
    assert pieces.decode(ids[:start]) == context
    assert pieces.decode(ids[start:]).strip() == word


class _Terminal:
    def isatty(self) -> bool:
        return True


def test_the_bar_is_the_first_ranks_and_only_a_terminals(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = []
    monkeypatch.setattr(scorer_module, "track", lambda items, **_: shown.append(items) or items)
    items = [1, 2]

    def bars(*, quiet: bool, dp_rank: int = 0) -> int:
        shown.clear()
        assert list(progress(items, FakeScorer(hashed, dp_rank=dp_rank), what="test", quiet=quiet)) == items
        return len(shown)

    assert bars(quiet=False) == 0  # pytest's stdout is no terminal
    monkeypatch.setattr(scorer_module.sys, "stdout", _Terminal())
    assert bars(quiet=False) == 1
    assert bars(quiet=True) == 0
    assert bars(quiet=False, dp_rank=1) == 0
