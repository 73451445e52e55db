"""Flat ranges as boxes: every element once, in order, few boxes; and through a real checkpoint to any other layout."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given, settings
from hypothesis import strategies as st

from sisa_dist.parallel.apply import Slice
from sisa_dist.parallel.flat_shard import FlatShard, boxes


@settings(max_examples=300, deadline=None)
@given(st.data(), st.lists(st.integers(1, 5), min_size=1, max_size=4))
def test_boxes_are_the_range_in_order(data: st.DataObject, shape: list[int]) -> None:
    total = math.prod(shape)
    start = data.draw(st.integers(0, total))
    stop = data.draw(st.integers(start, total))
    values = torch.arange(total).view(shape)
    found = boxes(tuple(shape), start, stop)
    got = [values[tuple(slice(o, o + n) for o, n in zip(b.offset, b.sizes, strict=True))].flatten() for b in found]
    assert torch.equal(torch.cat([torch.arange(0), *got]), torch.arange(start, stop))
    assert [b.start for b in found] == [int(g[0]) - start for g in got]
    assert len(found) <= 2 * len(shape) - 1


@pytest.mark.parametrize("tp_dim", [None, 0, 1])
@pytest.mark.parametrize("shape", [(6, 10), (12, 4, 3)])
def test_written_in_one_partition_and_read_in_another(
    tmp_path: Path, tp_dim: int | None, shape: tuple[int, ...]
) -> None:
    """Four writers (tp 2 × dp 2, uneven partitions), then one reader of the whole, then three flat readers."""
    truth = torch.arange(math.prod(shape), dtype=torch.float32).view(shape)

    def shards(tp_size: int, cuts: list[int], source: torch.Tensor) -> dict[str, FlatShard]:
        part = Slice(tp_dim, "full", torch.Size(shape))
        found = {}
        for rank in range(tp_size):
            mesh: Any = SimpleNamespace(tp_rank=rank, tp_size=tp_size)
            mine = source[part.of(rank, tp_size)].flatten().clone()
            limits = [min(cut, mine.numel()) for cut in cuts] + [mine.numel()]
            for number, (low, high) in enumerate(itertools.pairwise(limits)):
                found[f"{rank} {number}"] = FlatShard.of(mine[low:high], low, part, mesh)
        return found

    written = shards(2, [0, 7], truth)
    # One process writes for all: each shard's items under the one name.
    planner = _Many("x", written)
    dcp.save({"x": next(iter(written.values()))}, checkpoint_id=tmp_path / "c", planner=planner, no_dist=True)
    whole = {"x": torch.zeros(shape)}
    dcp.load(whole, checkpoint_id=tmp_path / "c", no_dist=True)
    assert torch.equal(whole["x"], truth)
    for shard in shards(1, [0, 1, 11], torch.zeros(shape)).values():
        dcp.load({"x": shard}, checkpoint_id=tmp_path / "c", no_dist=True)
        assert sum(math.prod(box.sizes) for box in shard.offsets.values()) == shard.numel() > 0
        for offset, box in shard.offsets.items():
            want = truth[tuple(slice(o, o + n) for o, n in zip(offset, box.sizes, strict=True))]
            assert torch.equal(shard.__get_tensor_shard__(SimpleNamespace(offset=offset)), want)  # type: ignore


class _Many(dcp.DefaultSavePlanner):
    """Plans the shards of several ranks at once."""

    def __init__(self, name: str, shards: dict[str, FlatShard]) -> None:
        super().__init__()
        self._name, self._shards = name, shards

    def create_local_plan(self) -> dcp.SavePlan:
        items = {i.index.offset: i for s in self._shards.values() for i in s.__create_write_items__(self._name, s)}
        self.plan = dcp.SavePlan(list(items.values()), planner_data=self.mappings)
        return self.plan

    def lookup_object(self, index: Any) -> torch.Tensor:
        (shard, *_) = (s for s in self._shards.values() if tuple(index.offset) in s.offsets)
        return shard.__get_tensor_shard__(index)
