"""Checkpoints from and to other formats, a tensor at a time, checked before they get their name.

    python tools/convert_checkpoint.py runs/mine model.safetensors --to safetensors --moments
    python tools/convert_checkpoint.py runs/mine exported --to hf --dtype bf16
    python tools/convert_checkpoint.py llama-folder imported --to native --dry-run
    python tools/convert_checkpoint.py llama-folder begun --to native --upcycle 32
    python tools/convert_checkpoint.py runs/mine mixture --to native --upcycle-moe 8,2

What SRC is, is seen from what lies there. DST must not exist. Exit code 0: written and verified; 2: nothing written.
"""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from data_pipeline.tokenizer import Tokenizer
from sisa_dist.config import UserError, load_config
from sisa_dist.convert.command import run
from sisa_dist.convert.conversion import Plan, check_destination, convert, plan
from sisa_dist.convert.opened import Target

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command(help=__doc__)
def command(
    source: Annotated[Path, typer.Argument(metavar="SRC", help="A checkpoint, run folder, file or folder.")],
    destination: Annotated[Path, typer.Argument(metavar="DST", help="The file or folder to make.")],
    to: Annotated[str, typer.Option(metavar="FORMAT", help="native, safetensors, hf or deepspeed.")],
    from_format: Annotated[str | None, typer.Option("--from", metavar="FORMAT", help="Of SRC; seen by itself.")] = None,
    dtype: Annotated[Literal["fp32", "bf16"], typer.Option(help="Of matrices; gains and decays stay fp32.")] = "fp32",
    moments: Annotated[
        bool | None, typer.Option(help="Adam's moments too; by default where the format is for training on.")
    ] = None,
    model_type: Annotated[str | None, typer.Option(help="hf: the architecture to write, e.g. llama.")] = None,
    upcycle: Annotated[
        str | None,
        typer.Option(metavar="D_S", help="Make a Transformer a SISA model that computes the same: 32, or 32,0,16,…"),
    ] = None,
    upcycle_moe: Annotated[
        str | None,
        typer.Option(metavar="E,K", help="Make every MLP a mixture of E copies of it, K for each token."),
    ] = None,
    shard_gb: Annotated[float | None, typer.Option(min=0.001, help="hf: most a file holds; default 5.")] = None,
    tokenizer: Annotated[Path | None, typer.Option(help="tokenizer.model or tokenizer.json to go with it.")] = None,
    config: Annotated[Path | None, typer.Option(help="The run's YAML, for a DeepSpeed SRC without it.")] = None,
    zero_stage: Annotated[
        int | None, typer.Option(min=0, max=3, help="deepspeed: of the run it is for; default 1.")
    ] = None,
    dp: Annotated[int | None, typer.Option(min=1, help="deepspeed: data-parallel ranks of it; default 1.")] = None,
    tp: Annotated[int | None, typer.Option(min=1, help="deepspeed: tensor-parallel ranks of it; default 1.")] = None,
    verify: Annotated[
        Literal["auto", "blocks", "full"],
        typer.Option(help="full: transformers runs the whole model too; auto: where it fits into half the memory."),
    ] = "auto",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be made; read headers only.")] = False,
) -> None:
    for name, value, format in (
        ("--model-type", model_type, "hf"),
        ("--shard-gb", shard_gb, "hf"),
        ("--zero-stage", zero_stage, "deepspeed"),
        ("--dp", dp, "deepspeed"),
        ("--tp", tp, "deepspeed"),
    ):
        if value is not None and to != format:
            raise UserError(f"{name} has no effect on --to {to}: leave it out, or give --to {format}")
    target = Target(
        model_type=model_type,
        shard_bytes=int((shard_gb or 5.0) * 1e9),
        zero_stage=1 if zero_stage is None else zero_stage,
        dp=dp or 1,
        tp=tp or 1,
    )
    planned = plan(
        source,
        to=to,
        format=from_format,
        dtype=dtype,
        moments=moments,
        d_s=_channels(upcycle),
        experts=_experts(upcycle_moe),
        tokenizer=None if tokenizer is None else Tokenizer.load(tokenizer),
        config=None if config is None else load_config(config),
        target=target,
    )
    kind = planned.before.model_type or "this framework"
    print(f"{planned.before.path}: {planned.before.format}, a model of {kind} → {destination}: {to}")
    if to == "native" and not planned.intended.tokenizer_files:
        print("no tokenizer lies with it: evaluation and training will ask for one, --tokenizer FILE adds it")
    check_destination(planned, destination)
    if dry_run:
        _show(planned)
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that what is half done is removed
    with _bar() as bar:
        tasks = {phase: bar.add_task(phase, total=planned.bytes) for phase in ("write", "read back")}
        for line in convert(planned, destination, how=verify, tell=lambda phase, _, n: bar.advance(tasks[phase], n)):
            bar.console.print(f"checked: {line}", highlight=False, soft_wrap=True)
    print(f"done: {destination}")


def _channels(text: str | None) -> int | list[int] | None:
    try:
        found = None if text is None else [int(number) for number in text.split(",")]
    except ValueError:
        raise UserError(f"--upcycle {text}: give d_s as a number, or one per layer with commas") from None
    return found[0] if found is not None and len(found) == 1 else found


def _experts(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    try:
        experts, top_k = (int(number) for number in text.split(","))
    except ValueError:
        raise UserError(f"--upcycle-moe {text}: give two numbers, experts and experts a token, as in 8,2") from None
    return experts, top_k


def _show(planned: Plan) -> None:
    rows = list(planned.rows())
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    for name, shape, dtype, made_from in rows:
        print(f"{name:{widths[0]}}  {shape:{widths[1]}}  {dtype:{widths[2]}}  ← {made_from}")
    numbers = sum(spec.numel() for spec in planned.made.specs.values())
    print(f"{len(rows)} tensors, {numbers:,} numbers, {planned.bytes / 1e9:.3f} GB; nothing was written (--dry-run)")


def _bar() -> Progress:
    columns = (TextColumn("{task.description:9}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    console = Console()
    # In a log file a bar is noise.
    return Progress(*columns, TimeRemainingColumn(), console=console, transient=True, disable=not console.is_terminal)


def main(argv: list[str] | None = None) -> int:
    return run(app, argv, name="convert_checkpoint")


if __name__ == "__main__":
    sys.exit(main())
