"""`sisa data …`: looking at prepared data, checking it, putting it together. Thin calls; imports are late."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from sisa_dist.config import UserError

app = typer.Typer(help="Look into prepared data: info, verify, show, merge, reindex.", no_args_is_help=True)

Folder = Annotated[str, typer.Argument(help="A folder that `sisa prepare` or `sisa data` made, or its URL.")]


@app.command()
def info(
    folder: Folder, as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of lines.")] = False
) -> None:
    """Splits, shards, tokens, tokenizer, what prepare counted and removed, size and fingerprint. Reads no shard."""
    from data_pipeline.info import describe_folder, write_out
    from data_pipeline.places import data_place

    found = describe_folder(data_place(folder))
    print(json.dumps(found, indent=1, ensure_ascii=False) if as_json else write_out(found))


@app.command()
def verify(
    folder: Folder,
    workers: Annotated[int | None, typer.Option(min=1, help="Threads; default: one a core, 8 for a URL.")] = None,
) -> None:
    """Hold everything against what was written: one line for each bad member or file, and exit code 2 if there is any.

    All hashes of index and members, ids within the vocabulary, ends of documents, the tars around them, the tokenizer.
    """
    from rich.console import Console

    from data_pipeline.places import data_place
    from data_pipeline.progress import Meter
    from data_pipeline.verify import Verification

    found = Verification(data_place(folder), workers=workers)
    with Meter(Console(stderr=True, highlight=False), "verifying", total=found.total_bytes) as meter:
        for line in found.faults(meter.add):
            print(line, flush=True)
    done = found.checked
    looked_at = f"{done.members:,} members, {done.tokens:,} tokens in {done.shards:,} shards"
    if done.faults:
        raise UserError(
            f"{folder}: {done.faults:,} faults; looked at {looked_at}: restore what is named, or make it anew"
        )
    print(f"{folder}: all as it was written: {looked_at}")
