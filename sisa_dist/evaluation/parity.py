"""Parity: is the number of ones so far even or odd? The smallest task that needs a state carried from token to token.

Fixed-depth attention and recurrences with positive eigenvalues cannot do it at every length (Merrill et al. 2024,
arXiv 2404.08819; Grazzi et al. 2024, arXiv 2411.12537); a state that turns by π can.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import numpy as np
import torch

from data_pipeline.window import IGNORE, Batch
from sisa_dist.evaluation.synthetic import generator

EVEN, ODD = 2, 3
_FEW = 12


def _set_apart(bits_T: np.ndarray) -> bool:
    return zlib.crc32(np.packbits(bits_T).tobytes()) % 8 == 0


@dataclass(frozen=True)
class Parity:
    """Tokens are 0 and 1; the label of every position is EVEN or ODD. `asked_from`: labels before it do not count.

    Training counts all positions; evaluation only the later ones, since the first are parities of a handful of bits.
    An eighth of all sequences, by a hash, is never trained on and alone held out: of 16 bits there are only 65 536.
    Their beginnings are trained on. Shorter than 12 bits none is set apart.
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
        draw = generator(number, seed=seed, held_out=held_out)
        rows: list[np.ndarray] = []
        while len(rows) < size:
            bits_BT = draw.integers(2, size=(size, self.seq_len))
            rows += [row for row in bits_BT if self.seq_len < _FEW or _set_apart(row) == held_out]
        bits_BT = np.stack(rows[:size])
        labels_BT = np.where(bits_BT.cumsum(1) % 2, ODD, EVEN)
        labels_BT[:, : self.asked_from] = IGNORE
        return Batch(torch.from_numpy(bits_BT), torch.from_numpy(labels_BT), None)
