"""Reading what a run left behind, for tests that compare runs to the bit, and writing runs of stages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
import yaml
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from sisa_dist.config import Run, RunConfig, load_run
from sisa_dist.training.metrics_file import read_metrics

QUICKSTART = Path(__file__).parents[1] / "configs" / "quickstart.yaml"
Stages = list[dict[str, Any]]


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


def staged(config: RunConfig, folder: Path, stages: Stages, **sections: dict[str, Any]) -> Run:
    """As a user's file would say it; `sections` are laid over the run."""
    tree = config.model_dump(exclude_defaults=True)
    tree["output_dir"] = str(folder)
    for name, values in sections.items():
        tree[name] = tree.get(name, {}) | values
    for stage in stages:  # what stages say the run does not
        for name in ("training", "model", "schedule", "optimizer"):
            for key in stage.get(name, {}):
                if all(key in other.get(name, {}) for other in stages):
                    tree[name].pop(key, None)
    tree["training"].pop("steps")
    tree["stages"] = stages
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "run.yaml").write_text(yaml.safe_dump(tree), encoding="utf-8")
    return load_run(folder / "run.yaml")
