"""Tasks made on the spot: their answers follow from the tokens by the rule alone, and are nowhere among them."""

from __future__ import annotations

import pytest
import torch
from evaluation_fakes import FakeScorer

from sisa_dist.config import UserError
from sisa_dist.evaluation.parity import EVEN, ODD, Parity
from sisa_dist.evaluation.recall import Recall
from sisa_dist.evaluation.scorer import IGNORE
from sisa_dist.evaluation.synthetic import SyntheticTask, accuracies

TASKS = [Recall(pairs=5, seq_len=24, keys=9, values=7), Recall(), Parity(seq_len=12), Parity(seq_len=12, asked_from=6)]


@pytest.mark.parametrize("task", TASKS, ids=str)
def test_batches_are_a_function_of_seed_and_number(task: SyntheticTask) -> None:
    first = task.batch(3, 16, seed=1)
    again = task.batch(3, 16, seed=1)
    assert torch.equal(first.tokens, again.tokens) and torch.equal(first.labels, again.labels)
    others = [task.batch(4, 16, seed=1), task.batch(3, 16, seed=2), task.batch(3, 16, seed=1, held_out=True)]
    assert not any(torch.equal(first.tokens, other.tokens) for other in others)
    assert first.tokens.dtype == first.labels.dtype == torch.int64
    assert first.tokens.min() >= 0 and max(first.tokens.max(), first.labels.max()) < task.vocab_size
    # The largest numbers a generator's key takes are still told apart.
    large = [task.batch(2**63 - 1 - n, 16, seed=2**64 - 1).tokens for n in range(2)]
    assert not torch.equal(*large)


@pytest.mark.parametrize("task", TASKS[:2], ids=str)
def test_recall_asks_for_keys_and_shows_no_answer(task: Recall) -> None:
    batch = task.batch(0, 64, seed=0)
    start, asked = 2 * task.pairs, set()
    for tokens, labels in zip(batch.tokens.tolist(), batch.labels.tolist(), strict=True):
        values = dict(zip(tokens[0:start:2], tokens[1:start:2], strict=True))
        assert len(values) == len(set(values.values())) == task.pairs  # nothing twice, so that guessing gives 1 / pairs
        assert labels == [IGNORE] * start + [values[key] for key in tokens[start:]]
        # Behind the pairs stand keys alone: an answer given earlier would be a value.
        assert max(tokens[start:]) < task.keys <= min(values.values())
        asked |= {(t, tokens[0:start:2].index(key)) for t, key in enumerate(tokens) if t >= start}
    assert len(asked) > 0.9 * (task.seq_len - start) * task.pairs  # each pair is asked for at each place


def test_parity_is_that_of_the_prefix() -> None:
    batch = Parity(seq_len=12, asked_from=4).batch(0, 512, seed=0)
    for bits, labels in zip(batch.tokens.tolist(), batch.labels.tolist(), strict=True):
        for t, label in enumerate(labels):
            assert label == (IGNORE if t < 4 else ODD if sum(bits[: t + 1]) % 2 else EVEN)
    assert 0.4 < (batch.labels[:, -1] == ODD).float().mean() < 0.6


def test_no_held_out_sequence_of_parity_is_trained_on() -> None:
    task = Parity(seq_len=16)
    seen = {tuple(row) for n in range(100) for row in task.batch(n, 64, seed=3).tokens.tolist()}
    held_out = {tuple(row) for row in task.batch(0, 512, seed=0, held_out=True).tokens.tolist()}
    assert len(seen) > 5000 and len(held_out) > 450 and not seen & held_out
    assert 0.4 < sum(sum(row) % 2 for row in held_out) / len(held_out) < 0.6


def test_accuracy_is_a_share_of_each_sequences_own_labels() -> None:
    # Knows the answers of parity but for odd ones.
    scorer = FakeScorer(lambda prefix: (EVEN, {}))
    batches = [Parity(seq_len=8, asked_from=4).batch(n, 3, seed=0) for n in range(2)]
    wanted = [sum(label == EVEN for label in row) / 4 for batch in batches for row in batch.labels[:, 4:].tolist()]
    assert accuracies(scorer, batches) == pytest.approx(wanted) and len(set(wanted)) > 1


def test_sizes_that_cannot_be() -> None:
    with pytest.raises(UserError, match="lower the pairs"):
        Recall(pairs=9, seq_len=64, values=8)
    with pytest.raises(UserError, match="need seq_len 24"):
        Recall(pairs=8, seq_len=23)
