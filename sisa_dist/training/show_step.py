"""What a step of a run was fed, to look at: `sisa data show CONFIG --step K`. It reads the data, no weights.

The windows follow from the config and the place where the run's stage of data began. Where the run has written
metrics.jsonl, the digest of the step's samples that stands there is held against what is shown.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from data_pipeline.loader import Loader
from data_pipeline.show import Piece, run_pieces
from data_pipeline.tokenizer import Tokenizer
from sisa_dist.checkpoint import list_checkpoints, read_state
from sisa_dist.checkpoint.differences import carry_data
from sisa_dist.checkpoint.folder import step_of
from sisa_dist.config import Run, RunConfig, RunStage, UserError
from sisa_dist.training.metrics_file import read_metrics
from sisa_dist.training.run_data import open_data, open_loader


class ShownWindow(NamedTuple):
    title: str
    pieces: Iterator[Piece]


class ShownStep(NamedTuple):
    digest: str
    checked: bool  # against the run's metrics.jsonl
    windows: list[ShownWindow]
    tokenizer: Tokenizer


def served_in(run: Run, step: int) -> ShownStep:
    """The global batch of step `step`, counted from 1, in the order of its slots.

    Raises UserError where the run served other windows then, or that cannot be told.
    """
    if not 1 <= step <= run.stages[-1].end_step:
        raise UserError(f"--step {step}: the run has steps 1 to {run.stages[-1].end_step}")
    stage = run.stage_of(step - 1)
    config = stage.config
    data = open_data(config)
    loader = open_loader(config, data)
    cursor, begun = _place(stage, loader, step)
    loader.begin(begun)
    digest = loader.digest(cursor)
    said = _said(config, step)
    if said is not None and said != digest:
        raise UserError(
            f"--step {step}: {config.output_dir}/metrics.jsonl says that other samples were served (digest {said}, "
            f"{digest} by this config and data): name the config and data it was trained with"
        )
    windows = []
    for slot, place in enumerate(loader.window_ids(cursor)):
        source = loader.stage.sources[place.source]
        title = f"slot {slot}: {place.source}, epoch {place.epoch}, window {place.window}"
        windows.append(ShownWindow(title, run_pieces(source.index, source.runs(place))))
    return ShownStep(digest, said is not None, windows, data.tokenizer)


def _place(stage: RunStage, loader: Loader, step: int) -> tuple[int, dict[str, Any] | None]:
    """(cursor of `step`, where its stage of the data began), by the checkpoints that there are."""
    config, windows = stage.config, stage.config.training.global_batch_windows
    checkpoints = list_checkpoints(Path(config.output_dir))
    if config.start.data == "continue" and not checkpoints:
        raise UserError(
            f"--step {step}: the run goes on where another stopped, and has no checkpoint yet that says where that was"
        )
    for checkpoint in reversed(checkpoints):
        if not stage.first_step <= step_of(checkpoint) <= stage.end_step:
            continue
        state = read_state(checkpoint)
        if stage.number > 1 and state.step == stage.first_step:
            state = carry_data(checkpoint, state, loader)
        elif state.fingerprint != loader.fingerprint:
            continue
        cursor = state.cursor - (state.step - step + 1) * windows
        if cursor >= 0:
            return cursor, state.stage
        raise UserError(
            f"--step {step}: before the stage of data that {config.output_dir} is in: name the config of the run that "
            "stage followed"
        )
    if stage.number > 1:
        raise UserError(
            f"--step {step}: of stage {stage.name}, of which {config.output_dir} keeps no checkpoint that says where "
            "its data began"
        )
    return (step - 1) * windows, None


def _said(config: RunConfig, step: int) -> str | None:
    """The digest in metrics.jsonl; None where the run has not come so far."""
    if not (Path(config.output_dir) / "metrics.jsonl").is_file():
        return None
    records: list[dict[str, Any]] = read_metrics(config.output_dir).get("train", [])
    return next((record.get("digest") for record in records if record["step"] == step), None)
