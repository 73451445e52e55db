"""Devices and estimates with round numbers, to check by hand what is made of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sisa_dist.training.devices import Device
from sisa_dist.training.estimate import Estimate
from sisa_dist.training.traffic import Transfer
from sisa_dist.training.work import Work

# 100 FLOP/s in bf16 and 10 in fp32, 10 bytes/s of memory, links of 8 inside and 1 between hosts of eight.
ROUND = Device(
    "round",
    {"float32": 10.0, "bfloat16": 100.0},
    bandwidth=10.0,
    memory=1000.0,
    link=8.0,
    network=1.0,
    host_link=4.0,
    host_bandwidth=2.0,
)


def made_estimate(
    *, mesh: dict[str, int] | None = None, work: Sequence[Work] = (), traffic: Sequence[Transfer] = (), **known: Any
) -> Estimate:
    """What is not said is 0; one rank."""
    zeros = ("weights", "gradients", "moments", "smallest_states", "gathered", "activations", "loss")
    told: dict[str, Any] = dict.fromkeys((*zeros, "summed_gradients", "peak", "host"), 0)
    told |= {"parameters": 1, "flops_per_token": 6.0, "flops_per_step": 60.0, "tokens_per_step": 10}
    told |= {"micro_batches": 1, "peak_at": "loss", "peak_holds": {}}
    told["mesh"] = {"dp_replicate": 1, "tp": 1, "dp_shard": 1} | (mesh or {})
    return Estimate(**(told | {"work": tuple(work), "traffic": tuple(traffic)} | known))
