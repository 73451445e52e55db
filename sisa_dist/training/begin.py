"""Where a run begins: at its own newest whole checkpoint, at another's (start.resume, start.weights), or at step 0."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

from data_pipeline.loader import Loader
from data_pipeline.tokenizer import Tokenizer
from sisa_dist.checkpoint import (
    Damaged,
    TrainState,
    find_checkpoint,
    list_checkpoints,
    load_checkpoint,
    load_weights,
    read_state,
)
from sisa_dist.checkpoint.folder import set_aside, step_of
from sisa_dist.config import Run, RunStage, UserError
from sisa_dist.engine import Engine
from sisa_dist.parallel.mesh import Mesh
from sisa_dist.training.run_folder import refuse_changes
from sisa_dist.training.stages import EarlierStage

_log = logging.getLogger(__name__)


def begin(
    run: Run,
    stage: RunStage,
    run_folder: Path,
    engine: Engine,
    *,
    tokenizer: Tokenizer,
    loader: Loader,
    mesh: Mesh,
    accept_changes: bool = False,
) -> TrainState:
    """Loads what `stage` begins from or goes on from into `engine`, and sets `loader` to its stage. Collective.

    A damaged checkpoint of the run's own is set aside and the one before it taken: training again what lay between
    gives the same bits. Raises UserError where none is whole, or one belongs to another model, tokenizer or data, or,
    unless `accept_changes`, where start.resume would not go on as that run did; EarlierStage where the one before is
    of a stage before.
    """
    state = _load(run, stage, run_folder, engine, tokenizer, loader, mesh, accept_changes)
    loader.begin(state.stage)
    return state


def _load(
    run: Run,
    stage: RunStage,
    run_folder: Path,
    engine: Engine,
    tokenizer: Tokenizer,
    loader: Loader,
    mesh: Mesh,
    accept_changes: bool,
) -> TrainState:
    config = stage.config

    def resume(checkpoint: Path, step: int) -> TrainState:
        begins = stage.number > 1 and step == stage.first_step
        state = load_checkpoint(
            checkpoint,
            engine,
            model=config.model,
            tokenizer=tokenizer,
            loader=loader,
            mesh=mesh,
            new_stage=begins or config.start.data == "continue",
            moments=not begins or stage.moments == "keep",
        )
        # What was due there is of the stage before.
        return replace(state, evaluation_due=False) if begins else state

    own = list_checkpoints(run_folder)
    for checkpoint in reversed(own):
        if step_of(checkpoint) < stage.first_step:
            raise EarlierStage
        try:
            return resume(checkpoint, step_of(checkpoint))
        except Damaged as damage:
            if mesh.is_main:
                _log.warning("%s; set aside as %s, trying the one before", damage, set_aside(checkpoint).name)
            mesh.barrier()
    if own:
        raise UserError(
            f"{run_folder / 'checkpoints'}: none of {len(own)} checkpoints is whole: restore one, or run again to "
            "begin anew (the damaged ones are kept beside)"
        )
    if config.start.resume is not None:
        source = find_checkpoint(config.start.resume)
        step = read_state(source).step
        if not accept_changes:
            done = run.stage_of(max(0, step - 1)).config  # by which the steps behind it were to be done
            refuse_changes(source / "config.yaml", done, new_stage=config.start.data == "continue")
        state = resume(source, step)
        _log.info("resumes %s at step %d", source, state.step)
        return state
    if config.start.weights is not None:
        source = find_checkpoint(config.start.weights)
        load_weights(source, engine, model=config.model, tokenizer=tokenizer, mesh=mesh, anew=True)
        _log.info("begins at step 0 with the weights of %s", source)
    return TrainState(0, 0, 0, 0.0, loader.fingerprint)
