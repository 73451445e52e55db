"""The run folder and the promise that one folder holds one run: a changed config does not continue it unseen."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from data_pipeline.building import locked
from sisa_dist.config import Run, RunConfig, UserError, load_config, load_run, replace_file
from sisa_dist.parallel.mesh import Mesh

# Keys that change speed, layout or reporting but not the result may differ between sittings of one run.
_FREE = (
    "name",
    "output_dir",
    "device",
    "attention",
    "parallel",
    "engine.kind",
    "engine.zero_stage",
    "engine.deepspeed_config",
    "engine.activation_checkpointing",
    "engine.activation_offload",
    "engine.mlp_chunk",
    "engine.compile",
    "engine.reshard_after_forward",
    "engine.cpu_offload",
    "engine.prefetch",
    "engine.overlap",
    "engine.check_every",
    "data.folder",
    "data.on_missing",
    "data.cache_folder",
    "data.cache_gb",
    "data.retries",
    "data.timeout",
    "data.connections",
    "data.input",
    "data.workers",
    "data.prefetch",
    "data.read_threads",
    "training.micro_batch_size",
    "training.eval_every",
    "training.eval_windows",
    "training.checkpoint_every",
    "training.keep_last",
    "training.keep_every",
    "training.async_save",
    "training.save_staging_gb",
    "training.max_skipped_steps",
    "training.timeout_minutes",
    "training.profile",
    "start",
    "evaluation",
    "logging",
)

# Keys that begin a new stage where start.data is `continue`.
_OF_A_STAGE = ("data", "schedule", "training.global_batch_tokens", "training.seq_len", "training.steps")
_FREE_SOURCE = re.compile(r"data\.mixture\.[^.]*\.(folder|max_epochs)")


@contextmanager
def own_run_folder(folder: Path, mesh: Mesh) -> Iterator[None]:
    """Makes `folder` and keeps other launches out of it: two would remove each other's half-written checkpoints.

    Only the main rank makes and locks it. Where it may not, the others are left waiting at their next collective until
    the launcher ends them.
    """
    if not mesh.is_main:
        yield
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"output_dir {folder}: cannot be made ({error.strerror}): name another output_dir") from None
    busy = f"{folder}: another process is training in this run folder: wait for it, or set another output_dir"
    with locked(folder / ".lock", busy):
        yield


def open_run_folder(folder: Path, run: Run, mesh: Mesh, *, resumes: bool, accept_changes: bool = False) -> None:
    """Store the run as config.yaml in `folder`; when it resumes, compare with the stored one first."""
    stored = folder / "config.yaml"
    if resumes and stored.is_file() and not accept_changes:
        _refuse_other_run(stored, run)
    if mesh.is_main:
        replace_file(stored, run.text)
    mesh.barrier()


def _refuse_other_run(stored: Path, run: Run) -> None:
    """Stages are compared one by one, in what each does."""
    old = load_run(stored)
    differs: tuple[str, Any, Any] | None = None
    for before, after in zip(old.stages, run.stages, strict=False):
        at = f"stages.{after.name}." if run.staged else ""
        differs = _first_difference(before.config.model_dump(), after.config.model_dump(), _FREE, at)
        if differs is None and before.moments != after.moments:
            differs = (f"{at}moments", before.moments, after.moments)
        if before.name != after.name or differs:
            break
    names, wanted = [stage.name for stage in old.stages], [stage.name for stage in run.stages]
    if names != wanted:
        differs = ("stages", names, wanted)
    if differs is not None:
        raise _changed(stored, *differs, remedy="set another output_dir to start anew")


def keys_that_count(config: RunConfig) -> dict[str, Any]:
    """The dotted keys that alter the result, those that may not change between sittings of a run, and their values."""
    found: dict[str, Any] = {}

    def walk(tree: dict[str, Any], prefix: str) -> None:
        for key, value in tree.items():
            dotted = prefix + key
            if dotted in _FREE or _FREE_SOURCE.fullmatch(dotted):
                continue
            if isinstance(value, dict):
                walk(value, dotted + ".")
            else:
                found[dotted] = value

    walk(config.model_dump(), "")
    return found


def refuse_changes(source: Path, config: RunConfig, *, new_stage: bool) -> None:
    """Raises UserError where `config` would not go on as the run did whose checkpoint wrote config.yaml `source`.

    `new_stage`: whether it may go on as a new stage of the data.
    """
    free, remedy = (*_FREE, *_OF_A_STAGE) if new_stage else _FREE, "set it as it was there"
    differs = _first_difference(load_config(source).model_dump(), config.model_dump(), free)
    if differs is not None:
        if not new_stage and differs[0].startswith(_OF_A_STAGE):
            remedy += ", begin a new stage of the data by start.data=continue"
        raise _changed(source, *differs, remedy=remedy)


def _changed(stored: Path, key: str, old: Any, new: Any, *, remedy: str) -> UserError:
    return UserError(
        f"{stored.parent}: this run was started with {key}={old!r}, the config now says {new!r}: {remedy}, or "
        "continue with the change by --accept-changes"
    )


def _first_difference(
    old: dict[str, Any], new: dict[str, Any], free: Collection[str], at: str = "", prefix: str = ""
) -> tuple[str, Any, Any] | None:
    """(dotted key behind `at`, old value, new value)."""
    for key in sorted(old.keys() | new.keys()):
        dotted = prefix + key
        if dotted in free or _FREE_SOURCE.fullmatch(dotted) or old.get(key) == new.get(key):
            continue
        if isinstance(old.get(key), dict) and isinstance(new.get(key), dict):
            inner = _first_difference(old[key], new[key], free, at, dotted + ".")
            if inner is not None:
                return inner
            continue
        return at + dotted, old.get(key), new.get(key)
    return None
