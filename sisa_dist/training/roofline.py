"""A training step at a device's ceilings, every trip to memory charged: what it computes, what it sends, waits for.

No forecast, and no strict bound: on a CPU, whose caches keep many of the bytes that are charged here, a small model's
step can take well under it. Each operator takes as long as its FLOPs or its bytes ask, whichever is more; each
collective as its bytes over the wires it crosses. Left out: launches of kernels, latencies, ranks that wait for a
slower one, reading the data, and how far real kernels stay below the ceilings. What would let a step beat it: kernels
that fuse what is here one operator and one trip to memory each (engine.compile, attention on a GPU), caches that spare
such a trip, engine.overlap, whose tp collectives run behind weight gradients and are counted as waited for, and copies
to the host beside copies from it: all are charged one after another to a link of one direction's speed, as activations
go (away in the forward, back in the backward), but offloaded weights may come while gradients go.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from sisa_dist.config import EngineConfig, RunConfig
from sisa_dist.parallel.mesh import AXES
from sisa_dist.training.devices import Device
from sisa_dist.training.estimate import Estimate
from sisa_dist.training.traffic import Transfer
from sisa_dist.training.work import Work

COMPUTED = ("forward", "recomputation", "backward", "optimizer")
_DATA_AXES = ("dp_shard", "dp_replicate", "expert_dp")
_DAY = 86400


@dataclass(frozen=True)
class Roofline:
    """Of one step. `seconds` is the sum of `parts`."""

    parts: dict[str, float]  # forward, recomputation, backward, optimizer; waited, exposed, host: see `roofline`
    overlapped: float  # seconds of collectives that run beside forward and backward, hidden or not
    flops: float  # of the model, in a step of all ranks
    tokens: int
    peak: float  # FLOP/s of all ranks
    reduced: float = 0.0  # of the overlapped seconds, gradients': these run beside a backward alone

    @property
    def seconds(self) -> float:
        return sum(self.parts.values())

    @property
    def mfu(self) -> float:
        return self.flops / (self.seconds * self.peak)

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds

    @property
    def tokens_per_day(self) -> float:
        return _DAY * self.tokens_per_second

    def numbers(self) -> dict[str, Any]:
        """All of them by name."""
        told = {name: getattr(self, name) for name in ("seconds", "mfu", "tokens_per_second", "tokens_per_day")}
        return told | dataclasses.asdict(self)


def roofline(config: RunConfig, found: Estimate, device: Device) -> Roofline:
    """The step of `found`, an estimate of `config`, on ranks like `device`.

    Beside what is computed: `waited`, collectives that nothing runs beside (of tp, cp and ep, and those an engine waits
    for); `exposed`, what is left of the others behind forward and backward; `host`, copies to and from host memory.
    """
    world = _world(found)
    computed = dict.fromkeys(COMPUTED, 0.0)
    for work in found.work:
        computed[work.phase] += work.calls * _work_seconds(work, config.engine, device)
    waited = overlapped = reduced = 0.0
    for transfer in found.traffic:
        seconds = transfer_seconds(transfer, device, world)
        if device.overlaps and _overlaps(transfer, config.engine):
            overlapped += seconds
            reduced += seconds if transfer.collective != "all_gather" else 0.0
        else:
            waited += seconds
    times = computed | {
        "waited": waited,
        "overlapped": overlapped,
        "reduced": reduced,
        "host": found.host_bytes_per_step / device.host_link,
    }
    return of_times(times, config, found, device)


def of_times(times: Mapping[str, float], config: RunConfig, found: Estimate, device: Device) -> Roofline:
    """From the seconds of each part, with `overlapped` for what runs beside the others, and `reduced` of it."""
    parts = {name: times[name] for name in (*COMPUTED, "waited")}
    beside = sum(times[name] for name in COMPUTED if name != "optimizer")
    reduced = times.get("reduced", 0.0)
    backward = (times["recomputation"] + times["backward"]) / _backwards_a_reduction(config.engine, found)
    parts["exposed"] = max(0.0, times["overlapped"] - beside, reduced - backward)
    parts["host"] = times["host"]
    dtype = "bfloat16" if config.engine.precision == "bf16" else "float32"
    peak = _world(found) * device.flops[dtype]
    return Roofline(parts, times["overlapped"], found.flops_per_step, found.tokens_per_step, peak, reduced)


def transfer_seconds(transfer: Transfer, device: Device, world: int) -> float:
    """Over the links of a host, and the network cards of as many of its ranks as the group has there.

    A ring of several hosts is laid once for each card, so a group with four ranks on a host sends over four cards. In
    an all-to-all each rank sends every other its share itself; ranks that hand something on have one card each.
    """
    spans, together = _placed(transfer.size, transfer.stride, device.ranks_per_host, world)
    if not spans:
        return transfer.sent / device.link
    if transfer.collective == "all_to_all":
        outside = transfer.nbytes * (transfer.size - together) / transfer.size
        return max((transfer.sent - outside) / device.link, outside / device.network)
    cards = 1 if transfer.collective == "send" else together
    return transfer.sent / min(device.link, cards * device.network)


@cache
def _placed(size: int, stride: int, ranks_per_host: int, world: int) -> tuple[bool, int]:
    """Whether a group of the world spans hosts, and the fewest ranks that one has on a host it touches.

    Groups of `size` ranks that stand `stride` apart fill blocks of size × stride ranks.
    """
    spans, fewest = False, size
    block = size * stride
    for begin in range(0, max(world, block), block):
        for first in range(begin, begin + stride):
            hosts = Counter((first + stride * place) // ranks_per_host for place in range(size))
            spans, fewest = spans or len(hosts) > 1, min(fewest, *hosts.values())
    return spans, fewest


def _work_seconds(work: Work, engine: EngineConfig, device: Device) -> float:
    if engine.cpu_offload and work.phase == "optimizer":
        return work.nbytes / device.host_bandwidth
    # Of a dtype without a ceiling of its own, float64 say, nothing large is multiplied.
    peak = device.flops.get(work.dtype, device.flops["float32"])
    return max(work.flops / peak, work.nbytes / device.bandwidth)


def _overlaps(transfer: Transfer, engine: EngineConfig) -> bool:
    """FSDP2 gathers weights ahead and reduces gradients behind, ZeRO-3 too. ZeRO-1 and 2 reduce beside the backward and
    gather the new weights when the optimizer is done; ZeRO-0 reduces when the backward is. A user's own overlap_comm
    may forbid it all."""
    if transfer.axis not in _DATA_AXES:
        return False
    if engine.kind == "fsdp2":
        return True
    if not engine.deepspeed_config.get("zero_optimization", {}).get("overlap_comm", True):
        return False
    return engine.zero_stage == 3 or (engine.zero_stage > 0 and transfer.collective != "all_gather")


def _backwards_a_reduction(engine: EngineConfig, found: Estimate) -> int:
    """Micro-batches whose gradients are reduced at once, in the last one's backward; ZeRO-2 and 3 reduce in each."""
    return found.micro_batches if engine.kind == "fsdp2" or engine.zero_stage < 2 else 1


def _world(found: Estimate) -> int:
    size = 1
    for axis in AXES:
        size *= found.mesh[axis]
    return size
