"""What one rank sends in a training step, by collective and axis.

Ranks send alike but for two things: with experts, the rows that a router deals out; and under context parallelism the
edges of a recurrent mixer's stretches, of which ranks in the middle send two and the first, which is told of, one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Collective = Literal["all_gather", "reduce_scatter", "all_reduce", "all_to_all", "broadcast", "reduce", "send"]


@dataclass(frozen=True)
class Transfer:
    """All calls of one collective over one group in one step of one rank."""

    collective: Collective
    axis: str  # dp_shard, dp_replicate, tp, cp, ep, expert_dp, or world
    size: int  # ranks of the group
    stride: int  # distance in rank numbers between neighbours of the group; 1: they stand side by side
    calls: int
    nbytes: int  # of the whole tensors: what all-gathers end with, reduce-scatters begin with, others are given

    @property
    def sent(self) -> float:
        """Bytes that a rank sends, at least; what a ring does."""
        share = (self.size - 1) / self.size
        if self.collective in ("all_gather", "reduce_scatter", "all_to_all"):
            return share * self.nbytes
        return 2 * share * self.nbytes if self.collective == "all_reduce" else float(self.nbytes)
