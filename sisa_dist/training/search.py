"""Layouts for so many devices of a kind, ranked by the roofline: what `sisa estimate --search` tries and keeps.

Every layout is a config of its own: what the config's rules refuse is counted and dropped. Of the rest a look that
costs little (states, activations at the least, and a time from FLOPs and the largest transfers) drops what cannot fit
and says in which order to estimate the rest: those that the budget of estimates does not reach are counted as left.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from sisa_dist.config import RunConfig, UserError
from sisa_dist.parallel.plan import check_tp
from sisa_dist.training.changes import changed
from sisa_dist.training.deep_rehearsal import few_layers
from sisa_dist.training.devices import Device
from sisa_dist.training.estimate import check_batch
from sisa_dist.training.first_look import FirstLook
from sisa_dist.training.outlook import Outlook, outlook

_LONG = 16384  # tokens of a window from which it is cut
_ENOUGH = 8  # layouts that fit
_AT_MOST, _LAYERS = 40, 60  # estimates, and layers that they rehearse together: what takes the time


@dataclass
class Search:
    """`found` fit, the fastest first. The numbers count configs."""

    found: list[Outlook] = field(default_factory=list)
    refused: int = 0  # by the config's rules
    too_large: int = 0  # by their states and at least their activations
    estimated: int = 0
    left: int = 0  # that might fit, and did not look as good as those
    layers: int = 0  # that were rehearsed
    reason: UserError | None = None  # of the first that was refused

    def refuse(self, error: UserError) -> None:
        self.refused += 1
        self.reason = self.reason or error

    @property
    def spent(self) -> bool:
        return self.estimated >= _AT_MOST or self.layers >= _LAYERS


def search_layouts(
    config: RunConfig,
    device: Device,
    *,
    gpus: int,
    keep: int = 5,
    progress: Callable[[str], None] = lambda told: None,
) -> Search:
    """At most `keep` layouts of `config` for `gpus` ranks like `device`, with the config's own where it fits.

    Raises UserError where the rules refuse every one.
    """
    found = Search()
    groups: dict[str, list[tuple[int, float, RunConfig]]] = {}
    glance = FirstLook(device, world_size=gpus)
    for other in _valid(config, device, gpus, found):
        try:
            least, seconds = glance(other)
        except UserError as error:
            found.refuse(error)
            continue
        if least > device.memory:
            found.too_large += 1
            continue
        groups.setdefault(_layout(other), []).append((other.training.micro_batch_size, seconds, other))
    # The largest micro-batch has the fewest gathers and is tried first; smaller ones where it does not fit.
    waiting = _in_order({key: sorted(group, key=lambda entry: -entry[0]) for key, group in groups.items()}, config)
    told: list[Outlook] = []
    for group in waiting:
        if len(told) == _ENOUGH or found.spent:
            break
        fitting = _largest_that_fits(group, device, gpus, found, glance, progress)
        if fitting is not None:
            told.append(fitting)
    if not found.estimated and not found.too_large and found.reason is not None:
        raise found.reason
    found.left = max(0, sum(len(group) for group in waiting) - found.estimated)
    told.sort(key=lambda proposal: proposal.bound.seconds)
    mine = [proposal for proposal in told[keep:] if _layout(proposal.config) == _layout(config)]
    found.found = told[: keep - len(mine)] + mine
    return found


def _in_order(
    groups: dict[str, list[tuple[int, float, RunConfig]]], config: RunConfig
) -> list[list[tuple[int, float, RunConfig]]]:
    """The config's own layout, then the best of each (tp, cp, ep), then the others, by the time of their first look."""
    own = groups.pop(_layout(config), None)
    others = sorted(groups.values(), key=lambda group: min(seconds for _, seconds, _ in group))
    firsts: dict[tuple[int, int, int], list[tuple[int, float, RunConfig]]] = {}
    for group in others:
        parallel = group[0][2].parallel
        firsts.setdefault((parallel.tp, parallel.cp, parallel.ep), group)
    first = list(firsts.values())
    return ([own] if own else []) + first + [group for group in others if not any(group is one for one in first)]


def layouts(config: RunConfig, device: Device, gpus: int) -> Iterator[dict[str, Any]]:
    """Changes of `config`, valid or not: engine, tp, cp, ep, dp_replicate, checkpointing, micro-batch."""
    parallel, training = config.parallel, config.training
    inside = min(gpus, device.ranks_per_host)
    tps = sorted({n for n in range(1, inside + 1) if inside % n == 0} | {parallel.tp})
    cps = {1, parallel.cp} | ({2, 4, 8} if training.seq_len >= _LONG else set())
    experts = config.model.experts
    eps = {1, parallel.ep} | {n for n in range(1, min(gpus, experts) + 1) if experts % n == gpus % n == 0}
    hosts = gpus // device.ranks_per_host
    copies = {1, hosts, parallel.dp_replicate} - {0}
    engines: list[dict[str, Any]] = [{"engine.kind": "fsdp2", "parallel.dp_replicate": copy} for copy in sorted(copies)]
    if gpus == 1:
        engines = engines[:1]
    else:
        stages = {1, 2, 3} | ({config.engine.zero_stage} if config.engine.kind == "deepspeed" else set())
        engines += [
            {"engine.kind": "deepspeed", "engine.zero_stage": stage, "parallel.dp_replicate": 1}
            for stage in sorted(stages)
        ]
    checkpointed = ({"engine.activation_checkpointing": False}, {"engine.activation_checkpointing": True})
    for place in _places(config, gpus, tps, sorted(cps), sorted(eps)):
        windows = max(1, training.global_batch_windows * place["parallel.tp"] * place["parallel.cp"] // gpus)
        sizes = sorted({*_powers(windows), training.micro_batch_size})
        for engine, kept, size in itertools.product(engines, checkpointed, sizes):
            yield place | engine | kept | {"training.micro_batch_size": size}


def _places(
    config: RunConfig, gpus: int, tps: Sequence[int], cps: Sequence[int], eps: Sequence[int]
) -> Iterator[dict[str, Any]]:
    """What `parallel` says of tp, cp and ep, with their kinds; dp where the config says it."""
    parallel = config.parallel
    for tp, cp in itertools.product(tps, cps):
        if gpus % (tp * cp):
            continue
        cut = sorted({True, parallel.sequence_parallel}) if tp > 1 else [False]
        kinds = sorted({parallel.cp_kind, "ulysses"}) if cp > 1 else ["all_gather"]
        for ep, sequence_parallel, kind in itertools.product(eps if tp == cp == 1 else [1], cut, kinds):
            place: dict[str, Any] = {"parallel.tp": tp, "parallel.cp": cp, "parallel.ep": ep}
            place |= {"parallel.sequence_parallel": sequence_parallel, "parallel.cp_kind": kind}
            yield place | {"parallel.dp": None if parallel.dp is None else gpus // (tp * cp)}


def _valid(config: RunConfig, device: Device, gpus: int, found: Search) -> Iterator[RunConfig]:
    for change in layouts(config, device, gpus):
        try:
            other = changed(config, change)
            check_tp(other.model, other.parallel.tp)
            data = gpus // (other.parallel.tp * other.parallel.cp)
            for key in ("dp_replicate", "ep"):
                if data % getattr(other.parallel, key):
                    raise UserError(f"parallel.{key} does not divide {data} data ranks: set it to a divisor")
            check_batch(other, data)
        except UserError as error:
            found.refuse(error)
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
        if found.spent:
            return None
        progress(f"{found.estimated + 1}: {describe_layout(config)}, micro-batch {size}")
        try:
            told = outlook(config, device, world_size=gpus)
        except UserError as error:
            found.refuse(error)
            return None
        found.estimated += 1
        found.layers += sum(few_layers(config) or [config.model.n_layers])
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
    return repr(config.parallel.model_copy(update={"dp": None})) + repr(config.engine)


def _powers(most: int) -> list[int]:
    return [2**n for n in range(most.bit_length())]
