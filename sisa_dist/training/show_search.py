"""What `sisa estimate --search` prints: the layouts that were found, and how to set them."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.table import Table

from sisa_dist.config import RunConfig, RunStage
from sisa_dist.training.changes import arguments, differences
from sisa_dist.training.cost import cost_of
from sisa_dist.training.devices import Device
from sisa_dist.training.search import Search, describe_layout, search_layouts

A_BOUND = (
    "The time is what the ceilings leave, operator by operator: launches, latencies and what kernels stay below them "
    "come on top; fused kernels and caches spare some of it."
)


def print_search(
    stage: RunStage,
    device: Device,
    *,
    gpus: int,
    price: float | None = None,
    as_json: bool = False,
    to_set: Callable[[Mapping[str, Any]], str] = arguments,
) -> None:
    """Layouts as a table, or as one JSON object. `to_set`: how settings are told to be set."""
    with progress_line(f"layouts for {gpus} {device.name}") as progress:
        found = search_layouts(stage.config, device, gpus=gpus, progress=progress)
    rows = []
    for other in found.found:
        cost = cost_of(stage, other.bound, ranks=gpus, price_per_hour=price)
        rows.append((other, cost, differences(stage.config, other.config)))
    if as_json:
        proposals = [
            {"settings": settings, "peak": other.peak, "roofline": other.bound.numbers()}
            | {"cost": dataclasses.asdict(cost)}
            for other, cost, settings in rows
        ]
        counts = {name: getattr(found, name) for name in ("refused", "too_large", "estimated", "left")}
        print(json.dumps({"device": dataclasses.asdict(device), "proposals": proposals} | counts, indent=1))
        return
    console = Console(highlight=False)
    console.print(_search_heading(stage.config, found, device, gpus), soft_wrap=True)
    if not rows:
        return
    columns = ["", "layout", "micro-batch", "peak GiB", "step s", "MFU", "tokens/day"]
    table = Table(*columns, *(["price"] if price is not None else []))
    for number, (other, cost, _) in enumerate(rows, start=1):
        cells = [
            describe_layout(other.config),
            str(other.config.training.micro_batch_size),
            f"{other.peak / 2**30:.1f}",
        ]
        cells += [f"{other.bound.seconds:.4g}", f"{other.bound.mfu:.1%}", f"{other.bound.tokens_per_day:.3g}"]
        table.add_row(str(number), *cells, *([f"{cost.price:,.0f}"] if cost.price is not None else []))
    console.print(table)
    console.print(A_BOUND, soft_wrap=True)
    for number, (_, _, settings) in enumerate(rows, start=1):
        console.print(f"{number}: {to_set(settings)}", soft_wrap=True)


@contextmanager
def progress_line(title: str) -> Iterator[Callable[[str], None]]:
    """A line on stderr, of a terminal's alone."""
    console = Console(stderr=True, highlight=False)
    if not sys.stderr.isatty():
        yield lambda told: None
        return
    with console.status(title) as status:
        yield lambda told: status.update(f"{title}: {told}")


def _search_heading(config: RunConfig, found: Search, device: Device, gpus: int) -> str:
    tried = f"{found.estimated} estimated, {found.left} not tried, {found.too_large} too large at sight, "
    tried += f"{found.refused} refused by the config's rules"
    said = f"{config.name} on {gpus} {device.name}: {tried}"
    return said if found.found else f"{said}\nnone of them fits: take more devices, or a smaller model or seq_len"
