"""Where a run of stages stands, whether its later ones can follow, and what each says before it starts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from sisa_dist.checkpoint import find_checkpoint, list_checkpoints, read_state
from sisa_dist.checkpoint.folder import step_of
from sisa_dist.config import Run, RunStage, UserError
from sisa_dist.evaluation.retrieval import Retrieval
from sisa_dist.parallel.plan import check_tp
from sisa_dist.training.evaluations import evaluation_due
from sisa_dist.training.run_data import check_limits, open_data, open_loader


class EarlierStage(Exception):
    """The checkpoints that ended the stage before are damaged: it has to be done again from an earlier one."""


def stage_to_train(run: Run, run_folder: Path) -> RunStage:
    """By the newest checkpoint of `run_folder`, or of start.resume; the last stage where all are done."""
    if not run.staged:
        return run.stages[0]
    own, resume = list_checkpoints(run_folder), run.stages[0].config.start.resume
    if own:
        newest, step = own[-1], step_of(own[-1])
    elif resume is not None:
        newest = find_checkpoint(resume)
        step = read_state(newest).step
    else:
        return run.stages[0]
    stage = run.stage_of(step)
    if own and stage.number > 1 and step == stage.first_step:
        try:
            due = evaluation_due(run_folder, read_state(newest))
        except UserError:
            due = False  # damaged, which loading it will say
        if due:  # with the settings of the stage it ends
            return run.stages[stage.number - 2]
    return stage


def check_stages(run: Run, *, first: RunStage, dp_size: int) -> None:
    """Raises UserError where a stage behind `first` could not begin: better now than when it is reached.

    dp_size: of this launch, which trains the stages that are like `first`. What they leave unread for one another is
    known only of a run that begins here; data.mixture's limits are checked again when a stage is reached.
    """
    before, begun, windows = None, None, 0
    whole = first.number == 1 and first.config.start.resume is None
    for stage in run.stages[first.number - 1 :]:
        try:
            check_tp(stage.config.model, stage.config.parallel.tp)
            if not run.staged:
                return
            data = open_data(stage.config)
            here = dp_size if stage.like(first) else 1
            loader = open_loader(stage.config, data, dp_size=stage.config.parallel.dp or here)
            asked = stage.config.evaluation.retrieval
            if asked is not None and asked.every is not None:
                Retrieval(asked, data.tokenizer, seed=stage.config.seed)
            if before is not None:
                begun = loader.stage.carry(before.describe(), begun, windows if whole else 0)
                loader.begin(begun)
            windows = (stage.end_step - stage.first_step) * stage.config.training.global_batch_windows
            if before is not None and whole:
                check_limits(stage.config, loader, windows=windows)
        except UserError as error:
            raise UserError(f"stage {stage.name}: {error}" if stage.name else str(error)) from None
        before = loader


def describe_stage(run: Run, stage: RunStage) -> str:
    """The stage in full: a line a key, those marked with * that differ from the stage before."""
    values = dict(_leaves(stage.config.model_dump()))
    before = dict(_leaves(run.stages[stage.number - 2].config.model_dump())) if stage.number > 1 else values
    kept = "" if stage.number == 1 else f", moments {'kept' if stage.moments == 'keep' else 'made anew'}"
    lines = [f"{title(run, stage)}{kept}"]
    for key in [*values, *(key for key in before if key not in values)]:
        was, value = before.get(key), values.get(key)
        lines.append(f"  {key}: {value}" if was == value else f"* {key}: {value}  (was {was})")
    return "\n".join(lines)


def title(run: Run, stage: RunStage) -> str:
    return f"stage {stage.name} ({stage.number} of {len(run.stages)}): steps {stage.first_step + 1} to {stage.end_step}"


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value
