"""A checkpoint of learned d_s made into one of fixed d_s, layer by layer, that computes the same.

    python tools/materialize_ds.py runs/mine smaller
    python tools/materialize_ds.py runs/mine as_large --to-mlp
    python tools/materialize_ds.py runs/mine --dry-run

SRC is a run folder or a checkpoint; DST must not exist. A run goes on from it by start.weights=DST, with the model of
DST/config.yaml. Exit code 0: written and its logits compared; 2: nothing written.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from sisa_dist.config import UserError
from sisa_dist.convert.command import run
from sisa_dist.convert.conversion import convert, plan
from sisa_dist.convert.materialise import kept_pairs

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command(help=__doc__)
def command(
    source: Annotated[Path, typer.Argument(metavar="SRC", help="A run folder or a checkpoint.")],
    destination: Annotated[Path | None, typer.Argument(metavar="DST", help="The folder to make.")] = None,
    to_mlp: Annotated[
        bool, typer.Option("--to-mlp", help="Widen the MLPs by as many parameters as are saved.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would stay; write nothing.")] = False,
) -> None:
    if dry_run and destination is not None:
        raise UserError("--dry-run makes no folder: leave DST out, or --dry-run")
    planned = plan(source, to="native", materialise="to_mlp" if to_mlp else "cut")
    old, new = planned.before.model, planned.intended.model
    for layer, kept in kept_pairs(old, planned.before.source).items():
        print(f"layer {layer}: {kept.open} of {old.layer_d_s[layer]} channels are open: d_s {kept.d_s}")
    print(f"mean d_s {sum(new.layer_d_s) / sum(d_s > 0 for d_s in old.layer_d_s):g}, d_ff {old.d_ff} → {new.d_ff}")
    if dry_run:
        return
    if destination is None:
        raise UserError("DST is missing: name the folder to make, or give --dry-run")
    for line in convert(planned, destination):
        print(f"checked: {line}")
    print(f"done: {destination}")


def main(argv: list[str] | None = None) -> int:
    return run(app, argv, name="materialize_ds")


if __name__ == "__main__":
    sys.exit(main())
