"""What a real engine holds and allocates, from PyTorch's own accounts: the profiler's memory events see every storage
that the CPU allocator gives and takes back, also inside kernels, which the estimate cannot."""

from __future__ import annotations

import bisect
import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.profiler import ProfilerActivity, profile, record_function

from data_pipeline.loader import Batch
from sisa_dist.config import RunConfig
from sisa_dist.engine import Engine, build_engine
from sisa_dist.engine.deepspeed import DeepSpeedEngine
from sisa_dist.model import memory
from sisa_dist.parallel.mesh import init_mesh


def held_bytes(config: RunConfig) -> dict[str, Any]:
    """Of this rank, at the optimizer's step of a real engine: weights, gradients, moments; its place on dp_shard."""
    mesh = init_mesh(config.parallel, device="cpu")
    engine: Any = build_engine(config, mesh)
    found: dict[str, Any] = {"shard_rank": mesh.device_mesh.get_local_rank("dp_shard")}
    kept = _in_zero(engine) if isinstance(engine, DeepSpeedEngine) and engine.stage else _in_parameters(engine)
    found["weights"] = sum(map(_bytes, kept.weights()))
    found["stored"] = sum(_local(x).untyped_storage().nbytes() for x in kept.weights())

    def look(*_: Any) -> None:  # ZeRO hands AdamW one group after the other
        found["gradients"] = found.get("gradients", 0) + sum(map(_bytes, kept.gradients()))

    kept.adamw.register_step_pre_hook(look)
    engine.train_step(batches(config, engine), 1e-3)
    found["moments"] = sum(_bytes(x) for state in kept.adamw.state.values() for x in state.values())
    return found


@dataclass
class _Kept:
    adamw: torch.optim.Optimizer
    weights: Callable[[], list[Tensor]]
    masters: Callable[[], list[Tensor]]

    def gradients(self) -> list[Tensor]:
        return [x.grad for x in self.masters() if x.grad is not None]


def _in_parameters(engine: Any) -> _Kept:
    parameters = list(engine.model.parameters())
    adamw = engine.zero.optimizer if isinstance(engine, DeepSpeedEngine) else engine.optimizer
    return _Kept(adamw, lambda: parameters, lambda: parameters)


def _in_zero(engine: Any) -> _Kept:
    zero = engine.zero.optimizer
    if engine.stage == 3:
        # Small parameters stand whole as well; the threshold's doing, and no state.
        flat = zero.fp32_partitioned_groups_flat
        return _Kept(zero.optimizer, lambda: flat, lambda: flat)
    masters = zero.single_partition_of_fp32_groups
    return _Kept(zero.optimizer, lambda: [*zero.bit16_groups_flat, *masters], lambda: masters)


STEPS = 4


def peak_rise(config: RunConfig) -> int:
    """Most bytes that stood at once beyond weights and moments in a train_step of this rank: the least of four.

    Where one of gloo's threads is the last to let go of a buffer, the profiler does not see it freed. So each step is
    counted from what stood at its own start, which is the same for all, and the least disturbed one is taken.
    Activations that wait on the host (engine.activation_offload) are not counted.
    """
    engine = build_engine(config, init_mesh(config.parallel, device="cpu"))
    mine = batches(config, engine)
    with _host_apart(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        engine.train_step(mine, 1e-3)
        for _ in range(STEPS):
            with record_function("a step"):
                engine.train_step(mine, 1e-3)
    events = profiled.profiler.kineto_results.events()  # type: ignore[union-attr]
    started = sorted(event.start_ns() for event in events if event.name() == "a step")
    live, most, stood = 0, [0] * STEPS, [0] * STEPS
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda event: event.start_ns()):
        step = bisect.bisect(started, event.start_ns()) - 1
        if step >= 0 and not most[step]:
            stood[step] = live
        live += event.nbytes()
        if step >= 0:
            most[step] = max(most[step], live)
    # FSDP2 keeps nothing between steps: what seems to stand was not seen freed. ZeRO has buffers.
    standing = stood[0] if isinstance(engine, DeepSpeedEngine) else 0
    return standing + min(top - foot for top, foot in zip(most, stood, strict=True))


@contextlib.contextmanager
def _host_apart() -> Iterator[None]:
    """Here the device is the host: what is moved there is put where the profiler does not look, into numpy's memory."""

    def to_host(x: Tensor) -> Any:
        return x if not x.is_floating_point() else (x.dtype, x.detach().contiguous().view(torch.uint8).numpy().copy())

    def from_host(kept: Any) -> Tensor:
        return kept if isinstance(kept, Tensor) else torch.tensor(kept[1]).view(kept[0])

    with mock.patch.object(memory, "to_host", to_host), mock.patch.object(memory, "from_host", from_host):
        yield


def batches(config: RunConfig, engine: Engine) -> list[Batch]:
    """This rank's micro-batches of a step, random tokens."""
    training = config.training
    number = training.global_batch_windows // (training.micro_batch_size * engine.dp_size)
    shape = number, training.micro_batch_size, training.seq_len
    tokens = torch.randint(config.model.vocab_size, shape, generator=torch.Generator().manual_seed(0))
    return [Batch(x, x, None) for x in tokens]


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _bytes(tensor: Tensor) -> int:
    return _local(tensor).nbytes
