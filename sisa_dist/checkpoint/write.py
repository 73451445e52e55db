"""One checkpoint folder, written whole or not at all: beside its place, synced to the disk, hashed, renamed last."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor

from sisa_dist.checkpoint.manifest import FileEntry, hash_file, write_manifest
from sisa_dist.checkpoint.storage import METADATA, HashingWriter
from sisa_dist.config import UserError, sync


def write_checkpoint(
    final: Path,
    tensors: Mapping[str, Tensor],
    *,
    files: Mapping[str, bytes],
    process_group: dist.ProcessGroup | None = None,
    no_dist: bool = False,
    begin: Callable[[], None] = lambda: None,
) -> None:
    """Writes `tensors` (plain, DTensor or FlatShard: this rank's parts) and the small `files` into the folder `final`.

    Collective over `process_group` unless `no_dist`. `files` count on the coordinator (rank 0) alone, and `begin` runs
    there alone, before anything is written. Until the last rename there is only `.NAME.tmp` beside `final`; a failure
    removes it and raises UserError with the reason, on every rank.
    """
    staging = final.with_name(f".{final.name}.tmp")

    def finish(written: Mapping[str, FileEntry]) -> None:
        entries = dict(written)
        for name, content in files.items():
            (staging / name).write_bytes(content)
        for name in (METADATA, *files):
            sync(staging / name)
            entries[name] = hash_file(staging / name)
        write_manifest(staging, entries)
        for path in staging.glob("manifest*"):
            sync(path)
        sync(staging)
        if final.exists():
            remove(final)
        staging.rename(final)
        sync(final.parent)

    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # no_dist is meant
            dcp.save(
                dict(tensors),
                storage_writer=HashingWriter(staging, begin=begin, finish=finish),
                process_group=process_group,
                no_dist=no_dist,
            )
    except dcp.api.CheckpointException as error:
        if no_dist or dist.get_rank(process_group) == 0:
            shutil.rmtree(staging, ignore_errors=True)
        source = next((e for e, _ in error.failures.values() if isinstance(e, UserError)), None)
        if source is not None:  # what is to be written could not be read
            raise source from error
        raise UserError(f"{final}: cannot be written ({reason(error)}): make room or mend the folder") from error


def remove(checkpoint: Path) -> None:
    """Renamed first: a kill half-way through a removal must not leave something that looks whole."""
    old = checkpoint.with_name(f".{checkpoint.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    shutil.rmtree(checkpoint.rename(old))


def reason(error: dcp.api.CheckpointException) -> str:
    """What went wrong first, in one line: DCP wraps the errors of all ranks with their tracebacks."""
    rank, (first, _) = min(error.failures.items())
    if isinstance(first, OSError) and first.strerror:
        where = f" {first.filename}" if first.filename else ""
        text = f"{first.strerror}{where}"
    else:
        lines = [line.strip() for line in str(first).splitlines() if line.strip()]
        text = lines[0] if lines else type(first).__name__
    return text if len(error.failures) < 2 or not rank else f"rank {rank}: {text}"
