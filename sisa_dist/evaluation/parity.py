"""Parity: is the number of ones so far even or odd? The smallest task that needs a state carried from token to token.

Fixed-depth attention and recurrences with positive eigenvalues cannot do it at every length (Merrill et al. 2024,
arXiv 2404.08819; Grazzi et al. 2024, arXiv 2411.12537); a state that turns by π can.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from data_pipeline.window import IGNORE, Batch
from sisa_dist.evaluation.synthetic import generator

EVEN, ODD = 2, 3


@dataclass(frozen=True)
class Parity:
    """Tokens are 0 and 1; the label of every position is EVEN or ODD. `asked_from`: labels before it do not count.

    Training counts all positions; evaluation only the later ones, since the first are parities of a handful of bits.
    """

    seq_len: int = 32
    asked_from: int = 0

    @property
    def vocab_size(self) -> int:
        return 4

    @property
    def chance(self) -> float:
        return 0.5

    def batch(self, number: int, size: int, *, seed: int, held_out: bool = False) -> Batch:
        bits_BT = generator(number, seed=seed, held_out=held_out).integers(2, size=(size, self.seq_len))
        labels_BT = np.where(bits_BT.cumsum(1) % 2, ODD, EVEN)
        labels_BT[:, : self.asked_from] = IGNORE
        return Batch(torch.from_numpy(bits_BT), torch.from_numpy(labels_BT), None)
