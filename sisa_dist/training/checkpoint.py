"""Checkpoints in PyTorch DCP: full parameter names → global tensors, whatever the world size.

A checkpoint is a folder `step_00000300` with the tensors, `config.yaml`, `tokenizer.model` and `state.json` (step,
data cursor and fingerprint). It is written as `.step_00000300.tmp` and renamed last, so a kill at any moment leaves
only whole ones; what a kill left behind is removed by the next save.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import warnings
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch.distributed.checkpoint as dcp

from data_pipeline.tokenizer import Tokenizer
from sisa_dist.config import RunConfig, UserError, dump_config, load_config
from sisa_dist.engine import Engine, StepResult
from sisa_dist.model import LM, build_model
from sisa_dist.parallel.mesh import Mesh

_NAME = re.compile(r"step_(\d{8,})")


@dataclass(frozen=True)
class TrainState:
    """Where a run stands, beside its tensors."""

    step: int  # steps done, skipped ones too
    cursor: int  # next window of the data order
    tokens: int  # labels seen, those of skipped steps too
    seconds: float  # of training, over all sittings
    fingerprint: str  # of the data order the cursor counts in
    skipped: int = 0  # steps that changed no weight
    skipped_in_row: int = 0  # of them, the last ones
    evaluation_due: bool = False  # the evaluation after this step was cut short by a request to stop
    guard: list[float] = field(default_factory=list)  # Guard.state(), as of a save

    def after(self, result: StepResult, *, cursor: int, seconds: float) -> TrainState:
        return replace(
            self,
            step=self.step + 1,
            cursor=cursor,
            tokens=self.tokens + result.tokens,
            seconds=self.seconds + seconds,
            skipped=self.skipped + result.skipped,
            skipped_in_row=self.skipped_in_row + 1 if result.skipped else 0,
            evaluation_due=False,
        )


def save_checkpoint(
    run_folder: Path, engine: Engine, state: TrainState, *, config: RunConfig, tokenizer: Path, mesh: Mesh
) -> Path:
    """Write the checkpoint of `state` and drop all but the newest training.keep_last. Collective."""
    mesh.enter("checkpoint")
    state = replace(state, guard=engine.guard.state())
    folder = run_folder / "checkpoints"
    final = folder / f"step_{state.step:08d}"
    staging = folder / f".step_{state.step:08d}.tmp"
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


def list_checkpoints(run_folder: Path) -> list[Path]:
    """Whole checkpoints of a run, oldest first."""
    folder = run_folder / "checkpoints"
    if not folder.is_dir():
        return []
    return sorted((p for p in folder.iterdir() if _NAME.fullmatch(p.name)), key=lambda p: int(p.name[5:]))


def find_checkpoint(path: str | Path) -> Path:
    """`path` itself if it is a checkpoint, else the newest one of the run folder `path`."""
    path = Path(path)
    if (path / "state.json").is_file():
        return path
    found = list_checkpoints(path)
    if not found:
        raise UserError(f"{path}: no checkpoint here; give a run folder or one of its checkpoints/step_… folders")
    return found[-1]


def run_folder_of(checkpoint: Path) -> Path:
    """The run folder a checkpoint lies in."""
    if checkpoint.parent.name != "checkpoints":  # named from inside: ".", or "step_00000300" alone
        checkpoint = checkpoint.resolve()
    return checkpoint.parent.parent


def read_state(checkpoint: Path) -> TrainState:
    try:
        return TrainState(**json.loads((checkpoint / "state.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{checkpoint}/state.json: cannot be read ({error}): use another checkpoint") from None


def load_checkpoint(checkpoint: Path, engine: Engine) -> TrainState:
    """Read weights and moments into `engine` in place. Collective. The model must be the checkpoint's."""
    state = read_state(checkpoint)
    _load(engine.state_tensors(), checkpoint, no_dist=False)
    engine.set_step(state.step - state.skipped)
    if state.guard:  # none before there was a guard
        engine.guard.load(state.guard)
    return state


def load_model(checkpoint_folder: str | Path) -> tuple[LM, Tokenizer]:
    """The model (fp32, CPU, evaluation mode) and tokenizer of a checkpoint, or of a run's newest one.

    Raises UserError where there is no whole checkpoint.
    """
    checkpoint = find_checkpoint(checkpoint_folder)
    config = load_config(checkpoint / "config.yaml")
    model = build_model(config.model, attention=config.attention)
    _load({f"model.{name}": p.detach() for name, p in model.named_parameters()}, checkpoint, no_dist=True)
    return model.eval(), Tokenizer.load(checkpoint / "tokenizer.model")


def _load(tensors: dict, checkpoint: Path, *, no_dist: bool) -> None:
    try:
        with warnings.catch_warnings():
            # no_dist is meant: a model is loaded without a process group.
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            dcp.load(tensors, checkpoint_id=checkpoint, no_dist=no_dist)
    except (dcp.api.CheckpointException, OSError, RuntimeError, ValueError) as error:
        reason = next((line for line in reversed(str(error).splitlines()) if line.strip()), type(error).__name__)
        raise UserError(f"{checkpoint}: cannot be loaded ({reason.strip()}): use another checkpoint") from error


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
