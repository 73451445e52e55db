"""What a task made on the spot owes a training loop, and how a model is scored on it.

The answers stand in the labels alone, never in the tokens, so that nothing but the task can produce them. Batches are
drawn from (seed, number): the same for every system that is compared, in any order, on any machine.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from data_pipeline.window import IGNORE, Batch
from sisa_dist.evaluation.scorer import Scorer

_HELD_OUT = 1 << 63  # of the generator's key: no batch of training is among those of evaluation


class SyntheticTask(Protocol):
    """`chance`: the accuracy of a model that knows which labels can stand there and nothing else."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def chance(self) -> float: ...

    def batch(self, number: int, size: int, *, seed: int, held_out: bool = False) -> Batch:
        """`size` sequences; labels are −100 where nothing is asked."""


def generator(number: int, *, seed: int, held_out: bool) -> np.random.Generator:
    """Counter-based; numbers from 0 to 2^63 − 1."""
    # As uint64: of a list with an integer past 2^63 NumPy makes floats.
    words = np.array([seed, number | (_HELD_OUT if held_out else 0)], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=words))


def accuracies(scorer: Scorer, batches: Sequence[Batch]) -> list[float]:
    """For each sequence the share of its labels that are the argmax. One data rank; every sequence has a label."""
    assert scorer.dp_size == 1, "each rank would score all batches"
    found: list[float] = []
    for batch in batches:
        _, is_argmax_BT = scorer.score(batch.tokens, batch.labels)
        counts_BT = batch.labels != IGNORE
        found += ((is_argmax_BT & counts_BT).sum(1) / counts_BT.sum(1)).tolist()
    return found
