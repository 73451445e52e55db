"""Loss by position: buckets by hand, and together they are the loss."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from evaluation_fakes import FakeScorer, hashed, on_ranks

from data_pipeline.loader import Batch
from sisa_dist.config import UserError
from sisa_dist.evaluation.heat_map import draw_positions
from sisa_dist.evaluation.perplexity import perplexity
from sisa_dist.evaluation.positions import loss_by_position

T = 10


def batches(scorer: FakeScorer, *, documents: bool, count: int = 7) -> Iterator[Batch]:
    for first in range(0, count, scorer.dp_size):
        number = first + scorer.dp_rank
        tokens = (torch.arange(2 * T).view(2, T) * (number + 3)) % 61
        labels = (tokens + 1).masked_fill(torch.arange(T) % 4 == number % 4, -100)
        if number >= count:
            labels = torch.full_like(labels, -100)
        doc_ids = torch.tensor([[0] * 3 + [4] * 7, [1] * 10]) if documents else None
        yield Batch(tokens, labels, doc_ids)


def by_hand(*, documents: bool) -> tuple[list[float], list[int]]:
    scorer = FakeScorer(hashed)
    nats, counts = [0.0] * T, [0] * T
    for batch in batches(scorer, documents=documents):
        log_prob, _ = scorer.score(batch.tokens, batch.labels)
        for row, t in (batch.labels != -100).nonzero().tolist():
            place = t - 3 if documents and row == 0 and t >= 3 else t
            nats[place] -= float(log_prob[row, t])
            counts[place] += 1
    return nats, counts


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("buckets", [1, 3, T])
def test_buckets_are_the_loss(buckets: int, documents: bool) -> None:
    scorer = FakeScorer(hashed)
    found = loss_by_position(scorer, batches(scorer, documents=documents), seq_len=T, buckets=buckets)
    nats, counts = by_hand(documents=documents)
    bounds = [*found["from"], T]
    assert found["from"][0] == 0 and len(found["from"]) == buckets
    for b, (start, stop) in enumerate(pairwise(bounds)):
        assert found["tokens_by_position"][b] == sum(counts[start:stop])
        assert found["loss_by_position"][b] == pytest.approx(sum(nats[start:stop]) / sum(counts[start:stop]))
    weighed = zip(found["loss_by_position"], found["tokens_by_position"], strict=True)
    assert sum(loss * tokens for loss, tokens in weighed) / found["tokens"] == pytest.approx(found["loss"])
    whole = perplexity(scorer, batches(scorer, documents=documents))
    assert (found["loss"], found["tokens"]) == (pytest.approx(whole.loss), whole.tokens)


@pytest.mark.parametrize("dp_size", [2, 3])
def test_the_same_on_any_number_of_ranks(dp_size: int) -> None:
    def run(scorer: FakeScorer) -> dict[str, Any]:
        return loss_by_position(scorer, batches(scorer, documents=True), seq_len=T, buckets=4)

    results, _ = on_ranks(dp_size, hashed, run)
    assert results == [run(FakeScorer(hashed))] * dp_size


def test_an_empty_bucket_is_no_number_and_no_label_at_all_an_error(tmp_path: Path) -> None:
    labels = torch.full((1, T), -100)
    nothing = [Batch(torch.zeros_like(labels), labels, None)]
    with pytest.raises(UserError, match="no token to score"):
        loss_by_position(FakeScorer(hashed), nothing, seq_len=T, buckets=2)
    labels[0, 7] = 3
    found = loss_by_position(FakeScorer(hashed), nothing, seq_len=T, buckets=2)
    assert found["loss_by_position"] == [None, found["loss"]] and found["tokens_by_position"] == [0, 1]
    draw_positions({"text": found}, tmp_path / "curve.png", title="step 1", seq_len=5)
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
