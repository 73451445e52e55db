"""What `sisa estimate` prints: a run's estimate, its time and price on a device, and advice."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from rich.console import Console
from rich.table import Table

from sisa_dist.config import Run, RunConfig, RunStage, UserError
from sisa_dist.config.stages import read_run_again
from sisa_dist.training.advice import Advice, advise
from sisa_dist.training.changes import arguments, assignments
from sisa_dist.training.cost import Cost, cost_of
from sisa_dist.training.devices import Device, device_named
from sisa_dist.training.estimate import INSIDE, Estimate, default_world, estimate
from sisa_dist.training.outlook import Outlook, outlook_of
from sisa_dist.training.roofline import Roofline, roofline
from sisa_dist.training.show_search import A_BOUND, print_search, progress_line
from sisa_dist.training.stages import title

_NOT_COUNTED = "Not counted: the CUDA context, an allocator's fragments, NCCL's buffers, workspaces inside kernels."


def estimate_run(
    run: Run,
    *,
    stage: str | None = None,
    world: int | None = None,
    device: str | None = None,
    price: float | None = None,
    search: bool = False,
    gpus: int | None = None,
    as_json: bool = False,
) -> None:
    """What the options of `sisa estimate` ask for. Raises UserError before anything is computed."""
    if as_json and run.staged and stage is None:
        raise UserError("--json is of one stage: name it by --stage")
    if device is None:
        for option, given in (("--price", price is not None), ("--search", search)):
            if given:
                raise UserError(f"{option} is of a device: name it by --device, for example h100")
    if search != (gpus is not None):
        raise UserError("--search and --gpus go together: give both, or neither")
    if search and world is not None:
        raise UserError("--world is of one layout, and --search has --gpus: remove --world")
    chosen = run.stages if stage is None else (run.named(stage),)
    for one in chosen:
        ranks = gpus or world or default_world(one.config)
        on = None if device is None else device_named(device, ranks=ranks)
        to_set = partial(_to_set, run, one) if run.staged else arguments
        if run.staged and not as_json:
            print(title(run, one))
        if search and on is not None and gpus is not None:
            print_search(one, on, gpus=gpus, price=price, as_json=as_json, to_set=to_set)
        else:
            print_estimate(one, world_size=world, device=on, price=price, as_json=as_json, to_set=to_set)


def _to_set(run: Run, stage: RunStage, settings: Mapping[str, Any]) -> str:
    """As `--set` arguments of a stage, where the run is read with them; else, to be written into the file: what the
    run says too, or a key that a stage inherits, cannot be set there."""
    prefix = f"stages.{stage.name}."
    try:
        read_run_again(run, [f"{prefix}{setting}" for setting in assignments(settings)])
    except UserError:
        return f"in stage {stage.name} of the file: " + ", ".join(assignments(settings, between=": "))
    return arguments(settings, prefix=prefix)


def print_estimate(
    stage: RunStage,
    *,
    world_size: int | None = None,
    device: Device | None = None,
    price: float | None = None,
    as_json: bool = False,
    to_set: Callable[[Mapping[str, Any]], str] = arguments,
) -> None:
    """As tables, or as one JSON object whose keys are `Estimate`'s, and with a device also device, roofline, cost and
    advice. `price`: of a device-hour. `to_set`: how settings are told to be set."""
    config = stage.config
    found = estimate(config, world_size=world_size)
    told = _told(found)
    console = Console(highlight=False, quiet=as_json)
    console.print(_heading(config, found), soft_wrap=True)
    console.print(_table(config, found))
    if found.traffic:
        console.print(_traffic_table(found))
    console.print(_NOT_COUNTED, soft_wrap=True)
    if device is not None:
        ranks = world_size or default_world(config)
        bound = roofline(config, found, device)
        cost = cost_of(stage, bound, ranks=ranks, price_per_hour=price)
        console.print(_time_table(bound, device))
        console.print(_of_the_run(bound, cost), soft_wrap=True)
        sys.stdout.flush()  # what is known stands before what takes longer
        now = outlook_of(config, found, device)
        with progress_line("settings that would help") as progress:
            helping = advise(now, device, world_size=ranks, progress=progress)
        console.print(_advice(now, found.host, device, [(a, to_set(a.settings)) for a in helping]), soft_wrap=True)
        told |= {"device": dataclasses.asdict(device), "roofline": bound.numbers(), "cost": dataclasses.asdict(cost)}
        told |= {"fits": now.fits, "advice": [dataclasses.asdict(advice) for advice in helping]}
    if as_json:
        print(json.dumps(told, indent=1))


def _told(found: Estimate) -> dict[str, Any]:
    """As JSON: also what is derived; of the many kinds of work the sums of each phase."""
    told = dataclasses.asdict(found) | {"states": found.states}
    told["traffic"] = [dataclasses.asdict(transfer) | {"sent": transfer.sent} for transfer in found.traffic]
    told["work"] = {}
    for work in found.work:
        phase = told["work"].setdefault(work.phase, {"flops": 0.0, "nbytes": 0})
        phase["flops"] += work.calls * work.flops
        phase["nbytes"] += work.calls * work.nbytes
    return told


def _time_table(bound: Roofline, device: Device) -> Table:
    told = f"{device.name}, measured" if device.measured else device.name
    table = Table(f"a step on {told}", "ms", "", title_justify="left")
    about = {
        "waited": "collectives that nothing runs beside",
        "exposed": f"what is left of {bound.overlapped * 1e3:.4g} ms of collectives behind forward and backward",
        "host": "copies to and from host memory",
    }
    for name, seconds in bound.parts.items():
        if seconds:
            table.add_row(name, f"{seconds * 1e3:.4g}", about.get(name, ""))
    table.add_section()
    table.add_row(
        "together", f"{bound.seconds * 1e3:.4g}", f"MFU {bound.mfu:.1%}, {bound.tokens_per_second:,.0f} tokens/s"
    )
    if device.measured:
        table.caption = device.measured
    return table


def _of_the_run(bound: Roofline, cost: Cost) -> str:
    told = f"{bound.tokens_per_day:.4g} tokens a day; {cost.steps:,} steps, {cost.tokens:.4g} tokens: "
    told += f"{cost.days:.4g} days, {cost.device_hours:,.4g} device-hours"
    return told + ("" if cost.price is None else f", price {cost.price:,.2f}") + "\n" + A_BOUND


def _advice(now: Outlook, host: int, device: Device, helping: Sequence[tuple[Advice, str]]) -> str:
    """`host`: bytes in host memory; with each advice, how to set it."""
    fits = now.fits
    heading = f"{'It fits' if fits else 'It does not fit'}: {now.peak / 2**30:.2f} of {device.memory / 2**30:.2f} GiB"
    if host and not device.is_host:
        heading += f", and {host / 2**30:.2f} GiB a rank in host memory, which is not checked"
    heading += "."
    if not helping:
        remedy = "leave it as it is" if fits else "take more devices, or --search several at once"
        return f"{heading} No single setting would help: {remedy}."
    if fits or any(advice.fits for advice, _ in helping):
        lines = [f"{heading} What would help most:"]
    else:
        lines = [f"{heading} No single setting makes it fit; these save most (--search tries several at once):"]
    for advice, settings in helping:
        speed = f"{abs(advice.faster):.1%} {'less' if advice.faster >= 0 else 'more'} time"
        memory = f"{abs(advice.saved) / 2**30:.2f} GiB {'less' if advice.saved >= 0 else 'more'}"
        lines.append(f"  {settings}: {speed}, {memory}")
    return "\n".join(lines)


def _traffic_table(found: Estimate) -> Table:
    table = Table("sent by a rank in a step", "over", "ranks", "calls", "MB")
    for transfer in sorted(found.traffic, key=lambda transfer: -transfer.sent):
        size = f"{transfer.sent / 1e6:,.4g}"
        table.add_row(transfer.collective, transfer.axis, str(transfer.size), f"{transfer.calls:,}", size)
    return table


def _heading(config: RunConfig, found: Estimate) -> str:
    engine, training = config.engine, config.training
    axes = " × ".join(f"{axis} {size}" for axis, size in found.mesh.items() if size > 1 and axis not in INSIDE)
    axes = (axes or "one process") + "".join(f" ({axis} {found.mesh[axis]})" for axis in INSIDE if axis in found.mesh)
    kind = f"deepspeed ZeRO-{engine.zero_stage}" if engine.kind == "deepspeed" else engine.kind
    return (
        f"{config.name}: {found.parameters:,} parameters, {found.flops_per_token:.3g} FLOPs a token, "
        f"{found.flops_per_step:.3g} a step of {found.tokens_per_step:,} tokens\n"
        f"{kind}, {engine.precision}, {axes}: {found.micro_batches} micro-batch(es) of "
        f"{training.micro_batch_size} × {training.seq_len // found.mesh.get('cp', 1)} a rank"
    )


def _table(config: RunConfig, found: Estimate) -> Table:
    unit, divisor = ("GiB", 2**30) if found.peak > 2**30 else ("MiB", 2**20)
    table = Table("the fullest rank", unit, "")

    def row(name: str, size: int, told: str = "", *, last: bool = False) -> None:
        table.add_row(name, f"{size / divisor:.2f}", told, end_section=last)

    place = ", in host memory" if config.engine.cpu_offload else ""
    row("weights", found.weights, "fp32 masters" + place)
    row("gradients", found.gradients, "fp32" + place)
    row("Adam's moments", found.moments, "fp32, two" + place)
    row("states", found.states, f"the emptiest rank: {found.smallest_states / divisor:.2f}", last=True)
    row("gathered weights", found.gathered, "of other ranks, at most")
    recomputed = config.engine.activation_checkpointing
    kept = "a block's input each" if recomputed else "all that the backward reads"
    if config.engine.activation_offload:
        kept = "but the blocks' inputs, which are in host memory"
    row("activations", found.activations, kept)
    row("loss", found.loss, "a chunk of logits, gradients of hidden states and head")
    row("summed gradients", found.summed_gradients, "kept from micro-batch to micro-batch", last=True)
    holds = ", ".join(f"{name} {size / divisor:.2f}" for name, size in found.peak_holds.items() if size)
    if found.host:
        row("in host memory", found.host, "at most")
    row("peak", found.peak, f"{found.peak_at}: {holds}")
    return table
