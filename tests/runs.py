"""Reading what a run left behind, for tests that compare runs to the bit."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from sisa_dist.training.metrics_file import read_metrics

QUICKSTART = Path(__file__).parents[1] / "configs" / "quickstart.yaml"


def losses(run: Path) -> list[tuple[int, float, float, str]]:
    """(step, loss, gradient norm, digest of the samples) of every step."""
    return [(r["step"], r["loss"], r["grad_norm"], r["digest"]) for r in read_metrics(run)["train"]]


def tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, whole."""
    reader = dcp.FileSystemReader(checkpoint)
    found = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in reader.read_metadata().state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    dcp.load(found, storage_reader=reader, no_dist=True)
    return found


def assert_same_tensors(a: Path, b: Path) -> None:
    first, second = tensors(a), tensors(b)
    assert first.keys() == second.keys() and len(first) > 60
    assert [name for name in first if not torch.equal(first[name], second[name])] == []
