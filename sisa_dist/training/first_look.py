"""What is known of a layout before anything is rehearsed: bytes that it holds at the least, and about its time.

The bytes are a lower bound, so that what exceeds a device may be dropped unseen. The time only says what to try first:
model FLOPs at the peak, weights and gradients over the data ranks, what tp, cp and ep send at the borders of theirs.
"""

from __future__ import annotations

import torch

from sisa_dist.config import ModelConfig, RunConfig
from sisa_dist.model import build_model
from sisa_dist.model.flops import training_flops_per_token
from sisa_dist.parallel.apply import apply_plan
from sisa_dist.training.changes import changed
from sisa_dist.training.deep_rehearsal import layers_alike
from sisa_dist.training.devices import Device
from sisa_dist.training.rehearsal import pretended_mesh
from sisa_dist.training.roofline import transfer_seconds
from sisa_dist.training.states import states
from sisa_dist.training.traffic import Transfer
from sisa_dist.training.zero import FP32, States

_KEPT = {"swiglu": 3, "gelu": 1}  # times d_ff that an MLP's backward reads, at the least


class FirstLook:
    def __init__(self, device: Device, *, world_size: int) -> None:
        self._device, self._world = device, world_size
        self._states: dict[str, tuple[States, int]] = {}

    def __call__(self, config: RunConfig) -> tuple[float, float]:
        """(bytes at the least, about the seconds of a step). Raises UserError where the mesh cannot be."""
        held, whole = self._held(config)
        kept = _activations(config)
        if config.engine.cpu_offload:
            return kept, self._seconds(config, whole)
        return max(held.total, held.weights + held.moments + kept), self._seconds(config, whole)

    def states(self, config: RunConfig) -> int:
        return 0 if config.engine.cpu_offload else self._held(config)[0].total

    def _held(self, config: RunConfig) -> tuple[States, int]:
        """Of the fullest rank, and the bytes of the fp32 weights that data ranks share out."""
        key = repr((config.parallel, config.engine.kind, config.engine.zero_stage))
        if key not in self._states:
            layers = config.model.n_layers
            if layers > 2 and layers_alike(config.model):
                (one, own), (two, both) = (self._count(changed(config, {"model.n_layers": n})) for n in (1, 2))
                numbers = (
                    getattr(one, name) + (layers - 1) * (getattr(two, name) - getattr(one, name))
                    for name in ("weights", "gradients", "moments")
                )
                self._states[key] = States(*numbers), own + (layers - 1) * (both - own)
            else:
                self._states[key] = self._count(config)
        return self._states[key]

    def _count(self, config: RunConfig) -> tuple[States, int]:
        with pretended_mesh(config, self._world) as mesh:
            with torch.device("meta"):
                model = build_model(config.model)
            slices = apply_plan(model, mesh)
            whole = FP32 * sum(parameter.numel() for parameter in model.parameters())
            return states(config, slices, mesh), whole

    def _seconds(self, config: RunConfig, whole: int) -> float:
        engine, parallel, training, model = config.engine, config.parallel, config.training, config.model
        dtype, size = ("bfloat16", 2) if engine.precision == "bf16" else ("float32", 4)
        flops = training_flops_per_token(model, training.seq_len) * training.global_batch_tokens
        computed = flops * (4 / 3 if engine.activation_checkpointing else 1) / self._device.flops[dtype] / self._world
        data = self._world // (parallel.tp * parallel.cp)
        rounds = training.global_batch_windows // (training.micro_batch_size * data)
        shard = self._world // (parallel.tp * parallel.dp_replicate)

        def over_data(collective: str, bytes_: float, *, axis: str = "dp_shard") -> float:
            ranks, stride = (shard, parallel.tp) if axis == "dp_shard" else (parallel.dp_replicate, shard * parallel.tp)
            return self._sent(collective, axis, ranks, stride, bytes_)

        waited = 0.0
        if engine.kind == "fsdp2":
            gathers = (2 if engine.reshard_after_forward else 1) * rounds
            beside = over_data("all_gather", gathers * whole * size / FP32) + over_data("reduce_scatter", whole)
            beside += over_data("all_reduce", whole / shard, axis="dp_replicate")
        elif engine.zero_stage == 3:
            beside = over_data("all_gather", 2 * rounds * whole) + over_data("reduce_scatter", rounds * whole)
        else:
            sums = rounds if engine.zero_stage == 2 else 1
            beside, waited = over_data("all_reduce", sums * whole), over_data("all_gather", whole)
        stream = training.micro_batch_size * training.seq_len // parallel.cp * model.d_model * size
        crossings = (6 if engine.activation_checkpointing else 4) * model.n_layers * rounds
        waited += self._sent("all_reduce", "tp", parallel.tp, 1, crossings * stream)
        routed = 4 * rounds * stream * (model.moe.top_k * model.layer_mlps.count("moe") if model.moe else 0)
        waited += self._sent("all_to_all", "ep", parallel.ep, 1, routed)  # there and back, forward and backward
        return max(computed, beside) + waited + self._context(config, rounds * size)

    def _context(self, config: RunConfig, each: int) -> float:
        """Keys and values of a window to all cp ranks, or heads of all that attention reads and gives; and back."""
        parallel, training, model = config.parallel, config.training, config.model
        times = each * model.n_layers * (4 if config.engine.activation_checkpointing else 3)
        tokens = times * training.micro_batch_size * training.seq_len / parallel.tp
        pairs = 2 * model.kv_heads * model.width_per_head
        if parallel.cp_kind == "ulysses":
            channels = (pairs + 2 * model.n_heads * model.width_per_head) / parallel.cp
            return self._sent("all_to_all", "cp", parallel.cp, parallel.tp, tokens * channels)
        return self._sent("all_gather", "cp", parallel.cp, parallel.tp, tokens * pairs)

    def _sent(self, collective: str, axis: str, ranks: int, stride: int, bytes_: float) -> float:
        if ranks == 1:
            return 0.0
        transfer = Transfer(collective, axis, ranks, stride, 1, round(bytes_))  # type: ignore[arg-type]
        return transfer_seconds(transfer, self._device, self._world)


def _activations(config: RunConfig) -> float:
    """Bytes that wait for the backward when the first of it begins: the blocks' inputs, and without checkpointing what
    an MLP's matrices read."""
    engine, parallel, training, model = config.engine, config.parallel, config.training, config.model
    if engine.activation_offload:
        return 0.0
    tokens = training.micro_batch_size * training.seq_len / parallel.cp
    channels = model.n_layers * model.d_model / (parallel.tp if parallel.sequence_parallel else 1)
    if not engine.activation_checkpointing and engine.mlp_chunk is None:
        channels += _mlp_channels(model) / parallel.tp
    return tokens * channels * (2 if engine.precision == "bf16" else 4)


def _mlp_channels(model: ModelConfig) -> int:
    return sum(_KEPT.get(mlp, 0) * model.d_ff for mlp in model.layer_mlps)
