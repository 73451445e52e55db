"""`sisa estimate`: what a run will hold on each rank and compute in a step, before any machine is asked for.

States are arithmetic and exact; the rest comes from one rehearsed step (rehearsal.py), which says there what it does
not know. Needs no processes, no GPU and no memory to speak of; not to be called inside a launch.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch

from sisa_dist.config import RunConfig, UserError
from sisa_dist.model import build_model, num_parameters
from sisa_dist.model.flops import training_flops_per_token
from sisa_dist.parallel.apply import apply_plan
from sisa_dist.parallel.mesh import AXES
from sisa_dist.training.deep_rehearsal import rehearse_deep
from sisa_dist.training.rehearsal import FIRST, NEXT, pretended_mesh, rehearse_step
from sisa_dist.training.states import local_shapes, states
from sisa_dist.training.traffic import Transfer
from sisa_dist.training.traffic_zero import add_zero_traffic
from sisa_dist.training.work import Work
from sisa_dist.training.work_zero import zero_host_bytes, zero_work
from sisa_dist.training.zero import zero_peaks

INSIDE = ("ep", "cp")  # axes laid over the ranks of dp_shard


@dataclass(frozen=True)
class Estimate:
    """Of one run. Bytes are of the rank that holds most; `host` of them lie in host memory."""

    parameters: int
    flops_per_token: float  # forward and backward, without recomputation
    flops_per_step: float
    tokens_per_step: int
    mesh: dict[str, int]  # size of each axis; ep and cp, over 1, are of dp_shard's ranks
    micro_batches: int  # of each rank in a step
    weights: int  # fp32 masters
    gradients: int
    moments: int
    smallest_states: int  # weights, gradients and moments of the rank that holds least
    gathered: int  # weights of other ranks, at most
    activations: int  # kept from the first forward for its backward
    loss: int  # beyond them: logits of a chunk, gradients of hidden states and head
    summed_gradients: int  # kept from micro-batch to micro-batch
    peak: int
    peak_at: str
    peak_holds: dict[str, int]  # states, gradients, gathered, buckets (DeepSpeed's), rest
    host: int
    traffic: tuple[Transfer, ...] = ()  # of a step
    work: tuple[Work, ...] = ()  # of a step
    host_bytes_per_step: int = 0  # over the link between a device and its host, both ways

    @property
    def states(self) -> int:
        return self.weights + self.gradients + self.moments


def estimate(config: RunConfig, *, world_size: int | None = None, every_layer: bool = False) -> Estimate:
    """For `world_size` processes; None: `default_world`'s. `every_layer`: play them all, also where few tell of all.

    Raises UserError where the config does not fit so many.
    """
    world_size = world_size or default_world(config)
    with pretended_mesh(config, world_size) as mesh:
        check_batch(config, mesh.dp_size)
        with torch.device("meta"):
            model = build_model(config.model)
        parameters = num_parameters(model)
        slices = apply_plan(model, mesh)
        held = states(config, slices, mesh)
        least = states(config, slices, mesh, shard_rank=mesh.size("dp_shard") - 1)
        seen = (rehearse_step if every_layer else rehearse_deep)(config, mesh)
        shapes = local_shapes(slices, mesh)
        sizes = {axis: mesh.size(axis) for axis in AXES}
        sizes |= {axis: mesh.size(axis) for axis in INSIDE if mesh.size(axis) > 1}
        micro_batches = config.training.global_batch_windows // (config.training.micro_batch_size * mesh.dp_size)
        if config.engine.kind == "deepspeed":
            add_zero_traffic(seen.traffic, config, mesh, slices, shapes, micro_batches=micro_batches, uses=seen.uses)
    meter, work = seen.memory, seen.work.work()
    over_link = 2 * micro_batches * meter.on_host  # activations that wait there
    peaks, summed, host = meter.peaks, 0, meter.on_host
    if micro_batches > 1:
        summed = sum(meter.starts[NEXT].values()) - meter.starts[NEXT]["states"]
        if config.engine.kind == "fsdp2" and micro_batches > 2:  # the rehearsal adds gradients in the last one alone
            work += (Work("backward", "aten::add_", "float32", micro_batches - 2, 0.0, 3 * summed),)
    if config.engine.kind == "deepspeed":
        peaks = zero_peaks(config, meter, held, shapes, dp_size=sizes["dp_shard"])
        summed = 0 if micro_batches == 1 else held.gradients
        work += zero_work(config.engine.zero_stage, held, shapes, slices, micro_batches=micro_batches)
    if config.engine.cpu_offload:
        # Whatever a step needs still stands on the device; the optimizer runs on the host.
        host += held.total
        if config.engine.kind == "deepspeed":
            over_link += zero_host_bytes(config.engine.zero_stage, held, micro_batches=micro_batches)
        else:
            over_link += sum(seen.from_host) + held.gradients
        peaks = {moment: {**found, "states": 0, "gradients": 0} for moment, found in peaks.items()}
        del peaks["optimizer step"]
    moment = max(peaks, key=lambda moment: sum(peaks[moment].values()))
    flops = training_flops_per_token(config.model, config.training.seq_len)
    loss = FIRST + "loss" if micro_batches > 1 else "loss"
    before_loss = meter.starts[loss]
    return Estimate(
        parameters=parameters,
        flops_per_token=flops,
        flops_per_step=flops * config.training.global_batch_tokens,
        tokens_per_step=config.training.global_batch_tokens,
        mesh=sizes,
        micro_batches=micro_batches,
        **dataclasses.asdict(held),
        smallest_states=least.total,
        gathered=max(found.get("gathered", 0) for found in peaks.values()),
        activations=before_loss["rest"],
        loss=sum(meter.peaks[loss].values()) - sum(before_loss.values()),
        summed_gradients=summed,
        peak=sum(peaks[moment].values()),
        peak_at=moment,
        peak_holds=peaks[moment],
        host=host,
        traffic=seen.traffic.transfers(),
        work=work,
        host_bytes_per_step=over_link,
    )


def default_world(config: RunConfig) -> int:
    """tp × cp × dp of `parallel`; where dp is null 1, dp_replicate or ep."""
    parallel = config.parallel
    return parallel.tp * parallel.cp * (parallel.dp or parallel.dp_replicate * parallel.ep)


def check_batch(config: RunConfig, dp_size: int) -> None:
    """Raises UserError where the batch does not come out even over `dp_size` data ranks."""
    training = config.training
    unit = training.micro_batch_size * training.seq_len * dp_size
    if training.global_batch_tokens % unit:
        near = max(1, training.global_batch_tokens // unit) * unit
        raise UserError(
            f"training.global_batch_tokens {training.global_batch_tokens} is not a multiple of micro_batch_size × "
            f"seq_len × data ranks = {unit}: set it to {near} or {near + unit}"
        )
