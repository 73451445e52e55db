"""The two explicit loads, into an engine of any layout: everything (resume), or the weights alone (a new stage).

Files are checked against the manifest first, dealt out over the ranks, so that each is read once more in all.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor

from data_pipeline.loader import Loader
from data_pipeline.tokenizer import JSON, SENTENCEPIECE, Tokenizer
from sisa_dist.checkpoint.differences import carry_data, check_data, check_model, check_tokenizer
from sisa_dist.checkpoint.folder import find_checkpoint
from sisa_dist.checkpoint.manifest import check_files, read_manifest
from sisa_dist.checkpoint.staging import local_memory
from sisa_dist.checkpoint.state import TrainState, read_state
from sisa_dist.checkpoint.storage import SafeReader, holds_weights
from sisa_dist.checkpoint.write import reason
from sisa_dist.config import ModelConfig, UserError, load_config
from sisa_dist.engine import Engine
from sisa_dist.model import LM, build_model
from sisa_dist.parallel.mesh import Mesh

_MODEL = "model."
_log = logging.getLogger(__name__)


def load_checkpoint(
    checkpoint: Path,
    engine: Engine,
    *,
    model: ModelConfig,
    tokenizer: Tokenizer,
    loader: Loader,
    mesh: Mesh,
    new_stage: bool = False,
    moments: bool = True,
) -> TrainState:
    """Resume: weights, moments, Adam's step and the guard go into `engine`; returns where the run stood. Collective.

    Raises Damaged where a file is not what was written, UserError where the model, the tokenizer or the data is
    another's or there are no moments; nothing is then loaded. With `new_stage` the data may be served in another order
    than the checkpoint's: `loader`'s then begins, with what is unread (carry_data). Without `moments` the optimizer
    has no memory, and neither has the guard.
    """
    verify(checkpoint, mesh)
    changed = check_model(checkpoint, model)
    check_tokenizer(checkpoint, tokenizer)
    state = read_state(checkpoint)
    if state.weights_only:
        raise UserError(
            f"{checkpoint}: holds weights and no moments, so there is no run to resume: begin one from them by "
            f"start.weights={checkpoint}"
        )
    order = state.fingerprint
    if new_stage:
        state = carry_data(checkpoint, state, loader)
    else:
        check_data(checkpoint, loader.describe())
    tensors = engine.state_tensors()
    if not moments:
        state = state.without_moments()
        tensors = {name: tensor for name, tensor in tensors.items() if name.startswith(_MODEL)}
    read_tensors(tensors, checkpoint)
    engine.set_step(state.updates)
    # Of another order or function the losses are others, and the first of them would be taken for spikes.
    same = moments and not changed and state.fingerprint == order
    if same and state.guard:  # none before there was a guard
        engine.guard.load(state.guard)
    return state


def load_weights(
    checkpoint: Path, engine: Engine, *, model: ModelConfig, tokenizer: Tokenizer, mesh: Mesh, anew: bool = False
) -> None:
    """The weights go into `engine`, whose moments stay as they are. Collective. Raises as load_checkpoint does.

    `anew`: to be trained from step 0. Gates of a learned d_s then begin their schedule, unless they are hard already.
    """
    verify(checkpoint, mesh, weights_only=True)
    check_model(checkpoint, model)
    check_tokenizer(checkpoint, tokenizer)
    state = engine.state_tensors()
    read_tensors({name: tensor for name, tensor in state.items() if name.startswith(_MODEL)}, checkpoint)
    if anew and model.learned_d_s is not None:
        step, share = (local_memory(state[f"{_MODEL}gates.{name}"]) for name in ("step", "share"))
        step.zero_()
        if share.item() < model.learned_d_s.anneal_until:
            share.zero_()
        else:
            _log.info("gates of d_s are hard already and stay so; tools/materialize_ds.py leaves out what is closed")
    engine.set_step(0)


def load_model(checkpoint_folder: str | Path) -> tuple[LM, Tokenizer]:
    """The model (fp32, CPU, evaluation mode) and tokenizer of a checkpoint, or of a run's newest one.

    Raises UserError where there is no whole checkpoint.
    """
    checkpoint = find_checkpoint(checkpoint_folder)
    verify(checkpoint, weights_only=True)
    config = load_config(checkpoint / "config.yaml")
    tokenizer = load_tokenizer(checkpoint, max_vocab_size=config.model.vocab_size)
    model = build_model(config.model, attention=config.attention)
    read_tensors({_MODEL + name: x.detach() for name, x in model.state_dict().items()}, checkpoint, no_dist=True)
    return model.eval(), tokenizer


def load_tokenizer(checkpoint: Path, *, max_vocab_size: int | None = None) -> Tokenizer:
    """Raises UserError where there is none, models of other libraries may come without, or one of too many ids."""
    if not any(name in read_manifest(checkpoint) for name in (SENTENCEPIECE, JSON)):
        raise UserError(
            f"{checkpoint}: the checkpoint came without a tokenizer: python tools/convert_checkpoint.py {checkpoint} "
            "NEW --to native --tokenizer FILE makes one with it"
        )
    return Tokenizer.load(checkpoint, max_vocab_size=max_vocab_size)


def verify(checkpoint: Path, mesh: Mesh | None = None, *, weights_only: bool = False) -> None:
    """Raises Damaged, on every rank of `mesh`, where a file is not what the manifest says. Collective with a mesh."""
    rank, size = (0, 1) if mesh is None else (dist.get_rank(), mesh.world_size)
    complaint: UserError | None = None
    try:
        files = read_manifest(checkpoint)
        names = [name for name in files if holds_weights(name) or not weights_only]
        # By size, the largest first: the ranks then hash about equally much.
        names.sort(key=lambda name: -files[name].bytes)
        check_files(checkpoint, files, names[rank::size])
        SafeReader(checkpoint).read_metadata()  # where DCP meets a bad one, it prints a traceback for each rank
    except UserError as error:
        complaint = error
    if mesh is not None and size > 1:
        complaints: list[UserError | None] = [None] * size
        dist.all_gather_object(complaints, complaint)
        complaint = next((found for found in complaints if found is not None), None)
    if complaint is not None:
        raise complaint


def read_tensors(tensors: Mapping[str, Tensor], checkpoint: Path, *, no_dist: bool = False) -> None:
    """Fill `tensors` (plain, DTensor, FlatShard) in place. Collective unless `no_dist`. One stored part at a time."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # no_dist is meant
            dcp.load(dict(tensors), storage_reader=SafeReader(checkpoint), no_dist=no_dist)
    except dcp.api.CheckpointException as error:
        raise UserError(f"{checkpoint}: cannot be loaded ({reason(error)}): use another checkpoint") from error
