"""Reading a checkpoint: a stored part is read once, whatever is wanted of it, and never two are held."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from sisa_dist.checkpoint import read_tensors, write_checkpoint
from sisa_dist.config import ParallelConfig
from sisa_dist.parallel.apply import Slice
from sisa_dist.parallel.flat_shard import FlatShard
from sisa_dist.parallel.mesh import init_mesh


def test_a_stored_part_is_read_once_and_let_go_before_the_next(tmp_path: Path) -> None:
    stored = {f"model.{name}": torch.randn(4, 5) for name in "abc"}
    write_checkpoint(tmp_path / "step_00000001", stored, files={}, no_dist=True)
    mesh, part = init_mesh(ParallelConfig(), device="cpu"), Slice(None, "full", torch.Size((4, 5)))
    flat = {name: torch.zeros(14) for name in stored}
    wanted = {name: FlatShard.of(tensor, 3, part, mesh) for name, tensor in flat.items()}
    assert {len(shard.offsets) for shard in wanted.values()} == {3}  # two loose elements, two rows, two elements
    real, read, held = torch.load, [], []

    def load(*arguments: Any, **options: Any) -> torch.Tensor:
        held.append(sum(part() is not None for part in read))
        tensor = real(*arguments, **options)
        read.append(weakref.ref(tensor))
        return tensor

    with mock.patch.object(torch, "load", load):
        read_tensors(wanted, tmp_path / "step_00000001", no_dist=True)
    assert held == [0, 0, 0]
    for name, tensor in stored.items():
        assert torch.equal(flat[name], tensor.flatten()[3:17])
