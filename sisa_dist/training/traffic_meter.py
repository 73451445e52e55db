"""What one rank sends, counted call by call as PyTorch dispatches it, over real process groups or pretended ones.

It sees what goes through `torch.distributed`, whoever calls: our collectives, FSDP2's, DeepSpeed's, in a backward too.
A group of one rank sends nothing and is left out; of a message from rank to rank the sender counts it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sisa_dist.parallel.mesh import AXES, Mesh
from sisa_dist.training.traffic import Collective, Transfer

# Operator → what it does, and which argument is the whole tensor.
_COLLECTIVES: dict[str, tuple[Collective, int]] = {
    "c10d::_allgather_base_": ("all_gather", 0),
    "c10d::allgather_": ("all_gather", 0),
    "c10d::allgather_into_tensor_coalesced_": ("all_gather", 0),
    "c10d::_reduce_scatter_base_": ("reduce_scatter", 1),
    "c10d::reduce_scatter_": ("reduce_scatter", 1),
    "c10d::reduce_scatter_tensor_coalesced_": ("reduce_scatter", 1),
    "c10d::allreduce_": ("all_reduce", 0),
    "c10d::allreduce_coalesced_": ("all_reduce", 0),
    "c10d::alltoall_base_": ("all_to_all", 1),
    "c10d::alltoall_": ("all_to_all", 1),
    "c10d::broadcast_": ("broadcast", 0),
    "c10d::reduce_": ("reduce", 0),
    "c10d::send": ("send", 0),
}
_SILENT = ("c10d::recv_", "c10d::barrier")  # counted where it is sent; no tensor


class Kind(NamedTuple):
    """Calls of one kind are summed: over one group by one collective."""

    collective: Collective
    axis: str
    size: int
    stride: int


class TrafficMeter(TorchDispatchMode):
    """Counts while entered. `calls` and `nbytes` by `Kind`, of the whole tensors as `Transfer` has them.

    `times`: how many calls each one that is seen stands for, from now on.
    """

    def __init__(self, mesh: Mesh) -> None:
        super().__init__()
        self.calls: Counter[Kind] = Counter()
        self.nbytes: Counter[Kind] = Counter()
        self.times = 1
        self._by_name, self._by_ranks = _axes(mesh)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().split(".")[0]
        if name in _COLLECTIVES:
            self._count(name, args)
        else:
            assert "c10d" not in name.split("::")[0] or name in _SILENT, f"{name} sends what is not counted"
        return func(*args, **(kwargs or {}))

    def transfers(self) -> tuple[Transfer, ...]:
        """Of all that was counted, largest first."""
        kinds = sorted(self.calls, key=lambda kind: (-self.nbytes[kind], kind))
        return tuple(Transfer(*kind, self.calls[kind], self.nbytes[kind]) for kind in kinds)

    def add(self, collective: Collective, group: dist.ProcessGroup, sizes: Iterable[int]) -> None:
        """A call over `group` for each whole tensor of so many bytes, as if it had been seen."""
        if group.size() == 1:
            return
        ranks = dist.get_process_group_ranks(group)
        kind = Kind(collective, self._axis(collective, group), len(ranks), ranks[1] - ranks[0])
        for size in sizes:
            self.calls[kind] += self.times
            self.nbytes[kind] += self.times * size

    def _count(self, name: str, args: Any) -> None:
        (boxed,) = (arg for arg in args if isinstance(arg, torch.ScriptObject) and "ProcessGroup" in str(arg._type()))
        collective, position = _COLLECTIVES[name]
        whole = sum(x.nbytes for x in tree_leaves(args[position]) if isinstance(x, Tensor))
        self.add(collective, dist.ProcessGroup.unbox(boxed), [whole])

    def _axis(self, collective: Collective, group: dist.ProcessGroup) -> str:
        """Of axes with the same ranks, where groups may be one too, the outermost; rows and rounds are sent along the
        inner ones alone."""
        axes = self._by_name.get(group.group_name) or self._by_ranks[tuple(dist.get_process_group_ranks(group))]
        return axes[-1 if collective in ("all_to_all", "send") else 0]


def _axes(mesh: Mesh) -> tuple[dict[str, list[str]], dict[tuple[int, ...], list[str]]]:
    """The axes of a group of the mesh, by its name; of a group that a library made itself, by its ranks."""
    axes = [axis for axis in AXES if mesh.size(axis) > 1]
    axes += ["expert_dp", "ep"] if mesh.expert_mesh is not None else []
    axes += ["cp"] if mesh.context_mesh is not None else []
    by_name: dict[str, list[str]] = {}
    by_ranks: dict[tuple[int, ...], list[str]] = {}
    for axis in axes:
        group = mesh.group(axis)
        by_name.setdefault(group.group_name, []).append(axis)
        by_ranks.setdefault(tuple(dist.get_process_group_ranks(group)), []).append(axis)
    by_name.setdefault(dist.group.WORLD.group_name, ["world"])  # type: ignore[union-attr]
    by_ranks.setdefault(tuple(range(mesh.world_size)), ["world"])
    return by_name, by_ranks
