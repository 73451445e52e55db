"""Where a recurrent mixer looks at other tokens: modules, so that context parallelism can put others in their place."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from sisa_dist.ops import running_phase, selective_scan, ssd


class Ssd(nn.Module):
    """`ssd` from an empty state; what follows one that a cache holds is `mamba2.continued`."""

    def __init__(self, chunk: int, rank: int = 1) -> None:
        super().__init__()
        self.chunk, self.rank = chunk, rank

    def forward(self, *terms: Tensor, diagonal: Tensor | None = None, doc_ids: Tensor | None) -> Tensor:
        x, log_decay, B, C, weight = terms
        return ssd(x, log_decay, B, C, weight, diagonal=diagonal, rank=self.rank, chunk=self.chunk, doc_ids=doc_ids)[0]


class SelectiveScan(nn.Module):
    """`selective_scan` from an empty state."""

    def __init__(self, chunk: int) -> None:
        super().__init__()
        self.chunk = chunk

    def forward(self, x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, *, doc_ids: Tensor | None) -> Tensor:
        return selective_scan(x, delta, A, B, C, chunk=self.chunk, doc_ids=doc_ids)[0]


class NextStep(nn.Module):
    """x_{t+1} at t, [B, H, T]; 0 at the last token of a document."""

    def forward(self, x_BHT: Tensor, doc_ids: Tensor | None) -> Tensor:
        next_BHT = F.pad(x_BHT[:, :, 1:], (0, 1))
        if doc_ids is None:
            return next_BHT
        ends_BT = F.pad(doc_ids[:, 1:] != doc_ids[:, :-1], (0, 1))
        return next_BHT.masked_fill(ends_BT[:, None], 0.0)


class RunningPhase(nn.Module):
    """`running_phase`."""

    def forward(self, theta_BHTm: Tensor, doc_ids: Tensor | None) -> Tensor:
        return running_phase(theta_BHTm, doc_ids)
