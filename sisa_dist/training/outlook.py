"""A config on a device in short: its peak and its roofline, of all its layers or told from a few of them."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from sisa_dist.config import ModelConfig, RunConfig
from sisa_dist.model.flops import training_flops_per_token
from sisa_dist.training.changes import changed
from sisa_dist.training.devices import Device
from sisa_dist.training.estimate import Estimate, estimate
from sisa_dist.training.roofline import Roofline, of_times, roofline

_FEW = (3, 4)  # of fewer the first and the last are not yet apart


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
    """From an estimate of the whole model. Raises UserError as `estimate` does."""
    return outlook_of(config, estimate(config, world_size=world_size), device)


def outlook_of(config: RunConfig, found: Estimate, device: Device) -> Outlook:
    return Outlook(config, bytes_on(device, found), roofline(config, found, device), device.memory)


def bytes_on(device: Device, found: Estimate) -> int:
    """At most, in the memory that `device.memory` is of."""
    return found.peak + (found.host if device.is_host else 0)


def quick_outlook(config: RunConfig, device: Device, *, world_size: int) -> Outlook:
    """The same from models of three and of four layers, where all layers are alike: time and bytes are then affine in
    their number, but for where the peak moves to another moment of the step.

    Of the whole model else, under DeepSpeed, whose buckets and limits of live parameters bend both lines, and where
    FSDP2 gathers more blocks ahead than three layers have.
    """
    layers = config.model.n_layers
    if layers_rehearsed(config) == layers:
        return outlook(config, device, world_size=world_size)
    few = [estimate(changed(config, {"model.n_layers": number}), world_size=world_size) for number in _FEW]
    bounds = [roofline(config, found, device) for found in few]
    times = [bound.parts | {"overlapped": bound.overlapped, "reduced": bound.reduced} for bound in bounds]
    ahead = (layers - _FEW[0]) / (_FEW[1] - _FEW[0])

    def at_all(first: float, second: float) -> float:
        return first + ahead * (second - first)

    flops = training_flops_per_token(config.model, config.training.seq_len) * config.training.global_batch_tokens
    whole = dataclasses.replace(few[0], flops_per_step=flops)
    told = {name: at_all(seconds, times[1][name]) for name, seconds in times[0].items()}
    peak = round(at_all(*(bytes_on(device, found) for found in few)))
    return Outlook(config, peak, of_times(told, config, whole, device), device.memory)


def layers_rehearsed(config: RunConfig) -> int:
    """By `quick_outlook`, together; as many as the model has: the whole model is."""
    layers, engine = config.model.n_layers, config.engine
    bent = engine.kind == "deepspeed" or engine.prefetch >= _FEW[0]
    return layers if layers <= sum(_FEW) or bent or not layers_alike(config.model) else sum(_FEW)


def layers_alike(model: ModelConfig) -> bool:
    per_layer = (model.mixer, model.mlp, model.ffn, model.d_s)
    return not any(isinstance(value, list) for value in per_layer) and not model.learned_d_s and model.mixer != "hymba"
