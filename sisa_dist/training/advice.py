"""Which single settings of a run would help it most on a device: each is tried by an estimate of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from sisa_dist.config import RunConfig, UserError
from sisa_dist.training.changes import changed, differences
from sisa_dist.training.devices import Device
from sisa_dist.training.outlook import Outlook, outlook

_LONG = 16384  # tokens of a window from which cutting it is worth a try


@dataclass(frozen=True)
class Advice:
    settings: dict[str, Any]  # what differs from the config, all of it
    seconds: float  # of a step
    faster: float  # share of the time it takes away; below 0 it takes longer
    peak: int
    saved: int  # bytes of the peak
    fits: bool


def advise(
    now: Outlook,
    device: Device,
    *,
    world_size: int,
    best: int = 3,
    look: Callable[..., Outlook] = outlook,
    progress: Callable[[str], None] = lambda told: None,
) -> list[Advice]:
    """At most `best` changes of `now.config`, the best first.

    Of a run that fits: those that shorten its step and leave it fitting. Of one that does not: those that make it fit,
    the fastest first; where none does, those that leave the smallest peak. `look` is how an outlook is come by.
    """
    config, found = now.config, list[Advice]()
    for change in single_changes(config, device, world_size=world_size, fits=now.fits):
        try:
            other = changed(config, change)
            progress(", ".join(f"{key} {value}" for key, value in change.items()))
            then = look(other, device, world_size=world_size)
        except UserError:  # not of this model, batch or number of processes
            continue
        seconds = then.bound.seconds
        faster, saved = 1 - seconds / now.bound.seconds, now.peak - then.peak
        found.append(Advice(differences(config, other), seconds, faster, then.peak, saved, then.fits))
    if now.fits:  # a thousandth is less than the ceilings are known to
        helping = [advice for advice in found if advice.fits and advice.faster > 1e-3]
    else:
        helping = [advice for advice in found if advice.fits] or [advice for advice in found if advice.saved > 0]
    fit = any(advice.fits for advice in helping)
    helping.sort(key=lambda advice: advice.seconds if fit else advice.peak)
    return helping[:best]


def single_changes(config: RunConfig, device: Device, *, world_size: int, fits: bool) -> Iterator[dict[str, Any]]:
    """Each a change of one setting, with what it drags along. What only saves memory is left out where all `fits`."""
    engine, parallel, training = config.engine, config.parallel, config.training
    yield {"training.micro_batch_size": 2 * training.micro_batch_size}
    yield {"engine.activation_checkpointing": not engine.activation_checkpointing}
    if not fits:
        if training.micro_batch_size > 1:
            yield {"training.micro_batch_size": training.micro_batch_size // 2}
        if engine.activation_checkpointing and not engine.activation_offload and not device.is_host:
            yield {"engine.activation_offload": True}
        if not engine.cpu_offload and not device.is_host:
            yield {"engine.cpu_offload": True}
        if engine.mlp_chunk is None:
            yield {"engine.mlp_chunk": max(1, training.seq_len // 4)}
    for key, off in (("activation_offload", False), ("cpu_offload", False), ("mlp_chunk", None)):
        if getattr(engine, key):
            yield {f"engine.{key}": off}
    if engine.precision == "fp32":
        yield {"engine.precision": "bf16"}
    if world_size == 1:
        return
    if engine.kind == "fsdp2":
        yield {"engine.reshard_after_forward": not engine.reshard_after_forward}
        hosts = world_size // device.ranks_per_host
        if parallel.dp_replicate > 1:
            yield {"parallel.dp_replicate": 1}
        elif hosts > 1:
            yield {"parallel.dp_replicate": hosts}
    else:
        yield from ({"engine.zero_stage": stage} for stage in (0, 1, 2, 3) if stage != engine.zero_stage)
    if parallel.tp > 1:
        yield {"parallel.sequence_parallel": not parallel.sequence_parallel}
    axes = {"tp": True, "cp": training.seq_len >= _LONG, "ep": config.model.experts > 0}
    for axis, worth in axes.items():
        now = getattr(parallel, axis)
        for size in (2 * now, now // 2) if worth or now > 1 else ():
            if size and world_size % size == 0:
                yield {f"parallel.{axis}": size} | _data_ranks(config, world_size, axis, size)


def _data_ranks(config: RunConfig, world_size: int, axis: str, size: int) -> dict[str, Any]:
    """parallel.dp, where the config says it, for the processes that the other axes leave."""
    if config.parallel.dp is None or axis == "ep":
        return {}
    sizes = {"tp": config.parallel.tp, "cp": config.parallel.cp} | {axis: size}
    return {"parallel.dp": max(1, world_size // (sizes["tp"] * sizes["cp"]))}
