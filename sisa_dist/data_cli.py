"""`sisa data …`: looking at prepared data, checking it, putting it together. Thin calls; imports are late."""

from __future__ import annotations

import json
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


@app.command()
def show(
    place: Annotated[str, typer.Argument(help="A prepared folder or its URL; with --step a run's YAML file.")],
    split: Annotated[str, typer.Option(help="train or validation.")] = "train",
    document: Annotated[int | None, typer.Option(min=0, help="A document, as the split stores them.")] = None,
    member: Annotated[int | None, typer.Option(min=0, help="A member of the shards.")] = None,
    window: Annotated[int | None, typer.Option(min=0, help="Tokens N·T on, of the split as stored.")] = None,
    seq_len: Annotated[int | None, typer.Option(min=1, help="T of --window.")] = None,
    step: Annotated[int | None, typer.Option(min=1, help="What a run served in this step, in its own order.")] = None,
    slot: Annotated[int | None, typer.Option(min=0, help="One window of the step.")] = None,
    overrides: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="With --step.")] = None,
    ids: Annotated[bool, typer.Option("--ids", help="Ids and pieces in place of text.")] = False,
    tokens: Annotated[int, typer.Option(min=1, help="Most tokens of a document, member or window.")] = 4096,
) -> None:
    """Print text as the model is fed it, document by document, in colours on a terminal. Default: --document 0."""
    from rich.console import Console

    from data_pipeline.show import write_pieces

    chosen = {"--document": document, "--member": member, "--window": window, "--step": step}
    named = [name for name, value in chosen.items() if value is not None]
    if len(named) > 1:
        raise UserError(f"{' and '.join(named)}: name one of them")
    for name, given, needs in (
        ("--seq-len", seq_len is not None, "--window"),
        ("--slot", slot is not None, "--step"),
        ("--set", bool(overrides), "--step"),
    ):
        if given and named != [needs]:
            raise UserError(f"{name} has no effect without {needs}: add it, or leave {name} out")
    console = Console(highlight=False)
    if step is not None:
        from sisa_dist.config import load_run
        from sisa_dist.training.show_step import served_in

        shown = served_in(load_run(Path(place), overrides or ()), step)
        if slot is not None and slot >= len(shown.windows):
            raise UserError(f"--slot {slot}: the step has slots 0 to {len(shown.windows) - 1}")
        known = "as metrics.jsonl says" if shown.checked else "the run has no such step in metrics.jsonl yet"
        print(f"step {step}: {len(shown.windows)} windows, digest {shown.digest}, {known}")
        for number, each in enumerate(shown.windows):
            if slot in (None, number):
                print(f"\n{each.title}")
                write_pieces(each.pieces, shown.tokenizer, console, ids=ids, most=tokens)
        return
    from data_pipeline.places import data_place
    from data_pipeline.show import open_shown

    pieces, tokenizer = open_shown(
        data_place(place), split, document=document, member=member, window=window, seq_len=seq_len
    )
    write_pieces(pieces, tokenizer, console, ids=ids, most=tokens)


@app.command()
def merge(
    out: Annotated[Path, typer.Argument(help="The folder to make.")],
    inputs: Annotated[list[Path], typer.Argument(metavar="IN IN…", help="Prepared folders of one tokenizer.")],
    copy: Annotated[bool, typer.Option("--copy", help="Copy shards also where a hard link would do.")] = False,
) -> None:
    """Several prepared folders as one, by hard links (else copies) of their shards; the inputs stay as they are."""
    from data_pipeline.merge import merge as run

    print(f"data: {run(out, inputs, copy=copy)}")


@app.command()
def reindex(
    folder: Annotated[Path, typer.Argument(help="The folder to make; without SHARDS, one whose index is damaged.")],
    shards: Annotated[list[str] | None, typer.Argument(help="Token tars of others, folders of them, globs.")] = None,
    tokenizer: Annotated[
        Path | None, typer.Option(help="The tokenizer the ids were made with: .model, tokenizer.json or their folder.")
    ] = None,
    eos: Annotated[str | None, typer.Option(help="The token that ends a document, where a .json does not say.")] = None,
    validation: Annotated[list[str] | None, typer.Option(help="Shards that are held out. Repeatable.")] = None,
    key: Annotated[str | None, typer.Option(help="The extension with the ids, e.g. input_ids.npy.")] = None,
    dtype: Annotated[str | None, typer.Option(help="Of ids in .bin: uint16, uint32 or uint64.")] = None,
    documents: Annotated[
        str, typer.Option(help="eos: a document ends at each eos. sample: at the end of each sample, too.")
    ] = "eos",
    on_bad: Annotated[str, typer.Option(help="stop, or skip: leave out what cannot serve, and count it.")] = "stop",
    workers: Annotated[int | None, typer.Option(min=1, help="Threads; default: one a core.")] = None,
) -> None:
    """Index token tars that others wrote (.npy, .u16, .u32, .bin), so that they train as they are.

    Without SHARDS: write the index of our own shards again, where it is lost or damaged.
    """
    if not shards:
        if tokenizer or eos or validation or key or dtype or documents != "eos" or on_bad != "stop":
            raise UserError(f"{folder}: options but no SHARDS: name the tars to index")
        from data_pipeline.rebuild import rebuild

        rebuild(folder)
        return
    for name, value, known in (
        ("--dtype", dtype, ("uint16", "uint32", "uint64", None)),
        ("--documents", documents, ("eos", "sample")),
        ("--on-bad", on_bad, ("stop", "skip")),
    ):
        if value not in known:
            raise UserError(f"{name} {value}: set it to one of {', '.join(filter(None, known))}")
    if tokenizer is None:
        raise UserError("--tokenizer is missing: name the one the ids were made with, as no tar says it")
    from data_pipeline.reindex import reindex as run

    made = run(
        folder,
        shards,
        tokenizer=tokenizer,
        eos=eos,
        validation=validation or (),
        key=key,
        width=dtype,
        boundaries=documents,
        on_bad="skip" if on_bad == "skip" else "stop",
        workers=workers,
    )
    print(f"data: {made}")
