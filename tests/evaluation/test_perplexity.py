"""Perplexity: sums over tokens divided once, whatever the batches and ranks."""

from __future__ import annotations

import math

import pytest
import torch
from evaluation_fakes import FakeScorer, WordTokenizer, hashed, on_ranks

from data_pipeline.loader import Batch
from data_pipeline.tokenizer import Tokenizer
from sisa_dist.config import UserError
from sisa_dist.evaluation.perplexity import perplexity


def batch(rows: list[list[int]], labels: list[list[int]]) -> Batch:
    return Batch(torch.tensor(rows), torch.tensor(labels), None)


def certain(prefix: list[int]) -> tuple[int, dict[int, float]]:
    """Token n is followed by n + 1, with probability 1/4; by 9 with 1/16."""
    return prefix[-1] + 1, {prefix[-1] + 1: -math.log(4), 9: -math.log(16)}


def test_by_hand() -> None:
    batches = [batch([[1, 2, 3, 4]], [[2, 3, 9, -100]]), batch([[5], [6]], [[6], [-100]])]
    result = perplexity(FakeScorer(certain), batches)
    # Three labels at ln 4 and one at ln 16: a mean over batches would weigh the last label as the first three.
    assert result.loss == pytest.approx((3 * math.log(4) + math.log(16)) / 4)
    assert result.perplexity == pytest.approx(4 * 2**0.5)
    assert (result.accuracy, result.tokens) == (0.75, 4)
    assert (result.bits_per_byte, result.bytes) == (None, None)


def test_bits_per_byte_by_hand(words: WordTokenizer) -> None:
    ids = words.encode("ab cd\n")  # "ab", " cd", newline: 2 + 3 + 1 bytes
    labels = [*ids, words.eos_id, -100]
    result = perplexity(
        FakeScorer(lambda prefix: (0, dict.fromkeys(range(64), -math.log(8)))),
        [batch([[0] * 5], [labels])],
        tokenizer=words,  # type: ignore[arg-type]
    )
    assert result.bytes == 6
    assert result.bits_per_byte == pytest.approx(4 * 3 / 6)  # the end of the document costs bits and has no byte


def test_bytes_are_those_of_the_text(pieces: Tokenizer) -> None:
    text = "The wind went round the hill – naïve 中文 text."
    ids = pieces.encode(text)
    result = perplexity(FakeScorer(hashed), [batch([[1, *ids[:-1]]], [ids])], tokenizer=pieces)
    assert result.bytes == len(pieces.decode(ids).encode())
    assert abs(result.bytes - len(text.encode())) <= 2  # NFKC of the usual normalisation turns – to nothing longer


@pytest.mark.parametrize("dp_size", [2, 3])
def test_the_same_on_any_number_of_ranks(dp_size: int) -> None:
    rows = [[(i * 7 + t) % 13 for t in range(5)] for i in range(5)]
    labels = [[(i + t * 3) % 9 if (i + t) % 4 else -100 for t in range(5)] for i in range(5)]
    whole = perplexity(FakeScorer(hashed), [batch(rows, labels)])

    def share(scorer: FakeScorer) -> object:
        mine = [batch([rows[i]], [labels[i]]) for i in range(scorer.dp_rank, len(rows), dp_size)]
        most = -(-len(rows) // dp_size)
        mine += [batch([[0]], [[-100]])] * (most - len(mine))
        return perplexity(scorer, mine)

    results, _ = on_ranks(dp_size, hashed, share)
    assert results == [whole] * dp_size


def test_nothing_to_score_is_an_error_not_a_perfect_score() -> None:
    with pytest.raises(UserError, match="no token to score"):
        perplexity(FakeScorer(certain), [batch([[1]], [[-100]])])
    with pytest.raises(UserError, match="no token to score"):
        perplexity(FakeScorer(certain), [])


def test_a_hopeless_model_has_infinite_perplexity() -> None:
    result = perplexity(FakeScorer(lambda prefix: (0, {1: -1e4})), [batch([[1]], [[1]])])
    assert result.loss == 1e4 and math.isinf(result.perplexity)
