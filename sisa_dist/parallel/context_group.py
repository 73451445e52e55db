"""The ranks that share windows: who holds which stretches, and how keys and their gradients come round.

A window of T tokens is cut into 2R stretches for R ranks. Rank r holds r and 2R − 1 − r, an early and a late one: then
all ranks have equally many keys before their own, 2R − 1 stretches' worth, and equally much to do.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from sisa_dist.parallel import collectives


@dataclass(frozen=True)
class Context:
    """The ranks of cp, and `kind`, how their scores meet keys held elsewhere (config: parallel.cp_kind)."""

    group: dist.ProcessGroup
    kind: str

    @property
    def rank(self) -> int:
        return self.group.rank()

    @property
    def size(self) -> int:
        return self.group.size()

    def held_by(self, rank: int) -> tuple[int, int]:
        return rank, 2 * self.size - 1 - rank

    def own(self, x: Tensor, *, dim: int = 0) -> Tensor:
        """Of all stretches in `dim`, in the window's order, this rank's two."""
        return torch.stack([x.select(dim, stretch) for stretch in self.held_by(self.rank)], dim)

    def in_order(self, x: Tensor) -> Tensor:
        """[2, ...] of each rank → all stretches [2R, ...] in the window's order. Collective."""
        return self.sorted(collectives.all_gather(x, self.group, dim=0))

    def sorted(self, x: Tensor) -> Tensor:
        """[2R, ...], rank after rank → in the window's order."""
        return torch.cat((x[::2], x[1::2].flip(0)))

    def dealt(self, x: Tensor) -> Tensor:
        """Inverse of `sorted`."""
        return torch.stack((x[: self.size], x[self.size :].flip(0)), 1).flatten(0, 1)

    def pairs(self, source: int) -> list[tuple[int, int]]:
        """(own stretch, stretch of `source`), 0 or 1 each, of which the latter is the earlier in the window."""
        mine, theirs = self.held_by(self.rank), self.held_by(source)
        return [(a, b) for a in (0, 1) for b in (0, 1) if theirs[b] < mine[a]]

    def shards(self, x: Tensor) -> Iterator[tuple[int, Tensor]]:
        """(rank, its x), this rank's own first. Collective; to be consumed to the end."""
        order = [(self.rank - step) % self.size for step in range(self.size)]
        if self.kind == "all_gather":
            every = collectives.all_gather(x[None], self.group, dim=0)
            yield from ((rank, every[rank]) for rank in order)
            return
        for source in order[:-1]:
            coming, running = collectives.start_pass_on(x, self.group)
            yield source, x
            for work in running:
                work.wait()
            x = coming
        yield order[-1], x


class Returns:
    """Takes gradients of others' shards, in the order of `Context.shards`, and gives the sum of all for one's own."""

    def __init__(self, context: Context, like: Tensor) -> None:
        self._context, self._own = context, torch.zeros_like(like)
        self._moving: Tensor | None = None
        self._every = like.new_zeros(context.size, *like.shape) if context.kind == "all_gather" else None

    def add(self, source: int, gradient: Tensor) -> None:
        """Collective. `gradient` may be written into."""
        if self._every is not None:
            self._every[source] = gradient
        elif source == self._context.rank:
            self._own = gradient
        else:
            if self._moving is not None:
                gradient += self._moving
            self._moving = collectives.pass_on(gradient, self._context.group)

    def sum(self) -> Tensor:
        """Collective."""
        if self._every is not None:
            return collectives.reduce_scatter(self._every, self._context.group, dim=0)[0]
        assert self._moving is not None
        return self._own + self._moving
