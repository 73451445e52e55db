"""How two checkpoints differ, tensor by tensor, whatever their formats: weights, and moments where both have them.

    python tools/compare_checkpoints.py runs/a runs/b
    python tools/compare_checkpoints.py runs/a exported --atol 1e-6

Exit code 0: equal, or within --atol; 1: different; 2: one of them cannot be read.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from sisa_dist.convert.command import run
from sisa_dist.convert.compare import Difference, compare, config_differences, left_over, open_side

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command(help=__doc__)
def command(
    first: Annotated[Path, typer.Argument(metavar="A", help="A checkpoint of any format.")],
    second: Annotated[Path, typer.Argument(metavar="B", help="Another.")],
    atol: Annotated[float, typer.Option(min=0.0, help="Largest absolute difference that counts as equal.")] = 0.0,
    show_all: Annotated[bool, typer.Option("--all", help="List equal tensors too.")] = False,
) -> None:
    a, b = open_side(first), open_side(second)
    different = False
    for line in config_differences(a, b):
        print(f"config      {line}")
        different = True
    for path, names in zip((a.path, b.path), left_over(a, b), strict=True):
        for name in names:
            print(f"only in {path}: {name}")
        different |= bool(names)
    compared = unequal = numbers = 0
    worst = Difference("none")
    for found in compare(a, b):
        compared += 1
        if isinstance(found, str):
            print(found)
            unequal, different = unequal + 1, True
            continue
        numbers += found.numbers
        outside = not found.max_abs <= atol
        unequal, different = unequal + outside, different or outside
        worst = max(worst, found, key=lambda difference: difference.max_abs)
        if found.unequal or show_all:
            print(
                f"{found.name}: abs max {found.max_abs:.3g} mean {found.mean_abs:.3g}, rel max {found.max_rel:.3g} "
                f"mean {found.mean_rel:.3g}, {found.unequal:,} of {found.numbers:,} numbers"
            )
    within = f" by more than {atol:g}" if atol else ""
    print(f"{compared} tensors, {numbers:,} numbers; {unequal} tensors differ{within}; the most: {worst.max_abs:.3g}")
    if different:
        raise typer.Exit(1)


def main(argv: list[str] | None = None) -> int:
    return run(app, argv, name="compare_checkpoints")


if __name__ == "__main__":
    sys.exit(main())
