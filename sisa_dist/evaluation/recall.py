"""Multi-query associative recall (Arora et al. 2023, arXiv 2312.04927): many keys, asked for again and again.

A sequence begins with key, value, key, value, …; every later token is one of its keys, and the label there is the value
that stood behind it. The value itself is not repeated, so an earlier answer is never seen. Unlike the original, which
asks for every key once among blanks, all that follows the pairs are queries: as many answers to learn from as there is
room, which a laptop needs to see anything learned.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from data_pipeline.window import IGNORE, Batch
from sisa_dist.config import UserError
from sisa_dist.evaluation.synthetic import generator


@dataclass(frozen=True)
class Recall:
    """Ids: `keys` keys, then `values` values. A sequence of seq_len has `pairs` different keys and as many values."""

    pairs: int = 8
    seq_len: int = 48
    keys: int = 16
    values: int = 16

    def __post_init__(self) -> None:
        if self.pairs > min(self.keys, self.values):
            raise UserError(
                f"recall: {self.pairs} pairs of {self.keys} keys and {self.values} values, each of which stands once: "
                "lower the pairs"
            )
        if 3 * self.pairs > self.seq_len:
            raise UserError(f"recall: {self.pairs} pairs and their queries need seq_len {3 * self.pairs} or more")

    @property
    def vocab_size(self) -> int:
        return self.keys + self.values

    @property
    def chance(self) -> float:
        """Of a model that knows the values of its sequence, not which belongs to which key."""
        return 1 / self.pairs

    def batch(self, number: int, size: int, *, seed: int, held_out: bool = False) -> Batch:
        draw = generator(number, seed=seed, held_out=held_out)
        pairs, start = self.pairs, 2 * self.pairs
        keys_BP = draw.random((size, self.keys)).argsort(1)[:, :pairs]
        values_BP = self.keys + draw.random((size, self.values)).argsort(1)[:, :pairs]
        asked_BQ = draw.integers(pairs, size=(size, self.seq_len - start))
        tokens_BT = np.empty((size, self.seq_len), dtype=np.int64)
        labels_BT = np.full((size, self.seq_len), IGNORE, dtype=np.int64)
        tokens_BT[:, 0:start:2], tokens_BT[:, 1:start:2] = keys_BP, values_BP
        tokens_BT[:, start:] = np.take_along_axis(keys_BP, asked_BQ, 1)
        labels_BT[:, start:] = np.take_along_axis(values_BP, asked_BQ, 1)
        return Batch(torch.from_numpy(tokens_BT), torch.from_numpy(labels_BT), None)
