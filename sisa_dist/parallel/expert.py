"""Expert parallelism over data ranks: tokens travel to the ranks that hold their experts, and their results back.

Each rank routes the tokens of its own windows (model/moe.py) and holds whole experts of its ep group's; the rest of
the layer is as without. Two all-to-alls a forward and two a backward carry each choice's row once (Lepikhin et al.
2020, GShard). Nothing is dropped, so how many rows go where is sent first, and the host waits for it.

An expert's gradient is of the tokens of its whole ep group. To sum it over the other holders, and to average, is the
engine's affair.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from sisa_dist.model.moe import Experts
from sisa_dist.ops.experts import arrange, combine, dispatch
from sisa_dist.parallel import collectives


class ExchangedExperts(Experts):
    """The experts of one rank of `group`, for the tokens of all its ranks; `share` stays that of all experts.

    Put in a module's place by changing its class, so that its parameters stay where they are.
    """

    group: dist.ProcessGroup

    @torch.compiler.disable
    def forward(self, x_BTD: Tensor, expert_BTK: Tensor, weight_BTK: Tensor) -> Tensor:
        total, group = self.share.total, self.group
        here = total // group.size()
        ours = arrange(expert_BTK.flatten(0, 1), first=0, count=total, total=total, align=1)
        traffic = _traffic(ours.ends_E, len(ours.token_M), group)
        x_CD = dispatch(x_BTD.flatten(0, 1), ours)
        x_MD = collectives.exchange(x_CD, group, sent=traffic.sent, received=traffic.received)
        y_MD = self._serve(x_MD, traffic.expert_M, here)
        y_CD = collectives.exchange(y_MD, group, sent=traffic.received, received=traffic.sent)
        return combine(y_CD, weight_BTK.flatten(0, 1), ours)

    def _serve(self, x_MD: Tensor, expert_M: Tensor, here: int) -> Tensor:
        """[M, D] → [M, D]: each row through the one of the experts here that it came for."""
        num = len(x_MD)
        if not num:  # the products and their gradients need a row
            x_MD, expert_M = F.pad(x_MD, (0, 0, 0, 1)), expert_M.new_zeros(1)
        rows = arrange(expert_M[:, None], first=0, count=here, total=here)
        y_MD = self.compute(dispatch(x_MD, rows), rows.ends_E)
        return combine(y_MD, torch.ones_like(expert_M, dtype=torch.float32)[:, None], rows)[:num]


def exchange_tokens(experts: Experts, group: dist.ProcessGroup) -> None:
    """`experts`, whose tensors are cut already, serve all ranks of `group`."""
    experts.__class__ = ExchangedExperts
    assert isinstance(experts, ExchangedExperts)
    experts.group = group


class _Traffic(NamedTuple):
    sent: list[int]  # rows to each rank
    received: list[int]  # rows from each rank
    expert_M: Tensor  # int64, which of the experts here a received row is for


@torch.no_grad()
def _traffic(ends_E: Tensor, rows: int, group: dist.ProcessGroup) -> _Traffic:
    """From where each expert's rows end among the `rows` that this rank sends. Collective; waits for the device."""
    ranks = group.size()
    here = len(ends_E) // ranks
    sent_RE = ends_E.long().diff(prepend=ends_E.new_zeros(1, dtype=torch.int64)).view(ranks, here)
    ones = [1] * ranks
    received_RE = collectives.all_to_all(sent_RE, group, sent=ones, received=ones)
    if isinstance(ends_E, FakeTensor):  # a rehearsal: as if all experts were chosen equally often
        even = [rows // ranks + (rank < rows % ranks) for rank in range(ranks)]
        return _Traffic(even, even, ends_E.new_zeros(rows, dtype=torch.int64))
    sent, received = torch.stack((sent_RE.sum(1), received_RE.sum(1))).tolist()
    expert_RE = torch.arange(here, device=ends_E.device).repeat(ranks)
    return _Traffic(sent, received, expert_RE.repeat_interleave(received_RE.flatten(), output_size=sum(received)))
