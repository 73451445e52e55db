"""Layouts for so many devices of a kind, ranked by the roofline: what `sisa estimate --search` tries and keeps.

Every layout is a config of its own: what the config's rules refuse is counted and dropped. Of the rest a look that
costs nothing (states, which are exact, activations at the least, and a time from FLOPs and the largest transfers)
says in which order to estimate them and what cannot fit; it decides nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from sisa_dist.config import RunConfig, UserError
from sisa_dist.parallel.plan import check_tp
from sisa_dist.training.changes import changed
from sisa_dist.training.devices import Device
from sisa_dist.training.estimate import check_batch
from sisa_dist.training.first_look import FirstLook
from sisa_dist.training.outlook import Outlook, outlook, quick_outlook

_LONG = 16384  # tokens of a window from which it is cut
_ENOUGH, _AT_MOST = 8, 40  # layouts that fit; estimates from a few layers


@dataclass
class Search:
    """`found` are of the whole model and fit, the fastest first. The numbers count configs."""

    found: list[Outlook] = field(default_factory=list)
    refused: int = 0  # by the config's rules
    too_large: int = 0  # by their states and at least their activations
    estimated: int = 0  # from a few layers
    left: int = 0  # that might fit, and did not look as good as those


def search_layouts(
    config: RunConfig,
    device: Device,
    *,
    gpus: int,
    keep: int = 5,
    progress: Callable[[str], None] = lambda told: None,
) -> Search:
    """At most `keep` layouts of `config` for `gpus` ranks like `device`."""
    found = Search()
    groups: dict[str, list[tuple[int, float, RunConfig]]] = {}
    glance = FirstLook(device, world_size=gpus)
    for other in _valid(config, device, gpus, found):
        least, seconds = glance(other)
        if least > device.memory:
            found.too_large += 1
            continue
        groups.setdefault(_layout(other), []).append((other.training.micro_batch_size, seconds, other))
    # The largest micro-batch has the fewest gathers and is tried first; smaller ones where it does not fit.
    waiting = sorted(
        (sorted(group, key=lambda entry: -entry[0]) for group in groups.values()),
        key=lambda group: min(seconds for _, seconds, _ in group),
    )
    told: list[Outlook] = []
    for group in waiting:
        if len(told) == _ENOUGH or found.estimated >= _AT_MOST:
            break
        fitting = _largest_that_fits(group, device, gpus, found, glance, progress)
        if fitting is not None:
            told.append(fitting)
    found.left = sum(len(group) for group in waiting) - found.estimated
    told.sort(key=lambda proposal: proposal.bound.seconds)
    for number, proposal in enumerate(told[:keep], start=1):
        progress(f"the whole model of proposal {number} of {min(keep, len(told))}")
        whole = outlook(proposal.config, device, world_size=gpus)
        if whole.fits:
            found.found.append(whole)
    found.found.sort(key=lambda proposal: proposal.bound.seconds)
    return found


def layouts(config: RunConfig, device: Device, gpus: int) -> Iterator[dict[str, Any]]:
    """Changes of `config`, valid or not: engine, tp, cp, ep, dp_replicate, checkpointing, micro-batch."""
    parallel, training = config.parallel, config.training
    inside = min(gpus, device.ranks_per_host)
    tps = [n for n in range(1, inside + 1) if inside % n == 0]
    cps = {1, parallel.cp} | ({2, 4, 8} if training.seq_len >= _LONG else set())
    eps = {1, parallel.ep} | (
        {n for n in _powers(gpus) if n <= config.model.experts} if config.model.experts else set()
    )
    hosts = gpus // device.ranks_per_host
    copies = {1, hosts, parallel.dp_replicate} - {0}
    engines: list[dict[str, Any]] = [{"engine.kind": "fsdp2", "parallel.dp_replicate": copy} for copy in sorted(copies)]
    if gpus == 1:
        engines = engines[:1]
    else:
        engines += [
            {"engine.kind": "deepspeed", "engine.zero_stage": stage, "parallel.dp_replicate": 1} for stage in (1, 2, 3)
        ]
    for tp in tps:
        for cp in sorted(cps):
            if gpus % (tp * cp):
                continue
            for ep in sorted(eps) if tp == cp == 1 else [1]:
                data = gpus // (tp * cp)
                place: dict[str, Any] = {"parallel.tp": tp, "parallel.cp": cp, "parallel.ep": ep}
                place["parallel.sequence_parallel"] = tp > 1
                place["parallel.dp"] = None if parallel.dp is None else data
                windows = max(1, training.global_batch_windows // data)
                for engine in engines:
                    for checkpointing in (False, True):
                        kept = {"engine.activation_checkpointing": checkpointing}
                        for size in sorted({*_powers(windows), training.micro_batch_size}):
                            yield place | engine | kept | {"training.micro_batch_size": size}


def _valid(config: RunConfig, device: Device, gpus: int, found: Search) -> Iterator[RunConfig]:
    for change in layouts(config, device, gpus):
        try:
            other = changed(config, change)
            check_tp(other.model, other.parallel.tp)
            data = gpus // (other.parallel.tp * other.parallel.cp)
            if data % other.parallel.dp_replicate or data % other.parallel.ep:
                raise UserError("the data ranks do not come out even")
            check_batch(other, data)
        except UserError:
            found.refused += 1
        else:
            yield other


def _largest_that_fits(
    group: list[tuple[int, float, RunConfig]],
    device: Device,
    gpus: int,
    found: Search,
    glance: FirstLook,
    progress: Callable[[str], None],
) -> Outlook | None:
    """Of one layout's micro-batches, the largest first; after a miss those it says cannot fit either are skipped."""
    most = float("inf")
    for size, _, config in group:
        if size > most:
            continue
        progress(f"{found.estimated + 1}: {describe_layout(config)}, micro-batch {size}")
        try:
            told = quick_outlook(config, device, world_size=gpus)
        except UserError:
            found.refused += 1
            return None
        found.estimated += 1
        if told.fits:
            return told
        states = min(glance.states(config), told.peak)
        # Of what is not states, a smaller micro-batch saves its share at most: gathered weights stay.
        most = size * max(0.0, device.memory - states) / max(1, told.peak - states)
    return None


def describe_layout(config: RunConfig) -> str:
    """fsdp2 tp 2, ZeRO-3 cp 4 …"""
    engine, parallel = config.engine, config.parallel
    told = [f"ZeRO-{engine.zero_stage}" if engine.kind == "deepspeed" else engine.kind]
    told += [f"{axis} {size}" for axis in ("tp", "cp", "ep", "dp_replicate") if (size := getattr(parallel, axis)) > 1]
    return " ".join(told) + (", checkpointing" if engine.activation_checkpointing else "")


def _layout(config: RunConfig) -> str:
    return repr(config.parallel) + repr(config.engine)


def _powers(most: int) -> list[int]:
    return [2**n for n in range(most.bit_length())]
