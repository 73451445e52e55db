"""A config on a device in short: its peak and its roofline."""

from __future__ import annotations

from dataclasses import dataclass

from sisa_dist.config import RunConfig
from sisa_dist.training.devices import Device
from sisa_dist.training.estimate import Estimate, estimate
from sisa_dist.training.roofline import Roofline, roofline


@dataclass(frozen=True)
class Outlook:
    config: RunConfig
    peak: int  # bytes of the fullest rank
    bound: Roofline
    memory: float  # of the device

    @property
    def fits(self) -> bool:
        return self.peak <= self.memory


def outlook(config: RunConfig, device: Device, *, world_size: int) -> Outlook:
    """From an estimate. Raises UserError as `estimate` does."""
    return outlook_of(config, estimate(config, world_size=world_size), device)


def outlook_of(config: RunConfig, found: Estimate, device: Device) -> Outlook:
    return Outlook(config, bytes_on(device, found), roofline(config, found, device), device.memory)


def bytes_on(device: Device, found: Estimate) -> int:
    """At most, in the memory that `device.memory` is of."""
    return found.peak + (found.host if device.is_host else 0)
