"""Reads checkpoints into an engine of any layout, or into a plain model."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch.distributed.checkpoint as dcp

from data_pipeline.tokenizer import Tokenizer
from sisa_dist.checkpoint.folder import find_checkpoint
from sisa_dist.checkpoint.state import TrainState, read_state
from sisa_dist.config import UserError, load_config
from sisa_dist.engine import Engine
from sisa_dist.model import LM, build_model


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
