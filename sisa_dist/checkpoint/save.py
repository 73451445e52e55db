"""Writes checkpoints: beside the old one, whole, then renamed."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import torch.distributed.checkpoint as dcp

from sisa_dist.checkpoint.folder import list_checkpoints, step_name
from sisa_dist.checkpoint.state import TrainState
from sisa_dist.config import RunConfig, dump_config
from sisa_dist.engine import Engine
from sisa_dist.parallel.mesh import Mesh


def save_checkpoint(
    run_folder: Path, engine: Engine, state: TrainState, *, config: RunConfig, tokenizer: Path, mesh: Mesh
) -> Path:
    """Write the checkpoint of `state` and drop all but the newest training.keep_last. Collective."""
    mesh.enter("checkpoint")
    state = replace(state, guard=engine.guard.state())
    folder = run_folder / "checkpoints"
    final = folder / step_name(state.step)
    staging = folder / f".{step_name(state.step)}.tmp"
    if mesh.is_main:
        folder.mkdir(parents=True, exist_ok=True)
        for stale in (*folder.glob(".step_*.tmp"), *folder.glob(".step_*.old")):
            if stale.is_dir():
                shutil.rmtree(stale)
        staging.mkdir()
    mesh.barrier()
    dcp.save(engine.state_tensors(), checkpoint_id=staging)
    if mesh.is_main:
        (staging / "config.yaml").write_text(dump_config(config), encoding="utf-8")
        shutil.copyfile(tokenizer, staging / "tokenizer.model")
        (staging / "state.json").write_text(json.dumps(asdict(state), indent=1), encoding="utf-8")
        for file in staging.iterdir():
            _fsync(file)
        _fsync(staging)
        staging.rename(final)
        _fsync(folder)
        for old in list_checkpoints(run_folder)[: -config.training.keep_last]:
            # Renamed first: a kill half-way through a removal must not leave something that looks whole.
            shutil.rmtree(old.rename(folder / f".{old.name}.old"))
    mesh.barrier()
    return final


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
