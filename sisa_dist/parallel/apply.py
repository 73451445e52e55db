"""Cuts a model for tensor and expert parallelism as the plan says, and its windows for context parallelism.

Storage and optimizer are the engine's affair.

After `apply_plan` each parameter is a plain tensor with this rank's slice, and the model's own code runs unchanged on
fewer heads, columns and rows: `nn.Linear`, per-head parameters and `view(B, T, -1, head_dim)` never know.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal

import torch
from torch import nn

from sisa_dist.model import LM
from sisa_dist.model.moe import Experts
from sisa_dist.model.norm import RMSNorm
from sisa_dist.parallel.context import place_in_context
from sisa_dist.parallel.context_group import Context
from sisa_dist.parallel.expert import exchange_tokens
from sisa_dist.parallel.layers import (
    Border,
    ExpertSlice,
    VocabularyEmbedding,
    VocabularySlice,
    add_after,
    enter_before,
    leave_after,
    norm_over_ranks,
    sum_after,
    sum_gradients,
)
from sisa_dist.parallel.mesh import Mesh
from sisa_dist.parallel.overlap import enter_overlapped
from sisa_dist.parallel.plan import EXITS, PLAN, REGIONS, SHARED_BY_HEADS, Split, check_tp, split_of


@dataclass(frozen=True)
class Slice:
    """What a rank holds of one parameter: the one truth about its split, from which everything else derives.

    `tp_dim` None: all of it. `tp_grad` partial: each rank's gradient is its part of a sum over tp, which reading the
    parameter through `copy` completes. `shape` is the global one. `ep_dim`, never beside a `tp_dim`: dealt out over
    ep, to data ranks; the gradient is of the tokens of all of them.
    """

    tp_dim: int | None
    tp_grad: Literal["full", "partial"]
    shape: torch.Size
    ep_dim: int | None = None

    @property
    def dim(self) -> int | None:
        """The dimension that is cut, over tp or over ep."""
        return self.tp_dim if self.ep_dim is None else self.ep_dim

    def place(self, mesh: Mesh) -> tuple[int, int]:
        """(rank, size) of this process on the axis that cuts the parameter."""
        return (mesh.tp_rank, mesh.tp_size) if self.ep_dim is None else (mesh.ep_rank, mesh.ep_size)

    def of(self, rank: int, size: int) -> tuple[slice, ...]:
        """The index of rank `rank`'s slice, of `size` ranks, in the global tensor."""
        index = [slice(None)] * len(self.shape)
        if self.dim is not None:
            width = self.shape[self.dim] // size
            index[self.dim] = slice(rank * width, (rank + 1) * width)
        return tuple(index)

    def local_shape(self, size: int) -> torch.Size:
        """The shape of a rank's slice, of `size` ranks."""
        return torch.Size(n // size if dim == self.dim else n for dim, n in enumerate(self.shape))


def apply_plan(model: LM, mesh: Mesh, *, overlap: bool = True, plan: Mapping[str, Split] = PLAN) -> dict[str, Slice]:
    """Cut `model`, built on the meta device, for this rank of `mesh`; the slice of every parameter by its full name.

    `overlap` hides collectives of the backward behind weight gradients (overlap.py, which says where that is not so).

    Raises UserError where tp does not divide what the plan deals out, AssertionError where a parameter has no line.
    """
    config, tp = model.config, mesh.tp_size
    splits = {name: split_of(name, dict(plan)) for name, _ in model.named_parameters()}
    slices = slices_of(model, tp, sequence_parallel=mesh.sequence_parallel, plan=plan, ep_size=mesh.ep_size)
    for name, part in slices.items():
        if part.dim is None:
            continue
        module, leaf = model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
        parameter = module._parameters[leaf]
        assert parameter is not None and parameter.is_meta, f"{name}: cut a model on the meta device"
        module._parameters[leaf] = nn.Parameter(parameter.new_empty(part.local_shape(part.place(mesh)[1])))
    for region in model.modules():
        if mesh.ep_size > 1 and isinstance(region, Experts):
            exchange_tokens(region, mesh.group("ep"))
    if mesh.cp_size > 1:
        place_in_context(model, Context(mesh.group("cp"), mesh.cp_kind))
    if tp == 1:
        return slices
    border = Border(mesh.group("tp"), mesh.sequence_parallel)
    for name, split in splits.items():
        module, leaf = model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
        partial = slices[name].tp_grad == "partial"
        if split.kind == "added":
            add_after(module, border.group, partial=partial)
        elif partial:
            sum_gradients(module, leaf, border.group, rows=_own_rows(model, name, split, mesh))
        if split.kind == "row":
            leave_after(module, border)
        if split.kind == "inner":
            sum_after(module, border.group)
        if split.kind == "column" and isinstance(module, RMSNorm):
            norm_over_ranks(module, border.group)
        if split.kind == "vocab" and isinstance(module, nn.Embedding):
            _cut_embedding(module, mesh, border)
    for name, region in model.named_modules():
        if any(fnmatchcase(name, pattern) for pattern in REGIONS):
            columns = [
                module
                for leaf, module in region.named_modules()
                if overlap
                and isinstance(module, nn.Linear)
                and module.bias is None
                and splits[f"{name}.{leaf}.weight"].kind == "column"
            ]
            if columns:
                enter_overlapped(region, columns, border)
            else:
                enter_before(region, border)
        if any(fnmatchcase(name, pattern) for pattern in EXITS):
            leave_after(region, border)
        if isinstance(region, Experts):
            count = config.experts // tp
            region.share = ExpertSlice(mesh.tp_rank * count, count, config.experts, border.group)
    if model.gates is not None:
        model.gates.part = 1 / tp  # their gradients are summed over tp, and each rank knows the whole cost
    width = config.padded_vocab_size // tp
    model.head.vocabulary = VocabularySlice(config.vocab_size, mesh.tp_rank * width, border.group)
    return slices


def slices_of(
    model: LM,
    tp_size: int,
    *,
    sequence_parallel: bool = False,
    plan: Mapping[str, Split] = PLAN,
    ep_size: int = 1,
) -> dict[str, Slice]:
    """How `model`, which stays whole, would be cut on `tp_size` ranks, or `ep_size`; needs no process group.

    Raises as `apply_plan`.
    """
    check_tp(model.config, tp_size)
    return {
        name: _slice(model, name, split_of(name, dict(plan)), tp_size, sequence_parallel, ep_size)
        for name, _ in model.named_parameters()
    }


def _slice(model: LM, name: str, split: Split, tp_size: int, sequence_parallel: bool, ep_size: int) -> Slice:
    shape = model.get_parameter(name).shape
    if split.over == "experts" and ep_size > 1:
        assert tp_size == 1 and shape[0] % ep_size == 0, "the config refuses this"
        return Slice(None, "full", shape, ep_dim=0)
    if split.kind in ("replicated", "added"):
        return Slice(None, "partial" if sequence_parallel else "full", shape)
    if split.kind == "shared" or _held_whole(model, split, tp_size):
        return Slice(None, "partial" if tp_size > 1 else "full", shape)
    return Slice(1 if split.kind in ("row", "inner", "part") else 0, "full", shape)


def _held_whole(model: LM, split: Split, tp_size: int) -> bool:
    return split.over in SHARED_BY_HEADS and getattr(model.config, split.over) % tp_size != 0


def _own_rows(model: LM, name: str, split: Split, mesh: Mesh) -> tuple[int, int] | None:
    """Of a parameter of kv heads or groups that is held whole, the rows of the one that this rank's heads read."""
    if not _held_whole(model, split, mesh.tp_size):
        return None
    shared = getattr(model.config, split.over)
    width = model.get_parameter(name).shape[0] // shared
    mine = mesh.tp_rank * shared // mesh.tp_size
    return mine * width, (mine + 1) * width


def _cut_embedding(module: nn.Embedding, mesh: Mesh, border: Border) -> None:
    module.__class__ = VocabularyEmbedding
    assert isinstance(module, VocabularyEmbedding)
    module.num_embeddings //= mesh.tp_size
    module.first, module.border = mesh.tp_rank * module.num_embeddings, border
