"""A flat range of a tensor, as ZeRO partitions hold it, described to PyTorch's checkpoints as boxes of the global one.

A row-major range of an N-d tensor is at most 2N − 1 boxes: a few loose elements, a few loose rows, whole planes
between. So a ZeRO checkpoint is an ordinary one of full names and global tensors, and no rank ever gathers a parameter.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from sisa_dist.parallel.apply import Slice
from sisa_dist.parallel.mesh import Mesh


class Box(NamedTuple):
    offset: tuple[int, ...]  # of its first element in the tensor
    sizes: tuple[int, ...]
    start: int  # of its first element in the flat range


def boxes(shape: tuple[int, ...], start: int, stop: int) -> list[Box]:
    """The boxes that elements start..stop−1 of a row-major tensor of `shape` fill, in order."""
    found: list[Box] = []

    def fill(dims: tuple[int, ...], offset: tuple[int, ...], low: int, high: int, at: int) -> None:
        if low >= high:
            return
        if not dims:
            found.append(Box(offset, (1,) * len(offset), at))
            return
        row = math.prod(dims[1:])
        first, last = low // row, (high - 1) // row
        inner = (0,) * (len(dims) - 1)
        if first == last and (low % row or high % row):
            fill(dims[1:], (*offset, first), low % row, low % row + high - low, at)
            return
        whole_from, whole_to = -(-low // row), high // row
        if low % row:
            fill(dims[1:], (*offset, first), low % row, row, at)
        if whole_to > whole_from:
            sizes = (*(1,) * len(offset), whole_to - whole_from, *dims[1:])
            found.append(Box((*offset, whole_from, *inner), sizes, at + whole_from * row - low))
        if high % row:
            fill(dims[1:], (*offset, whole_to), 0, high % row, at + whole_to * row - low)

    fill(tuple(shape), (), start, stop, 0)
    return found


class FlatShard(torch.Tensor):
    """A view of live flat memory that a DCP save writes and a load fills as part of the global tensor.

    A Tensor, because DCP's planners ask for one; its `size()` is the global tensor's. Nothing computes with it.
    """

    part: Slice
    offsets: dict[tuple[int, ...], Box]  # by global offset

    @staticmethod
    def of(flat: Tensor, start: int, part: Slice, mesh: Mesh) -> FlatShard:
        """Elements start.. of the row-major slice `part` of this rank; `flat` [n], n may be 0."""
        shard = torch.Tensor._make_subclass(FlatShard, flat.detach())
        index = part.of(*part.place(mesh))
        corner = [cut.start or 0 for cut in index]
        shape = tuple(
            (cut.stop - cut.start) if cut.start is not None else n for cut, n in zip(index, part.shape, strict=True)
        )
        shard.part = part
        shard.offsets = {
            tuple(a + b for a, b in zip(corner, box.offset, strict=True)): box
            for box in boxes(shape, start, start + flat.numel())
        }
        return shard

    def over(self, flat: Tensor) -> FlatShard:
        """The same part of the same tensor, over other memory of the same length."""
        shard = torch.Tensor._make_subclass(FlatShard, flat.detach())
        shard.part, shard.offsets = self.part, self.offsets
        return shard

    def size(self, dim: int | None = None) -> Any:
        return self.part.shape if dim is None else self.part.shape[dim]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [
            ChunkStorageMetadata(offsets=torch.Size(offset), sizes=torch.Size(box.sizes))
            for offset, box in self.offsets.items()
        ]

    def __create_write_items__(self, fqn: str, object: Any) -> list[WriteItem]:
        properties = TensorProperties(dtype=self.dtype)
        return [
            WriteItem(
                index=MetadataIndex(fqn, chunk.offsets),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk=chunk, properties=properties, size=self.part.shape),
            )
            for chunk in self.__create_chunk_list__()
        ]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        assert index.offset is not None
        box = self.offsets[tuple(index.offset)]
        flat = self.as_subclass(torch.Tensor)
        return flat[box.start : box.start + math.prod(box.sizes)].view(box.sizes)
