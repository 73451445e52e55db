"""What `apply.py` puts into a model: hooks, a cut embedding, a cut vocabulary, and weights read through `copy`."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from sisa_dist.model.loss import Vocabulary
from sisa_dist.model.moe import Share
from sisa_dist.model.norm import RMSNorm
from sisa_dist.model.precision import at_least_fp32
from sisa_dist.parallel import collectives

Collective = Callable[[Tensor, dist.ProcessGroup], Tensor]


@dataclass(frozen=True)
class Border:
    """Where the residual stream, whole or a stretch of the sequence, meets a region where each rank has its slice."""

    group: dist.ProcessGroup
    sequence_parallel: bool

    def enter(self, x_BTD: Tensor) -> Tensor:
        return collectives.gather(x_BTD, self.group) if self.sequence_parallel else collectives.copy(x_BTD, self.group)

    def leave(self, x_BTD: Tensor) -> Tensor:
        return (
            collectives.scatter(x_BTD, self.group) if self.sequence_parallel else collectives.reduce(x_BTD, self.group)
        )


def enter_before(module: nn.Module, border: Border) -> None:
    """The module's first argument enters the region."""

    def hook(module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        return (border.enter(arguments[0]), *arguments[1:])

    module.register_forward_pre_hook(hook)


def leave_after(module: nn.Module, border: Border) -> None:
    """The module's output, a partial sum, leaves the region."""

    def hook(module: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> Tensor:
        return border.leave(output)

    module.register_forward_hook(hook)


def sum_after(module: nn.Module, group: dist.ProcessGroup) -> None:
    """The module's output, a partial sum inside the region, is summed; each rank goes on with it for its own slice."""

    def hook(module: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> Tensor:
        return _sum_inside(output, group)

    module.register_forward_hook(hook)


def _sum_inside(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The sum over ranks, of which each makes other use: so its gradient is a sum over ranks too."""
    return collectives.copy(collectives.reduce(x, group), group)


class _RMSNormOverRanks(RMSNorm):
    """An RMSNorm whose groups of channels are wider than a rank's slice: only sums of squares, one number a token and
    group, come from the others."""

    group: dist.ProcessGroup

    def forward(self, x: Tensor) -> Tensor:
        weight, x_wide = self.weight, at_least_fp32(x)
        ranks, mine = self.group.size(), self.group.rank() * self.groups // self.group.size()
        squares = x_wide.square().sum(-1, keepdim=True)
        # Each rank adds to its own group's place, so that one sum over all ranks serves every group.
        squares = _sum_inside(F.pad(squares, (mine, self.groups - 1 - mine)), self.group)[..., mine : mine + 1]
        width = weight.shape[0] * ranks // self.groups
        return (x_wide * torch.rsqrt(squares / width + self.eps) * weight).to(x.dtype)


def norm_over_ranks(module: RMSNorm, group: dist.ProcessGroup) -> None:
    """The module's channels are those of all ranks of `group` together."""
    if module.groups % group.size() == 0:
        module.groups //= group.size()  # whole groups on each rank
        return
    assert group.size() % module.groups == 0, "a slice of an RMSNorm lies in one of its groups"
    module.__class__ = _RMSNormOverRanks
    assert isinstance(module, _RMSNormOverRanks)
    module.group = group


def add_after(module: nn.Module, group: dist.ProcessGroup, *, partial: bool) -> None:
    """The module's bias is added to what `leave_after`, called before this, made of its output: the module itself sees
    none, or each rank would add it to its part of the sum. `partial`: each rank's gradient of it is a part."""
    module.__class__ = _without_bias(type(module))  # type: ignore[arg-type]

    def hook(module: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> Tensor:
        bias = module._parameters["bias"]
        assert bias is not None
        return output + (collectives.copy(bias, group) if partial else bias).to(output.dtype)

    module.register_forward_hook(hook)


@functools.cache
def _without_bias(cls: type[nn.Linear]) -> type[nn.Linear]:
    def read(module: nn.Module) -> Tensor | None:
        stored = module._parameters["bias"]
        assert stored is not None
        return stored if stored.is_meta or isinstance(stored, DTensor) else None  # outside forward: what is stored

    return type(cls.__name__, (cls,), {"bias": property(read), "__module__": cls.__module__})


class VocabularyEmbedding(nn.Embedding):
    """An embedding that holds the rows from `first` on: other tokens give zeros, and the sum over ranks is the whole.

    Put in a module's place by changing its class, so that its parameter stays where it is.
    """

    first: int
    border: Border

    def forward(self, tokens_BT: Tensor) -> Tensor:
        row_BT = tokens_BT - self.first
        elsewhere_BT = (row_BT < 0) | (row_BT >= self.num_embeddings)
        h_BTD = F.embedding(row_BT.masked_fill(elsewhere_BT, 0), self.weight)
        return self.border.leave(h_BTD.masked_fill(elsewhere_BT[..., None], 0.0))


@dataclass(frozen=True)
class VocabularySlice(Vocabulary):
    """The columns of one rank; what the others hold comes in as one or two numbers a token, never as logits."""

    group: dist.ProcessGroup | None = None

    def over_all(self, lse_N: Tensor, picked_N: Tensor) -> tuple[Tensor, Tensor]:
        lse_RN, picked_RN = (
            collectives.all_gather(torch.stack((lse_N, picked_N)), self._group, dim=0).unflatten(0, (-1, 2)).unbind(1)
        )
        return lse_RN.logsumexp(0), picked_RN.amax(0)

    def argmax(self, logits_NV: Tensor) -> Tensor:
        value_N, column_N = logits_NV.max(1)
        # Ranks hold rising columns, so the first of equal maxima over ranks is the first column.
        value_RN = collectives.all_gather(value_N[None], self._group, dim=0)
        column_RN = collectives.all_gather(column_N[None] + self.first, self._group, dim=0)
        return column_RN.gather(0, value_RN.argmax(0)[None])[0]

    def whole(self, logits: Tensor) -> Tensor:
        return collectives.all_gather(logits, self._group, dim=logits.ndim - 1)

    @property
    def _group(self) -> dist.ProcessGroup:
        assert self.group is not None
        return self.group


@dataclass(frozen=True)
class ExpertSlice(Share):
    """The experts of one rank; every rank of the group routes the same tokens."""

    group: dist.ProcessGroup

    def sum(self, x: Tensor) -> Tensor:
        return collectives.reduce(x, self.group)


def sum_gradients(
    module: nn.Module, name: str, group: dist.ProcessGroup, *, rows: tuple[int, int] | None = None
) -> None:
    """Reads of `module.name` go through `copy`: each rank's gradient is a part, the parameter gets the sum.

    With `rows` the module sees only that range of the parameter's rows. Reading is by a property, so the stored
    parameter keeps its name and an engine may swap it as it likes.
    """
    module.__class__ = _reading_through_copy(type(module), name)  # type: ignore[arg-type]
    module.__dict__.setdefault("summed", {})[name] = (group, rows)


@functools.cache  # one class for all blocks, or torch.compile would compile each block anew
def _reading_through_copy(cls: type[nn.Module], name: str) -> type[nn.Module]:
    def read(module: nn.Module) -> Tensor:
        stored = module._parameters[name]
        assert stored is not None
        if stored.is_meta or isinstance(stored, DTensor):
            return stored  # outside forward: what is stored, without a node of a graph that would hold on to it
        group, rows = module.__dict__["summed"][name]
        whole = collectives.copy(stored, group)
        return whole if rows is None else whole[rows[0] : rows[1]]

    return type(cls.__name__, (cls,), {name: property(read), "__module__": cls.__module__})
